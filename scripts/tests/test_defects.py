"""Each known defect has its place in the coordinator's source, so that scripts/bench/defects.py can put it back."""

from __future__ import annotations

import sys
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "bench"))

import defects  # noqa: E402


class Places(unittest.TestCase):
    def test_each_defect_has_one_place(self) -> None:
        for defect in defects.DEFECTS:
            with self.subTest(defect.name):
                self.assertEqual((ROOT / defect.path).read_text().count(defect.old), 1)


if __name__ == "__main__":
    unittest.main()
