"""The FID network against a plain reading of the published one, module by module, and what each protocol feeds it."""

from __future__ import annotations

from pathlib import Path

import little
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d, batch_norm, conv2d, max_pool2d, relu

from apexflow.errors import UserError
from apexflow.evaluation.features import FeatureStore
from apexflow.evaluation.inception import Inception, prepare, tensorflow_resize


class Plain:
    """Inception v3 as FID uses it, one line a layer, with its batch norms."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def conv(self, name: str, x: torch.Tensor, stride: int = 1, padding: int | tuple = 0) -> torch.Tensor:
        t = self.tensors
        x = conv2d(x, t[f"{name}.conv.weight"], None, stride, padding)
        norm = [t[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return relu(batch_norm(x, *norm, training=False, eps=0.001))

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        return avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)

    def a(self, root: str, x: torch.Tensor) -> torch.Tensor:
        five = self.conv(f"{root}branch5x5_2", self.conv(f"{root}branch5x5_1", x), 1, 2)
        double = self.conv(f"{root}branch3x3dbl_2", self.conv(f"{root}branch3x3dbl_1", x), 1, 1)
        double = self.conv(f"{root}branch3x3dbl_3", double, 1, 1)
        pool = self.conv(f"{root}branch_pool", self.mean(x))
        return torch.cat([self.conv(f"{root}branch1x1", x), five, double, pool], 1)

    def b(self, root: str, x: torch.Tensor) -> torch.Tensor:
        double = self.conv(f"{root}branch3x3dbl_2", self.conv(f"{root}branch3x3dbl_1", x), 1, 1)
        double = self.conv(f"{root}branch3x3dbl_3", double, 2)
        return torch.cat([self.conv(f"{root}branch3x3", x, 2), double, max_pool2d(x, 3, 2)], 1)

    def c(self, root: str, x: torch.Tensor) -> torch.Tensor:
        seven = self.conv(f"{root}branch7x7_2", self.conv(f"{root}branch7x7_1", x), 1, (0, 3))
        seven = self.conv(f"{root}branch7x7_3", seven, 1, (3, 0))
        double = self.conv(f"{root}branch7x7dbl_1", x)
        for number, padding in ((2, (3, 0)), (3, (0, 3)), (4, (3, 0)), (5, (0, 3))):
            double = self.conv(f"{root}branch7x7dbl_{number}", double, 1, padding)
        pool = self.conv(f"{root}branch_pool", self.mean(x))
        return torch.cat([self.conv(f"{root}branch1x1", x), seven, double, pool], 1)

    def d(self, root: str, x: torch.Tensor) -> torch.Tensor:
        three = self.conv(f"{root}branch3x3_2", self.conv(f"{root}branch3x3_1", x), 2)
        seven = self.conv(f"{root}branch7x7x3_2", self.conv(f"{root}branch7x7x3_1", x), 1, (0, 3))
        seven = self.conv(f"{root}branch7x7x3_4", self.conv(f"{root}branch7x7x3_3", seven, 1, (3, 0)), 2)
        return torch.cat([three, seven, max_pool2d(x, 3, 2)], 1)

    def e(self, root: str, x: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
        three = self.conv(f"{root}branch3x3_1", x)
        double = self.conv(f"{root}branch3x3dbl_2", self.conv(f"{root}branch3x3dbl_1", x), 1, 1)
        parts = [self.conv(f"{root}branch1x1", x)]
        for name, inputs in (("branch3x3_2", three), ("branch3x3dbl_3", double)):
            parts.append(self.conv(f"{root}{name}a", inputs, 1, (0, 1)))
            parts.append(self.conv(f"{root}{name}b", inputs, 1, (1, 0)))
        return torch.cat([*parts, self.conv(f"{root}branch_pool", pool)], 1)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv("Conv2d_2a_3x3", self.conv("Conv2d_1a_3x3", x, 2))
        x = max_pool2d(self.conv("Conv2d_2b_3x3", x, 1, 1), 3, 2)
        x = max_pool2d(self.conv("Conv2d_4a_3x3", self.conv("Conv2d_3b_1x1", x)), 3, 2)
        for letter in "bcd":
            x = self.a(f"Mixed_5{letter}.", x)
        x = self.b("Mixed_6a.", x)
        for letter in "bcde":
            x = self.c(f"Mixed_6{letter}.", x)
        x = self.d("Mixed_7a.", x)
        x = self.e("Mixed_7b.", x, self.mean(x))
        x = self.e("Mixed_7c.", x, max_pool2d(x, 3, 1, 1))
        return x.flatten(2).mean(2)


def test_features_agree_with_a_plain_reading() -> None:
    tensors = little.inception_tensors(8)
    pictures = torch.rand(2, 3, 299, 299) * 2 - 1
    torch.testing.assert_close(Inception(tensors).features(pictures), Plain(tensors)(pictures), rtol=1e-4, atol=1e-4)


def test_the_real_widths_give_2048_features() -> None:
    widths = little.inception_widths()
    network = Inception.__new__(Inception)
    network.device = torch.device("meta")
    network.weights = {
        name: (torch.empty(shape, device="meta"), torch.empty(shape[0], device="meta"))
        for name, shape in widths.items()
    }
    assert len(widths) == 94
    assert network.pool(torch.empty(1, 3, 299, 299, device="meta")).shape == (1, 2048)


def test_tensorflow_resize_takes_the_corner_not_the_centre() -> None:
    ramp = torch.arange(8.0).expand(3, 4, 8)
    assert tensorflow_resize(ramp, 4)[0, 0].tolist() == [0, 2, 4, 6]
    doubled = tensorflow_resize(ramp, 16)
    assert doubled.shape == (3, 16, 16) and doubled[0, 0, :4].tolist() == [0, 0.5, 1, 1.5]
    assert doubled[0, 0, -2:].tolist() == [7, 7]


def test_what_each_protocol_feeds_the_network() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    seen = {protocol: prepare(noise, protocol, 64) for protocol in ("sana", "clean", "torch-fidelity")}
    assert all(
        x.shape == (3, 299, 299) and x.dtype == torch.float32 and x.abs().max() < 1 + 1e-5 for x in seen.values()
    )
    assert all((seen["sana"] - seen[other]).abs().mean() > 0.05 for other in ("clean", "torch-fidelity"))
    white = Image.new("RGB", (64, 64), "white")
    torch.testing.assert_close(prepare(white, "sana", 64), torch.full((3, 299, 299), 1.0))
    torch.testing.assert_close(prepare(white, "clean", 64), torch.full((3, 299, 299), 127 / 128))


def test_damaged_features_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(bytes(40))
    with pytest.raises(UserError, match="is damaged"):
        FeatureStore(tmp_path).keys()
