"""What the documents cite exists: files, links, tests."""

from __future__ import annotations

import re
import subprocess
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# Folders of the repository at which a cited path begins.
ROOMS = "spec|proto|storage|coordinator|worker|configs|scripts|tests|docs"
# Where a document may leave out the beginning of a path.
SHORT = {"distill/": "worker/distill/src/", "models/": "worker/models/src/"}
# Longest line of prose; tables, links and code may be longer.
WIDTH = 120


def documents() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split()]


def sources() -> str:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.rs", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return "\n".join((ROOT / name).read_text() for name in listed.split() if (ROOT / name).exists())


def alternatives(path: str) -> list[str]:
    """`a/{b,c}.rs` as `a/b.rs` and `a/c.rs`."""
    found = re.search(r"\{([^{}]*)\}", path)
    if not found:
        return [path]
    return [one for inner in found[1].split(",") for one in alternatives(path.replace(found[0], inner.strip(), 1))]


class Documents(unittest.TestCase):
    def test_cited_files_exist(self):
        missing = []
        for document in documents():
            text = document.read_text()
            for cited in re.findall(rf"`((?:{ROOMS})/[\w./{{}},*-]*)`", text):
                for path in alternatives(cited):
                    if not any(ROOT.glob(path.rstrip("/"))) and not path.startswith(("configs/", "tests/fixtures")):
                        missing.append(f"{document.relative_to(ROOT)}: {path}")
        self.assertEqual(sorted(set(missing)), [])

    def test_links_lead_somewhere(self):
        broken = []
        for document in documents():
            for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text()):
                if "://" not in target and not target.startswith("mailto:"):
                    if not (document.parent / target).exists():
                        broken.append(f"{document.relative_to(ROOT)}: {target}")
        self.assertEqual(broken, [])

    def test_cited_tests_exist(self):
        source, missing = sources(), []
        for document in documents():
            # A test's name is a sentence: four words at least. Those of metrics, which tests compare too, begin otherwise.
            for name in re.findall(r"`(?!potstill_)([a-z0-9]+(?:_[a-z0-9]+){3,})`", document.read_text()):
                if not re.search(rf"\b{name}\b", source):
                    missing.append(f"{document.relative_to(ROOT)}: {name}")
        self.assertEqual(sorted(set(missing)), [])

    def test_lines_of_prose_are_short(self):
        long = []
        for document in documents():
            if document.name in {"configuration.md"}:
                continue
            code = False
            for number, line in enumerate(document.read_text().splitlines(), 1):
                if line.lstrip().startswith("```"):
                    code = not code
                if len(line) > WIDTH and not code and not line.lstrip().startswith(("|", "![", "<", "[")) and "](" not in line:
                    long.append(f"{document.relative_to(ROOT)}:{number}: {len(line)} characters")
        self.assertEqual(long, [])


if __name__ == "__main__":
    unittest.main()
