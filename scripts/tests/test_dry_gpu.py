"""Runs on GPUs that compute nothing: all that ranks do on the host for a GPU, on a machine that has none."""

import json
import subprocess
import sys
import tempfile
import unittest
import unittest.mock
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
POTSTILL = ROOT / "target" / "debug" / "potstill"
sys.path[:0] = [str(ROOT / "scripts" / "dry_gpu"), str(ROOT / "scripts" / "bench")]

import dry_gpu  # noqa: E402
import dry_sizes  # noqa: E402

DIGITS, SHAPES = "digits/one-step.toml", "shapes/one-step.toml"
BF16 = {"distillation.precision": "bf16", "memory.bf16_weights": "true"}
# Of a rank in an iteration, at most: for the sums of each phase, for the norm of each gradient, and for what other ranks ask.
WAITS = 5


class DryGpu(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.runs = 0

    def launch(
        self, config: str, ranks: int, iterations: int, settings: dict, environment: dict | None = None
    ) -> subprocess.CompletedProcess:
        log = self.folder / "log"
        log.unlink(missing_ok=True)
        command = [POTSTILL, "launch", ROOT / "configs" / config, "--workers", ranks, "--device", "cuda"]
        self.runs += 1
        command += ["--storage", self.folder / "store", "--run-id", f"run-{self.runs}", "--threads", 1]
        settings = {
            "distillation.iterations": iterations,
            "checkpoint.every": 1000,
            "evaluation.every": "none",
            "evaluation.features": "none",
            "evaluation.reference": "none",
        } | settings
        for key, value in settings.items():
            command += ["--set", f"{key}={value}"]
        return subprocess.run(
            [str(part) for part in command],
            capture_output=True,
            text=True,
            check=False,
            env=dry_gpu.environment(log, ranks) | (environment or {}),
        )

    def run_it(
        self, config: str, ranks: int, iterations: int, settings: dict, environment: dict | None = None
    ) -> Counter:
        """What its ranks have counted together."""
        done = self.launch(config, ranks, iterations, settings, environment)
        self.assertEqual(done.returncode, 0, done.stderr)
        found = dry_gpu.counts(self.folder / "log")
        self.assertEqual(len(found), ranks, "each rank has used a GPU")
        return sum((Counter(rank["counts"]) for rank in found), Counter())

    def of_an_iteration(self, config: str, ranks: int, settings: dict) -> dict[str, float]:
        """What a rank does in each iteration, by the difference of two runs."""
        few, many = 3, 6
        first, second = (self.run_it(config, ranks, count, settings) for count in (few, many))
        return {name: (second[name] - first[name]) / (many - few) / ranks for name in second}

    def test_the_host_waits_for_the_device_only_where_it_needs_numbers(self):
        for config, settings in (
            (SHAPES, {}),
            (SHAPES, BF16 | {"memory.recompute": "true"}),
            ("digits/four-step-gan.toml", {}),
        ):
            with self.subTest(config=config, settings=settings):
                found = self.of_an_iteration(config, 1, settings)
                self.assertGreater(found["kernels"], 1000)
                self.assertLessEqual(found["waits"], WAITS, found)

    def test_micro_batches_are_recorded_and_replayed(self):
        for config, kinds, settings in (
            (DIGITS, 2, {}),
            (SHAPES, 2, BF16 | {"memory.recompute": "true"}),
            (SHAPES, 2, {"distillation.precision": "fp16", "memory.shard": "optimizer"}),
            ("shapes/four-step-lora.toml", 2 * 4, {"distillation.precision": "bf16"}),
        ):
            with self.subTest(config=config, settings=settings):
                ranks = 2 if "memory.shard" in settings else 1
                plain = self.of_an_iteration(config, ranks, settings)
                settings |= {"distillation.cuda_graphs": "true"}
                recorded = self.run_it(config, ranks, 6, settings)
                self.assertEqual([name for name in recorded if "forbidden" in name], [])
                # A copy from the host would be made again from memory that has other numbers.
                self.assertEqual([name for name in recorded if name.startswith("captured: copies to the device")], [])
                self.assertEqual(recorded["tensors that a replay overwrites"], 0)
                self.assertGreater(recorded["captured: kernels"], 500)
                self.assertGreater(recorded["graph launches"], ranks * kinds)
                self.assertIn(recorded["captures"], range(2 * ranks, ranks * kinds + 1))
                if kinds == 2:
                    found = self.of_an_iteration(config, ranks, settings)
                    self.assertGreater(found["graph launches"], 0)
                    self.assertLess(found["kernels"] + found["matrix products"], plain["kernels"] / 10)

    def test_what_cannot_be_recorded_is_computed(self):
        settings = {"distillation.cuda_graphs": "true"}
        # It fails in the forward pass, in the backward pass, and where gradients are added up.
        for config, records in ((SHAPES, 300), (SHAPES, 700), (SHAPES, 900), (SHAPES, 1100), (SHAPES, 1500), (DIGITS, 500)):
            with self.subTest(config=config, records=records):
                dropout = {"distillation.dropout": "true"} if config == DIGITS else {}
                found = self.run_it(config, 1, 3, settings | dropout, {"DRY_GPU_RECORDS": str(records)})
                # Nothing is recorded after the first failure.
                self.assertEqual(found["captures"], found["graph launches"] + 1)
                self.assertGreater(found["kernels"], 3 * 3000)

    def test_a_generation_leaves_no_memory_behind(self):
        settings = {"distillation.cuda_graphs": "true", "memory.shard": "none"}
        one = self.run_it(SHAPES, 1, 6, settings)
        torn = {"POTSTILL_FAULT": ";".join(f"tear:agreed:{at}:0:{self.folder}/torn-{at}" for at in range(1, 5))}
        several = self.run_it(SHAPES, 1, 6, settings, torn)
        self.assertGreater(several["captures"], 3 * one["captures"])
        self.assertLess(several["bytes at most"], one["bytes at most"] + (64 << 20))

    def test_a_preset_takes_the_memory_that_its_plan_says(self):
        found = dry_sizes.measure("sd15", self.folder, measured=2)
        self.assertAlmostEqual(found["tensors"] / found["planned"], 1, delta=0.05)
        self.assertLess(found["taken"], 1.05 * found["tensors"])
        self.assertGreater(found["launches"], 10_000)
        # Hardly any activations: casts of weights that outlive their use would show.
        small = {"memory.recompute": "true", "teacher.image_size": "[64,64]", "distillation.micro_batch": 1}
        found = dry_sizes.measure("sd15", self.folder, small | {"distillation.global_batch": 1}, measured=2)
        self.assertAlmostEqual(found["tensors"] / found["planned"], 1, delta=0.05)

    def test_several_samples_of_sdxl_are_a_micro_batch(self):
        # Their sizes are one row, expanded.
        names = dry_sizes.NAMES | {"tiny": ("sdxl", "tiny-sdxl", True)}
        with unittest.mock.patch.object(dry_sizes, "NAMES", names):
            changes = {"distillation.micro_batch": 2, "distillation.global_batch": 4, "distillation.cuda_graphs": "true"}
            found = dry_sizes.measure("tiny", self.folder, changes | {"lora.rank": 4}, measured=2)
        self.assertGreater(found["graph launches"], 1)

    def test_the_gpu_check_runs(self):
        command = [sys.executable, ROOT / "scripts/bench/gpu_check.py", "--rehearse", "cuda"]
        command += ["--only", "nccl,recovery,graphs"]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env=dry_gpu.environment(self.folder / "log"),
        )
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        of = {part: [result for result in results if result["part"] == part] for part in ("nccl", "recovery", "graphs")}
        libraries, again = of["nccl"]
        self.assertIn("libtorch_cuda", " ".join(libraries["libraries"]))
        self.assertTrue(again["same_process"], again)
        self.assertEqual({result["run"] for result in of["recovery"]}, {"rank-dies", "coordinator-dies", "all-die"})
        self.assertTrue(all(result.get("recorded", True) for result in of["graphs"]), of["graphs"])

    def test_ranks_divide_the_state(self):
        for shard in ("none", "optimizer", "gradients", "parameters"):
            with self.subTest(shard=shard):
                settings = BF16 | {"memory.shard": shard, "memory.recompute": "true", "checkpoint.every": 1}
                found = self.run_it(SHAPES, 2, 2, settings)
                self.assertGreater(found["collectives"], 0)

    def test_the_average_may_lie_on_the_host(self):
        found = self.run_it(SHAPES, 1, 2, {"memory.offload_ema": "true"})
        self.assertGreater(found["waits: device"], 0)

    def test_a_feature_extractor_is_called_without_a_compiler(self):
        settings = {"evaluation.features": "features.pt", "evaluation.reference": "shapes.safetensors"}
        done = self.launch(SHAPES, 1, 1, settings | {"evaluation.every": "1"})
        # It is called, and what nothing has computed is refused.
        self.assertIn("has the same features for different images", done.stderr)


if __name__ == "__main__":
    unittest.main()
