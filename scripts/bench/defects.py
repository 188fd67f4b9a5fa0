"""Puts known defects back into the coordinator, one at a time, and says which world of the simulator finds each.

    python scripts/bench/defects.py [--seeds 5000] [--only WORDS]

Works in a copy under target/defects. Prints a Markdown table, a row as soon as it is known; exits with 1 when a defect is
found by no seed, or when the code without a defect fails.
"""

import argparse
import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
CORE = "coordinator/core/src/"
RUN = CORE + "run/"


@dataclasses.dataclass(frozen=True)
class Defect:
    """A change of one place in the source: `old`, which occurs there once, becomes `new`."""

    name: str
    path: str
    old: str
    new: str


DEFECTS = [
    Defect(
        "one rank's word makes a checkpoint count as damaged",
        RUN + "newcomers.rs",
        "        if self.ledger.knows(manifest_key) {\n",
        "        if self.ledger.mark_damaged(manifest_key) {\n",
    ),
    Defect(
        "workers whose storage is another are not sent away",
        RUN + "ending.rs",
        "            self.send_away(stream, reason, actions);\n",
        "            log(actions, reason);\n",
    ),
    Defect(
        "a run whose checkpoints are gone begins again from the teacher",
        RUN + "mod.rs",
        "from_teacher: from_teacher || !(was_saved || saved > 0),",
        "from_teacher: from_teacher || !was_saved || saved > 0 || true,",
    ),
    Defect(
        "a checkpoint is committed before every rank's shard is there",
        CORE + "ledger.rs",
        ".len() == self.world_size as usize;\n        if !complete",
        ".len() + 1 >= self.world_size as usize;\n        if !complete",
    ),
    Defect(
        "an older checkpoint whose answer comes after a newer one's is forgotten",
        CORE + "ledger.rs",
        "        if let Err(place) = self.committed.binary_search_by_key(",
        "        if !self.has(iteration) && let Err(place) = self.committed.binary_search_by_key(",
    ),
    Defect(
        "before the first iteration, workers that cannot reach the others are never left out",
        RUN + "newcomers.rs",
        "if self.failed_starts < FAILED_WITH_ALL ||",
        "if true || self.failed_starts < FAILED_WITH_ALL ||",
    ),
    Defect(
        "newcomers and others that cannot reach the rest are never left out",
        CORE + "membership.rs",
        "            self.barred.insert((until, stream));\n            self.eligible.remove(&stream);\n",
        "            self.barred.insert((until, stream));\n",
    ),
    Defect(
        "a newcomer's failure ends the run",
        RUN + "messages.rs",
        "        if place.is_none() || (new && place == Some(generation)) {\n"
        "            self.send_away(stream, reason, actions);\n"
        "        } else if place == Some(generation) {\n",
        "        if place.is_none() || place == Some(generation) {\n",
    ),
    Defect(
        "a state is believed from workers that never had a place",
        RUN + "attach.rs",
        ".take_if(|_| !self.placed.contains(&hello.worker))",
        ".take_if(|_| false && self.placed.contains(&hello.worker))",
    ),
    Defect(
        "a worker may claim the place of another",
        RUN + "attach.rs",
        "claimed.filter(|place| self.owns(&hello.worker, *place))",
        "claimed.filter(|place| self.owns(&hello.worker, *place) || place.rank < u32::MAX)",
    ),
    Defect(
        "receipts of iterations beyond the run count",
        RUN + "messages.rs",
        "                    if iteration > last {\n",
        "                    if false && iteration > last {\n",
    ),
    Defect(
        "a receipt may name another rank than its sender's",
        CORE + "ledger.rs",
        "        if receipt.rank != rank {\n",
        "        if false && receipt.rank != rank {\n",
    ),
    Defect(
        "workers of another version take part",
        RUN + "attach.rs",
        "        if hello.protocol != PROTOCOL {\n",
        "        if false && hello.protocol != PROTOCOL {\n",
    ),
    Defect(
        "a rank that hangs is never ended",
        RUN + "hangs.rs",
        "        if training.look > now {\n",
        "        if true || training.look > now {\n",
    ),
    Defect(
        "what a worker that was taken for lost reports of its state is ignored",
        RUN + "messages.rs",
        "if member.place.or(member.hello.place).is_some_and(|place| place.generation == generation) {",
        "if rank.is_some() {",
    ),
    Defect(
        "ranks that found their state incomplete count as ranks that could not meet",
        RUN + "generations.rs",
        "        if cause == Cause::Incomplete {\n",
        "        if false && cause == Cause::Incomplete {\n",
    ),
    Defect(
        "of a state that is incomplete, other slices still count",
        RUN + "messages.rs",
        "        self.incomplete = generation;\n",
        "",
    ),
    Defect(
        "slices of the state are copied to no other rank",
        CORE + "assignment.rs",
        "        true => partners(&hosts),\n",
        "        true => vec![],\n",
    ),
    Defect(
        "survivors get no time to say what they hold",
        RUN + "generations.rs",
        "            Cause::Known if safe => self.terms.timeouts.heartbeat_millis / 4,\n",
        "            Cause::Known => 0,\n",
    ),
    Defect(
        "the next generation is opened while a checkpoint is read again",
        RUN + "generations.rs",
        "        if !self.doubted.is_empty() {\n            return true;\n",
        "        if !self.doubted.is_empty() {\n            return false;\n",
    ),
]


