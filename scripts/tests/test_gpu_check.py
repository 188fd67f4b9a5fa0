"""The GPU check and its bundle, rehearsed on the CPU."""

import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
BENCH = ROOT / "scripts" / "bench"
sys.path.insert(0, str(BENCH))

import gpu_check  # noqa: E402


class Bundle(unittest.TestCase):
    """The bundle in a folder of its own, with an environment that knows nothing of the repository."""

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.folder.cleanup)
        cls.bundle = Path(cls.folder.name) / "gpu-bundle"
        # Quickly rather than well compressed.
        environment = os.environ | {"BUILT": "1", "XZ_OPT": "-0 -T0"}
        made = subprocess.run(
            [BENCH / "gpu_bundle.sh", cls.bundle], env=environment, capture_output=True, text=True, check=False
        )
        if made.returncode != 0:
            raise AssertionError(made.stderr)

    def check(self, *arguments):
        """The results of the check, by part."""
        known = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": self.folder.name}
        out = Path(self.folder.name) / "out"
        out.mkdir()
        done = subprocess.run(
            ["python3", self.bundle / "gpu_check.py", *arguments],
            cwd=self.folder.name,
            env=known | {"OUT": str(out)},
            capture_output=True,
            text=True,
            check=False,
        )
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertEqual((out / "results.jsonl").read_text(), done.stdout)
        self.assertTrue((out / "logs.tar.gz").exists())
        results = {}
        for result in map(json.loads, done.stdout.splitlines()):
            results.setdefault(result["part"], []).append(result)
        return results

    def test_it_measures_in_an_empty_folder(self):
        self.assertLess(sum(file.stat().st_size for file in self.bundle.iterdir()), 40e6)
        results = self.check("--rehearse", "--only", "nccl,sdxl")
        formed, again = results["nccl"]
        self.assertIn("libtorch_cpu.so", " ".join(formed["libraries"]))
        self.assertTrue(again["same_process"] and again["within_5_seconds"], again)
        ours, eager = results["sdxl"]
        for found in (ours, eager):
            self.assertTrue(found["finite"], found)
            self.assertGreater(found["tflops_per_second"], 0)
        self.assertEqual(ours["parameters"], eager["parameters"])
        self.assertGreater(ours["planned_peak"], 0)


class Check(unittest.TestCase):
    def test_without_a_gpu_it_says_so(self):
        if Path("/dev/nvidiactl").exists():
            self.skipTest("this machine has a GPU")
        done = subprocess.run([sys.executable, BENCH / "gpu_check.py"], capture_output=True, text=True, check=False)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("no CUDA device", done.stdout)

    def test_a_part_that_does_not_exist_is_named(self):
        done = subprocess.run(
            [sys.executable, BENCH / "gpu_check.py", "--only", "sdxl,sd3"], capture_output=True, text=True, check=False
        )
        self.assertEqual(done.returncode, 2)
        self.assertIn("no such part: sd3", done.stderr)

    def test_every_part_has_its_work_and_its_time(self):
        self.assertEqual(set(gpu_check.PARTS), set(gpu_check.WORK))
        self.assertEqual(set(gpu_check.PARTS), set(gpu_check.NEEDS))

    def test_operations_of_an_iteration(self):
        flops = {"forward": 1, "trained": 2, "frozen": 1}
        # By hand: 1 + 2 + 4 of the fake score's phase; 1 + 2 + 2 forward and 2 + 2 + 2 backward of the generator's.
        self.assertEqual(gpu_check.operations(flops, 1, recompute=True, adapters=False), (18, 25))
        self.assertEqual(gpu_check.operations(flops, 2, recompute=False, adapters=False), (36, 36))
        # Weights that do not train take no gradient.
        self.assertEqual(gpu_check.operations(flops, 1, recompute=False, adapters=True), (15, 15))


if __name__ == "__main__":
    unittest.main()
