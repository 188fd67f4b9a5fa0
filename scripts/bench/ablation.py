#!/usr/bin/env python3
"""Run the ablation on the digits and write docs/RESULTS.md with its table and pictures: one and four steps, with and without guidance,
data-free and with the adversarial loss. About 100 minutes on 2 idle CPU cores, after the build.

    scripts/bench/ablation.py                     all of it; a row whose result lies in docs/results is not run again
    scripts/bench/ablation.py --storage FOLDER    where the runs are kept (default: ablation/)
    scripts/bench/ablation.py --only four         only the runs whose names contain this
    scripts/bench/ablation.py --report            only write the document anew from the runs that are there
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import prepare

ROOT = prepare.ROOT
DOCUMENT = ROOT / "docs" / "RESULTS.md"
PICTURES = ROOT / "docs" / "results"
POTSTILL = prepare.PROGRAMS / "potstill"

ITERATIONS = 1000
# The same for every run, so that rows differ only in the settings in their names. The learning rates decay in the
# second half.
COMMON = {
    "distillation.iterations": ITERATIONS,
    "optimizer.decay": "{start_images=64000,end_images=128000}",
    "checkpoint.every": 500,
    "evaluation.every": 250,
    # More than a run's usual 2,000, so that differences between rows are significant.
    "evaluation.samples": 5000,
    # Guidance may reduce diversity here; this is what is measured.
    "evaluation.collapse_share": 0.0,
}
STEPS = {"one-step": 1, "four-step": 4}
GUIDANCE = {
    "none": {},
    "lsg 1.5": {"guidance.preset": "lsg", "guidance.scale": 1.5},
    "lsg 3": {"guidance.preset": "lsg", "guidance.scale": 3.0},
    "zero-cfg": {"guidance.preset": "zero-cfg"},
    "anti-cfg": {"guidance.preset": "anti-cfg"},
}
# The generator's adversarial term joins after a tenth of the run; the discriminator learns from the first image.
# Scaling and weight are SiD-DiT's: with SiDA's weight there is no effect here.
REAL = ROOT / "configs" / "digits" / "digits.safetensors"
WEIGHT = 1.0


def adversarial(limit: int | None) -> dict[str, str]:
    some = f",limit={limit}" if limit else ""
    given = f"data='{REAL}',scaling='sid-dit',join_images=12800,generator_weight={WEIGHT}{some}"
    return {"adversarial": f"{{{given}}}"}


@dataclass(frozen=True)
class Row:
    preset: str
    guidance: str
    # None: data-free; 0: all real digits; otherwise this many.
    real: int | None

    @property
    def name(self) -> str:
        data = "free" if self.real is None else f"gan-{self.real}" if self.real else "gan"
        return f"{self.preset}-{self.guidance.replace(' ', '-').replace('.', '_')}-{data}"

    @property
    def data(self) -> str:
        return "none" if self.real is None else f"{self.real or 1797:,}"

    def settings(self) -> dict[str, object]:
        real = {} if self.real is None else adversarial(self.real)
        return COMMON | GUIDANCE[self.guidance] | real


# The most informative runs come first, for those who stop early.
ROWS = [Row(p, g, r) for r in (None, 0) for p in STEPS for g in GUIDANCE]
ROWS += [Row("four-step", g, 100) for g in ("none", "zero-cfg")]


def launch(row: Row, storage: Path) -> None:
    folder = storage / "runs" / row.name
    command = [POTSTILL, "launch", ROOT / "configs" / "digits" / f"{row.preset}.toml"]
    command += ["--workers", "2", "--storage", storage, "--run-id", row.name]
    for key, value in row.settings().items():
        command += ["--set", f"{key}={value}"]
    if any((folder / "checkpoints").glob("*/manifest.json")):
        command.append("--resume")
    elif folder.exists():
        # It was stopped before its first checkpoint: there is none to resume from.
        shutil.rmtree(folder)
    with open(storage / f"{row.name}.log", "ab") as log:
        subprocess.run([str(part) for part in command], stdout=log, stderr=log, check=True)


def scores(row: Row) -> dict | None:
    """The row's result, which is kept in the repository: the whole takes longer than a machine may be free."""
    path = PICTURES / f"{row.name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def keep(row: Row, storage: Path) -> None:
    """Keeps the result and the picture of a run that has ended."""
    folder = storage / "runs" / row.name
    summary = json.loads((folder / "summary.json").read_text())
    if summary["student"]["fid"] is None:
        sys.exit(f"{folder} has no FID")
    PICTURES.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "summary.json", PICTURES / f"{row.name}.json")
    shutil.copy(folder / "samples.png", PICTURES / f"{row.name}-samples.png")


