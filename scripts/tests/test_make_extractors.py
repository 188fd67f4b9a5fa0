"""The extractors' TorchScript files against the packages whose networks they hold, with random weights."""

import contextlib
import importlib.util
import io
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))
import make_extractors  # noqa: E402

FOUND = {name: importlib.util.find_spec(name) is not None for name in ("torch_fidelity", "transformers")}


def run(*arguments: str) -> tuple[int, str]:
    """Exit code and output; in this process, because libtorch takes seconds to load."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        return make_extractors.main(list(arguments)), said.getvalue()


class Case(unittest.TestCase):
    def setUp(self) -> None:
        torch.manual_seed(0)
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def make(self, *arguments: str) -> torch.jit.ScriptModule:
        out = self.folder / "made.pt"
        code, said = run(*arguments, "--out", str(out))
        self.assertEqual(code, 0, said)
        module = torch.jit.load(out)
        self.assertNotIn('value="cpu"', str(module.inlined_graph), "bound to the CPU")
        return module

    def refused(self, says: str, *arguments: str) -> None:
        code, said = run(*arguments, "--out", str(self.folder / "refused.pt"))
        self.assertEqual(code, 1)
        self.assertIn(says, said)
        self.assertFalse((self.folder / "refused.pt").exists())

    def close(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        self.assertEqual(found.shape, expected.shape)
        self.assertGreater(expected.std().item(), 1e-2, "nothing to compare")
        self.assertLessEqual((found - expected).abs().max().item(), 1e-4 * expected.abs().max().item())


@unittest.skipUnless(FOUND["torch_fidelity"], "torch-fidelity is not installed (requirements-test.txt)")
class Inception(Case):
    def network(self) -> torch.nn.Module:
        """The package's network with random weights whose activations neither vanish nor grow; also as a file."""
        from torch_fidelity import feature_extractor_inceptionv3 as package

        kind = package.FeatureExtractorInceptionV3
        with (
            mock.patch.object(package, "load_state_dict_from_url", lambda *_args, **_kwargs: None),
            mock.patch.object(kind, "load_state_dict", lambda *_args: None),
        ):
            network = kind("inception-v3-compat", ["2048", "logits"])
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        torch.save(network.state_dict(), self.folder / "weights.pth")
        return network

    def test_features_and_logits_are_the_packages_for_any_number_and_size_of_images(self) -> None:
        network = self.network()
        made = self.make("inception", "--weights", str(self.folder / "weights.pth"))
        more = ["--resize", "pytorch", "--features-only"]
        half_pixel = self.make("inception", "--weights", str(self.folder / "weights.pth"), *more)
        for count, height, width in [(1, 32, 32), (3, 64, 48), (2, 299, 299)]:
            images = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)
            with torch.no_grad():
                found = made(images / 127.5 - 1)
                expected = network(images)
                other = half_pixel(images / 127.5 - 1)
            self.assertEqual(other.shape, (count, 2048))
            self.assertEqual([x.shape for x in found], [(count, 2048), (count, 1008)])
            for a, b in zip(found, expected):
                self.close(a, b)
            if height != 299:
                self.assertGreater((other - expected[0]).abs().max().item(), 1e-3, "another way to resize")

    def test_other_weights_are_refused(self) -> None:
        path = self.folder / "weights.pth"
        torch.save({"fc.weight": torch.zeros(2, 2)}, path)
        self.refused("not the weights of FID's InceptionV3", "inception", "--weights", str(path))
        path.write_bytes(b"nothing")
        self.refused("cannot be read", "inception", "--weights", str(path))
        self.refused("cannot be read", "inception", "--weights", str(self.folder / "none.pth"))


@unittest.skipUnless(FOUND["transformers"], "transformers is not installed (requirements-test.txt)")
class Clip(Case):
    START, END, TOKENS = 298, 299, 20

    def model(self) -> torch.nn.Module:
        from transformers import CLIPConfig, CLIPModel

        both = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        text = {"vocab_size": 300, "max_position_embeddings": self.TOKENS}
        text |= {"bos_token_id": self.START, "eos_token_id": self.END}
        vision = {"image_size": 28, "patch_size": 7}
        config = CLIPConfig(text_config={**both, **text}, vision_config={**both, **vision}, projection_dim=24)
        model = CLIPModel(config).eval()
        model.save_pretrained(self.folder / "model")
        return model

    def tokens(self, lengths: list[int]) -> torch.Tensor:
        """Prompts of this many tokens between start and end token, padded with the latter."""
        ids = torch.full((len(lengths), self.TOKENS), self.END)
        ids[:, 0] = self.START
        for row, length in zip(ids, lengths):
            row[1 : length + 1] = torch.randint(0, self.START, (length,))
        return ids

    def compare(self, made: torch.jit.ScriptModule, model: torch.nn.Module, images, ids, expected_ids) -> None:
        from transformers import CLIPImageProcessor

        constants = CLIPImageProcessor()
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (constants.image_mean, constants.image_std))
        with torch.no_grad():
            found = made(images, ids)
            small = torch.nn.functional.interpolate(images, (28, 28), mode="bicubic", antialias=True)
            pixels = (((small + 1) / 2).clamp(0, 1) - mean) / std
            expected = model(input_ids=expected_ids, pixel_values=pixels)
        for a, b in zip(found, (expected.image_embeds, expected.text_embeds)):
            self.close(torch.nn.functional.normalize(a, dim=1), b)

    def test_embeddings_are_the_models_for_any_number_and_size_of_images(self) -> None:
        model = self.model()
        arguments = ["--model", str(self.folder / "model"), "--tokens", str(self.TOKENS), "--image-size", "64"]
        made = self.make("clip", *arguments)
        for lengths, side in [([4], 64), ([1, 7, 18], 28), ([0, 5], 100)]:
            ids = self.tokens(lengths)
            self.compare(made, model, torch.rand(len(lengths), 3, side, side) * 2 - 1, ids, ids)

    def test_a_prefix_goes_behind_the_mark_of_the_start(self) -> None:
        from transformers import AutoTokenizer

        model, prefix = self.model(), [11, 12, 13]
        (self.folder / "model/tokenizer.json").write_text("{}")
        tokenizer = mock.Mock(return_value={"input_ids": [self.START, *prefix, self.END]})
        with mock.patch.object(AutoTokenizer, "from_pretrained", return_value=tokenizer):
            made = make_extractors.clip(self.folder / "model", "A photo depicts", self.TOKENS, 64)
        ids = self.tokens([3, 18])
        expected = torch.cat([ids[:, :1], torch.tensor([prefix, prefix]), ids[:, 1:]], dim=1)[:, : self.TOKENS]
        expected[:, -1] = self.END
        self.compare(made, model, torch.rand(2, 3, 64, 64) * 2 - 1, ids, expected)

    def test_a_folder_without_a_model_is_refused(self) -> None:
        self.refused("has no config.json", "clip", "--model", str(self.folder))
        (self.folder / "config.json").write_text('{"model_type": "clip"}')
        self.refused("cannot be loaded as a CLIPModel", "clip", "--model", str(self.folder))
        self.model()
        self.refused("--prefix needs the tokenizer", "clip", "--model", str(self.folder / "model"),
                     "--prefix", "A photo depicts", "--tokens", "20")


if __name__ == "__main__":
    unittest.main()
