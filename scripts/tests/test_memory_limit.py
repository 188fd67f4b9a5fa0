"""A run that no rank could hold whole, under a limit of memory that the whole state would break."""

import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
POTSTILL = ROOT / "target" / "debug" / "potstill"
sys.path.insert(0, str(ROOT / "scripts" / "bench"))

import gpu_models  # noqa: E402

# 23 million parameters: teacher, generator, fake score, average, two moments and two gradients are 8 × 91 MB, fp32.
WIDE = gpu_models.UNETS["tiny-sd15"] | {
    "block_out_channels": [64, 128, 256, 256],
    "attention_head_dim": 8,
    "norm_num_groups": 16,
}
# A process's data, in kilobytes (RLIMIT_DATA). One of four ranks with slices needs 0.66 to 0.70 GB, with what libtorch itself
# needs; with the whole average of a picture 0.80 GB; one that holds everything 1.43 GB.
LIMIT = 750_000


class MemoryLimit(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        gpu_models.UNETS["tiny-wide"] = WIDE
        self.addCleanup(gpu_models.UNETS.pop, "tiny-wide")
        tokenizer = ROOT / "configs" / "shapes" / "model" / "tokenizer"
        made = gpu_models.write("tiny-wide", self.folder / "model", "cpu", tokenizer)
        self.assertGreater(made["parameters"], 20e6)
        (self.folder / "prompts.txt").write_text("\n".join(gpu_models.PROMPTS))

    def launch(self, run: str, workers: int, iterations: int, shard: str, *flags: str) -> list[str]:
        """The command of a run whose processes have a limit of data."""
        settings = {
            "teacher.model": self.folder / "model",
            "prompts.data": self.folder / "prompts.txt",
            "distillation.iterations": iterations,
            "distillation.global_batch": 4,
            "distillation.micro_batch": 1,
            "memory.recompute": "true",
            "memory.shard": shard,
            "evaluation.teacher_steps": 2,
        }
        config = self.folder / "run.toml"
        config.touch()
        command = [POTSTILL, "launch", config, "--workers", str(workers), "--threads", "1", "--run-id", run]
        command += ["--storage", self.folder / "store", *flags]
        for key, value in settings.items():
            command += ["--set", f"{key}={value}"]
        return ["sh", "-c", f'ulimit -d {LIMIT} && exec "$0" "$@"', *map(str, command)]

    def test_slices_of_what_no_rank_can_hold_are_trained_saved_and_loaded(self):
        for command in (
            self.launch("divided", 4, 1, "parameters"),
            self.launch("divided", 4, 2, "parameters", "--resume"),
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            self.assertEqual(done.returncode, 0, done.stderr)
        # The limit is one: a rank that holds everything breaks it.
        done = subprocess.run(self.launch("whole", 1, 1, "none"), capture_output=True, text=True, check=False)
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("can't allocate memory", done.stderr)
