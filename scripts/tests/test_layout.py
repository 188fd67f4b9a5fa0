"""No import circles between the files of a crate, and no arrow upwards between the folders of worker/src."""

from __future__ import annotations

import re
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# From the top of the stair downwards; worker/src/lib.rs says what each is.
STAIR = ["commands", "training", "evaluation", "model", "checkpoint", "session", "data", "process"]


def split(text: str) -> list[str]:
    """The parts of a brace's inside, by commas outside of inner braces."""
    parts, depth, part = [], 0, ""
    for character in text:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += character
    return [*parts, part.strip()] if part.strip() else parts


def expand(path: str) -> list[str]:
    """`a::{b, c::d}` as `a::b` and `a::c::d`."""
    before, brace, inside = path.strip().partition("{")
    if not brace:
        return [path.strip()]
    return [before + one for part in split(inside.rstrip()[:-1]) for one in expand(part)]


class Crate:
    """The modules of one crate, what each defines, and what each names of the others."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.files: dict[str, Path] = {}
        for file in sorted(source.rglob("*.rs")):
            name = "::".join(file.relative_to(source).with_suffix("").parts).removesuffix("::mod")
            self.files.setdefault("" if name in ("lib", "main", "mod") else name, file)
        self.text = {module: self.without_tests(file) for module, file in self.files.items()}
        self.defines = {
            module: set(re.findall(r"\b(?:fn|struct|enum|trait|const|type|static|union)\s+([A-Za-z_]\w*)", text))
            | set(re.findall(r"macro_rules!\s*(\w+)", text))
            for module, text in self.text.items()
        }
        self.doors: dict[str, list[str]] = {}
        self.names: dict[str, list[str]] = {}
        for module, text in self.text.items():
            self.doors[module], self.names[module] = [], []
            for public, path in re.findall(r"\b(pub(?:\([^)]*\))? )?use ([^;]*);", text):
                whole = expand(re.sub(r"\s+", " ", path))
                (self.doors if public else self.names)[module] += whole
            body = re.sub(r"\buse [^;]*;", "", text)
            self.names[module] += re.findall(r"(?<![\w:])((?:crate|super|self)(?:::\w+)+)", body)
            below = f"{module}::" if module else ""
            for first, rest in re.findall(r"(?<![\w:.])([a-z_]\w*)((?:::\w+)+)", body):
                if below + first in self.files:
                    self.names[module].append(f"self::{first}{rest}")

    @staticmethod
    def without_tests(file: Path) -> str:
        text = re.sub(r"//[^\n]*", "", file.read_text())
        return re.split(r"#\[cfg\(test\)\]\s*(?:pub(?:\([^)]*\))? )?mod tests \{", text)[0]

    def place(self, module: str, path: str) -> list[str] | None:
        """A path from the crate's root; none for one of another crate."""
        here, parts = (module.split("::") if module else []), path.split("::")
        if parts[0] == "crate":
            return parts[1:]
        if parts[0] == "self":
            return here + parts[1:]
        if parts[0] == "super":
            while parts and parts[0] == "super":
                here, parts = here[:-1], parts[1:]
            return here + parts
        return here + parts if "::".join([*here, parts[0]]) in self.files else None

    def resolve(self, module: str, path: str, depth: int = 0) -> str | None:
        """The module that defines what a path names, through the doors on the way."""
        place = self.place(module, path)
        if place is None or depth > 6:
            return None
        for length in range(len(place), -1, -1):
            found = "::".join(place[:length])
            if found not in self.files:
                continue
            if length == len(place) or place[length] in self.defines[found] | {"self", "*"}:
                return found
            for door in self.doors[found] + self.names[found]:
                target, _, other = door.partition(" as ")
                if (other or target).split("::")[-1] == place[length] and self.place(found, target) is not None:
                    return self.resolve(found, target, depth + 1) or found
            return found
        return None

    def arrows(self) -> dict[str, set[str]]:
        """Which module uses which."""
        found = {}
        for module, paths in self.names.items():
            targets = {self.resolve(module, path.partition(" as ")[0]) for path in paths}
            found[module] = {target for target in targets if target is not None and target != module}
        return found

    def circles(self) -> list[list[str]]:
        """Groups of files that use each other, directly or by way of others."""
        arrows = self.arrows()

        def reach(start: str) -> set[str]:
            seen, waiting = set(), list(arrows[start])
            while waiting:
                module = waiting.pop()
                if module not in seen:
                    seen.add(module)
                    waiting += arrows[module]
            return seen

        reached = {module: reach(module) for module in arrows}
        groups = {
            frozenset(other for other in reached[module] if module in reached[other])
            for module in arrows
            if module in reached[module]
        }
        return sorted(sorted(str(self.files[m].relative_to(ROOT)) for m in group) for group in groups)


class Layout(unittest.TestCase):
    def test_no_file_of_a_crate_uses_one_that_uses_it(self):
        crates = sorted(file.parent / "src" for file in ROOT.glob("*/**/Cargo.toml") if (file.parent / "src").is_dir())
        crates = [crate for crate in crates if not {"target", ".venv"} & set(crate.relative_to(ROOT).parts)]
        self.assertGreater(len(crates), 10)
        circles = [circle for crate in crates for circle in Crate(crate).circles()]
        self.assertEqual(circles, [])

    def test_the_folders_of_the_worker_are_a_stair(self):
        crate = Crate(ROOT / "worker/src")
        folders = {module.split("::")[0] for module in crate.files} - {""}
        self.assertEqual(folders, set(STAIR))
        upwards = [
            f"{module} uses {target}"
            for module, targets in crate.arrows().items()
            for target in targets
            if module and target
            if STAIR.index(module.split("::")[0]) > STAIR.index(target.split("::")[0])
        ]
        self.assertEqual(upwards, [])

    def test_circles_and_doors_are_seen(self):
        """The check itself, on a crate that has a circle through a door."""
        import tempfile

        with tempfile.TemporaryDirectory(dir=ROOT / "target" if (ROOT / "target").is_dir() else ROOT) as folder:
            source = Path(folder) / "src"
            (source / "a").mkdir(parents=True)
            (source / "lib.rs").write_text("mod a;\nmod b;\n")
            (source / "a/mod.rs").write_text("mod inner;\npub use self::inner::Thing;\n")
            (source / "a/inner.rs").write_text("use crate::b::{self, Other as Same};\npub struct Thing;\n")
            (source / "b.rs").write_text("use crate::a::Thing;\npub struct Other(Thing);\n")
            circles = Crate(source).circles()
            self.assertEqual([[Path(file).name for file in circle] for circle in circles], [["inner.rs", "b.rs"]])


if __name__ == "__main__":
    unittest.main()
