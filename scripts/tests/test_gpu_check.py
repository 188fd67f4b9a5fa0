"""The GPU check, rehearsed on the CPU."""

import subprocess
import sys
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


class GpuCheck(unittest.TestCase):
    def test_every_step_works_with_a_tiny_network(self):
        done = subprocess.run(
            [sys.executable, str(ROOT / "scripts/bench/gpu_check.py"), "--rehearse"], capture_output=True, text=True, check=False
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("whole iteration", done.stdout)
        self.assertIn("generators apart by", done.stdout)

    def test_without_a_gpu_it_says_so(self):
        if Path("/dev/nvidiactl").exists():
            self.skipTest("this machine has a GPU")
        done = subprocess.run([sys.executable, str(ROOT / "scripts/bench/gpu_check.py")], capture_output=True, text=True, check=False)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("no CUDA device", done.stdout)


if __name__ == "__main__":
    unittest.main()
