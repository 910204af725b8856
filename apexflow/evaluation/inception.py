"""The Inception network that FID is defined by, up to its 2048 pooled features, from a safetensors file.

The weights are those of TensorFlow's classifier of 2015-12-05 under the names of pytorch-fid's port
(pt_inception-2015-12-05-6726825d). Where that port differs from the Inception v3 of today, so does this: padding does
not count in average pooling, and the last block pools by maximum. The widths are read from the weights.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, interpolate, max_pool2d, relu

from apexflow.data.fingerprint import hash_tensors
from apexflow.errors import UserError
from apexflow.evaluation.fid import clean_resize, sana_resize

SIDE = 299
PROTOCOLS = ("sana", "clean", "torch-fidelity")
EPSILON = 1e-3  # of the batch norms

# A block is a list of branches whose results are joined; a branch is a chain of steps. A step is a pooling ("mean",
# "max", or "halve" for a maximum with stride 2), the name of a convolution, with ">" before it for one with stride 2 and
# no padding, or two names with "|" between for two convolutions side by side.
Block = tuple[str, ...]
WIDE: Block = (
    "branch1x1",
    "branch5x5_1 branch5x5_2",
    "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3",
    "mean branch_pool",
)
LONG: Block = (
    "branch1x1",
    "branch7x7_1 branch7x7_2 branch7x7_3",
    "branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 branch7x7dbl_4 branch7x7dbl_5",
    "mean branch_pool",
)
SPLIT: Block = (
    "branch1x1",
    "branch3x3_1 branch3x3_2a|branch3x3_2b",
    "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a|branch3x3dbl_3b",
)
BLOCKS: dict[str, Block] = {
    **dict.fromkeys(("Mixed_5b", "Mixed_5c", "Mixed_5d"), WIDE),
    "Mixed_6a": (">branch3x3", "branch3x3dbl_1 branch3x3dbl_2 >branch3x3dbl_3", "halve"),
    **dict.fromkeys(("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"), LONG),
    "Mixed_7a": (
        "branch3x3_1 >branch3x3_2",
        "branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 >branch7x7x3_4",
        "halve",
    ),
    "Mixed_7b": (*SPLIT, "mean branch_pool"),
    "Mixed_7c": (*SPLIT, "max branch_pool"),
}
STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")


class Inception:
    """Pictures as `prepare` makes them, (B, 3, 299, 299), to features (B, D); D is 2048 with the real weights."""

    def __init__(self, tensors: dict[str, Tensor], device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        names = [*STEM, *(f"{block}.{name}" for block, branches in BLOCKS.items() for name in _convolutions(branches))]
        self.weights = {name: _folded(tensors, name, self.device) for name in names}

    @classmethod
    def load(cls, path: Path, device: str | torch.device = "cpu") -> Inception:
        """From a safetensors file, or a folder that holds one. UserError when it is no FID Inception."""
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if len(files) != 1 or files[0].suffix != ".safetensors":
            raise UserError(f"{path} is not one safetensors file: docs/evaluation.md says how to make it")
        try:
            return cls(load_file(files[0]), device)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {files[0]} ({error}): convert it again") from None
        except KeyError as error:
            raise UserError(f"{files[0]} lacks {error}: it is not the FID Inception of docs/evaluation.md") from None

    def fingerprint(self) -> str:
        """A short hash of the weights."""
        return hash_tensors({name: weight for name, (weight, _) in self.weights.items()})

    @torch.inference_mode()
    def features(self, pictures: Tensor) -> Tensor:
        """(B, 3, 299, 299) to (B, D) float32 on the CPU."""
        return self.pool(pictures.to(self.device)).float().cpu()

    def pool(self, x: Tensor) -> Tensor:
        """The network itself, on its device."""
        x = self._convolve("Conv2d_1a_3x3", x, stride=2, padded=False)
        x = self._convolve("Conv2d_2a_3x3", x, padded=False)
        x = max_pool2d(self._convolve("Conv2d_2b_3x3", x), 3, 2)
        x = self._convolve("Conv2d_4a_3x3", self._convolve("Conv2d_3b_1x1", x), padded=False)
        x = max_pool2d(x, 3, 2)
        for block, branches in BLOCKS.items():
            x = torch.cat([self._branch(block, branch, x) for branch in branches], dim=1)
        return x.mean(dim=(2, 3))

    def _branch(self, block: str, branch: str, x: Tensor) -> Tensor:
        for step in branch.split():
            x = self._step(block, step, x)
        return x

    def _step(self, block: str, step: str, x: Tensor) -> Tensor:
        if step == "mean":
            return avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        if step == "max":
            return max_pool2d(x, 3, 1, 1)
        if step == "halve":
            return max_pool2d(x, 3, 2)
        if step.startswith(">"):
            return self._convolve(f"{block}.{step[1:]}", x, stride=2, padded=False)
        return torch.cat([self._convolve(f"{block}.{name}", x) for name in step.split("|")], dim=1)

    def _convolve(self, name: str, x: Tensor, stride: int = 1, padded: bool = True) -> Tensor:
        weight, bias = self.weights[name]
        padding = tuple(side // 2 for side in weight.shape[2:]) if padded else 0
        return relu(conv2d(x, weight, bias, stride, padding))


def _convolutions(branches: Block) -> list[str]:
    steps = " ".join(branches).replace("|", " ").replace(">", "").split()
    return [step for step in steps if step not in ("mean", "max", "halve")]


def _folded(tensors: dict[str, Tensor], name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """A convolution and the batch norm after it as one weight and bias."""
    parts = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    weight, scale, shift, mean, variance = (tensors[f"{name}.{part}"].double() for part in parts)
    scale = scale / (variance + EPSILON).sqrt()
    return (weight * scale.view(-1, 1, 1, 1)).float().to(device), (shift - mean * scale).float().to(device)


def prepare(image: Image.Image, protocol: str, size: int) -> Tensor:
    """(3, 299, 299) float32, what the network sees of a picture under a protocol. `size` matters to sana alone.

    sana: resized and cropped to size by pillow, stretched to 299 without antialiasing, 2 x - 1. clean: clean-fid's
    resize of the whole picture, (x - 128) / 128. torch-fidelity: TensorFlow 1's bilinear resize, (x - 128) / 128.
    """
    if protocol == "clean":
        return (_tensor(clean_resize(image, SIDE)) - 128) / 128
    if protocol == "torch-fidelity":
        return (tensorflow_resize(_tensor(np.asarray(image.convert("RGB"))), SIDE) - 128) / 128
    pixels = _tensor(np.asarray(sana_resize(image, size))) / 255
    return 2 * interpolate(pixels[None], (SIDE, SIDE), mode="bilinear", align_corners=False)[0] - 1


def _tensor(pixels: np.ndarray) -> Tensor:
    """(H, W, 3) to (3, H, W) float32."""
    return torch.from_numpy(np.array(pixels, dtype=np.float32)).permute(2, 0, 1)


def tensorflow_resize(pixels: Tensor, side: int) -> Tensor:
    """(3, H, W) to (3, side, side) as TensorFlow 1 did it: bilinear, and pixel i of the result lies at i x H / side."""
    for axis in (1, 2):
        length = pixels.shape[axis]
        places = torch.arange(side, dtype=torch.float32) * (length / side)
        low = places.floor().long().clamp(max=length - 1)
        high = (low + 1).clamp(max=length - 1)
        share = (places - low).view(-1, 1) if axis == 1 else places - low
        below, above = pixels.index_select(axis, low), pixels.index_select(axis, high)
        pixels = below + (above - below) * share
    return pixels