def table(rows: list[Row], found: dict[Row, dict], teacher: dict) -> list[str]:
    lines = ["| steps | guidance | real digits | FID | agreement | recall | precision | diversity |"]
    lines.append("|---|---|---|---|---|---|---|---|")

    def line(first: str, s: dict) -> str:
        share = f"{s['agreement'] * 100:.1f} %"
        numbers = f"{s['fid']:.3f} | {share} | {s['recall']:.3f} | {s['precision']:.3f} | {s['diversity']:.2f}"
        return f"| {first} | {numbers} |"

    lines.append(line("teacher (35) | – | 1,797", teacher))
    for row in rows:
        if row in found:
            lines.append(line(f"{STEPS[row.preset]} | {row.guidance} | {row.data}", found[row]["student"]))
    return lines


def compare(found: dict[Row, dict], key: str, pairs: list[tuple[Row, Row]]) -> str:
    """In how many pairs the first has the greater value, and the mean difference."""
    differences = [found[a]["student"][key] - found[b]["student"][key] for a, b in pairs if a in found and b in found]
    if not differences:
        return "not measured"
    more = sum(d > 0 for d in differences)
    return f"{sum(differences) / len(differences):+.3f} on average, up in {more} of {len(differences)}"


def trends(found: dict[Row, dict]) -> list[str]:
    def pairs(change, keep=lambda row: True) -> list[tuple[Row, Row]]:
        return [(change(row), row) for row in ROWS if keep(row) and change(row) != row]

    to = lambda **new: lambda row: Row(**{**row.__dict__, **new})  # noqa: E731
    base = lambda row: row.guidance == "none" and row.real is None  # noqa: E731
    free = lambda row: row.real is None  # noqa: E731
    one = lambda row: row.preset == "one-step" and row.real != 100  # noqa: E731
    lines = ["| change | FID | agreement | recall | diversity |", "|---|---|---|---|---|"]
    for what, couples in [
        ("no guidance → lsg 1.5, data-free", pairs(to(guidance="lsg 1.5"), base)),
        ("no guidance → lsg 3, data-free", pairs(to(guidance="lsg 3"), base)),
        ("no guidance → zero-cfg, data-free", pairs(to(guidance="zero-cfg"), base)),
        ("no guidance → anti-cfg, data-free", pairs(to(guidance="anti-cfg"), base)),
        ("data-free → adversarial loss", pairs(to(real=0), free)),
        ("… with zero-cfg", pairs(to(real=0), lambda r: free(r) and r.guidance == "zero-cfg")),
        ("… with anti-cfg", pairs(to(real=0), lambda r: free(r) and r.guidance == "anti-cfg")),
        ("one step → four steps", pairs(to(preset="four-step"), one)),
        (
            "1,797 → 100 real digits",
            [(Row("four-step", g, 100), Row("four-step", g, 0)) for g in ("none", "zero-cfg")],
        ),
    ]:
        cells = [compare(found, key, couples) for key in ("fid", "agreement", "recall", "diversity")]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return lines


def write() -> None:
    found = {row: summary for row in ROWS if (summary := scores(row))}
    if not found:
        sys.exit(f"no results in {PICTURES}")
    teacher = next(iter(found.values()))["teacher"]
    marker = "<!-- everything below is written by scripts/bench/ablation.py -->"
    head = DOCUMENT.read_text().split(marker)[0] if DOCUMENT.exists() else "# Results on the digits\n\n"
    lines = [head + marker, ""]
    samples = next(iter(found.values()))["student"].get("samples", 5000)
    lines += [
        f"{len(found)} of {len(ROWS)} runs, {ITERATIONS:,} iterations each with a global batch of 128, two workers; scores on {samples}",
        "samples. One seed: differences in FID below about 0.03 say nothing.",
        "",
    ]
    lines += table(ROWS, found, teacher)
    lines += ["", "What each change does, over all pairs of rows that differ in it alone:", ""]
    lines += trends(found)
    lines += ["", "## Pictures", "", "Above: the teacher. Below: the student, same noise, same classes.", ""]
    for row in found:
        lines.append(f"**{STEPS[row.preset]} step(s), {row.guidance}, real digits: {row.data}**")
        lines += ["", f"![samples](results/{row.name}-samples.png)", ""]
    DOCUMENT.write_text("\n".join(lines))
    print(f"{DOCUMENT.relative_to(ROOT)}: {len(found)} of {len(ROWS)} runs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", type=Path, default=ROOT / "ablation")
    parser.add_argument("--only", default="", help="only runs whose names contain this")
    parser.add_argument("--report", action="store_true", help="only write the document again")
    arguments = parser.parse_args()
    prepare.programs()
    storage = arguments.storage.resolve()
    storage.mkdir(parents=True, exist_ok=True)
    rows = [row for row in ROWS if arguments.only in row.name]
    if not arguments.report:
        for number, row in enumerate(rows, 1):
            if scores(row) is None:
                started = time.monotonic()
                print(f"{number}/{len(rows)} {row.name} …", end=" ", flush=True)
                launch(row, storage)
                keep(row, storage)
                print(f"{time.monotonic() - started:.0f} s", flush=True)
    if len(rows) == len(ROWS):
        write()


if __name__ == "__main__":
    main()