def copy(folder: pathlib.Path) -> None:
    """Copies the files that git knows, and new ones, into `folder`."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    for name in filter(None, listed):
        source, target = ROOT / name, folder / name
        if not source.is_file() or name.startswith(("tests/fixtures/", "configs/")):
            continue
        # Cargo builds again what is newer than its last build.
        if not target.is_file() or target.read_bytes() != source.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)


def worlds(folder: pathlib.Path, seeds: int) -> tuple[bool, str]:
    """Runs the worlds. Whether all went well, and what was found first."""
    done = subprocess.run(
        ["cargo", "test", "-q", "-p", "potstill-sim", "--test", "seeds", "whatever_goes_wrong"],
        cwd=folder,
        env=os.environ | {"POTSTILL_SIM_SEEDS": f"0..{seeds}", "RUSTFLAGS": "-A warnings"},
        capture_output=True,
        text=True,
    )
    printed = done.stdout + done.stderr
    if done.returncode == 0:
        return True, ""
    found = re.search(r"run\(Seed\((\d+)\)\) at \d+ ms: (.*)", printed)
    broken = re.search(r"(\d+) of \d+ worlds broke", printed)
    if found is None:
        raise SystemExit(f"{printed}\nthe worlds were not run: see above")
    # Without the count, the coordinator panicked in a later world.
    return False, f"{found[1]} | {broken[1] if broken else '–'} | {found[2][:110]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5000, help="worlds for each defect (default 5000)")
    parser.add_argument("--only", default="", help="only defects whose name contains these words")
    arguments = parser.parse_args()
    folder = ROOT / "target/defects/tree"
    os.environ["CARGO_TARGET_DIR"] = str(ROOT / "target/defects/build")
    copy(folder)
    well, first = worlds(folder, arguments.seeds)
    if not well:
        print(f"the code without a defect fails: {first}", file=sys.stderr)
        return 1
    print("| defect | first seed | worlds | what the simulator says |\n|---|---|---|---|", flush=True)
    missed = 0
    for defect in (defect for defect in DEFECTS if arguments.only in defect.name):
        path = folder / defect.path
        sound = path.read_text()
        if sound.count(defect.old) != 1:
            raise SystemExit(f"{defect.path} does not contain the place of {defect.name!r} once: adapt this script")
        path.write_text(sound.replace(defect.old, defect.new))
        well, first = worlds(folder, arguments.seeds)
        path.write_text(sound)
        missed += well
        print(f"| {defect.name} | {'none | 0 | it is not found' if well else first} |", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
