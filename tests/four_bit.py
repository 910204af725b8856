"""What `bitsandbytes` does in four bits, written out plainly: stands in where that extra is not installed."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from apexflow.backbones import storage


def nf4() -> Tensor:
    """The 16 levels (Dettmers et al., 2023): quantiles of a normal law, eight at or above zero, eight below, none doubled."""
    edge = 0.9677083  # as the library has it: the outermost levels are the quantiles of 1 - 1/2 (1/32 + 1/30)
    above = norm.ppf(torch.linspace(edge, 0.5, 9)[:-1])
    below = -norm.ppf(torch.linspace(edge, 0.5, 8)[:-1])
    levels = torch.tensor([*above, 0.0, *below], dtype=torch.float32)
    return (levels / levels.max()).sort().values


@dataclass
class QuantState:
    absmax: Tensor
    shape: torch.Size
    code: Tensor
    blocksize: int
    quant_type: str
    dtype: torch.dtype


def quantize_4bit(
    weight: Tensor, blocksize: int, compress_statistics: bool, quant_type: str
) -> tuple[Tensor, QuantState]:
    assert quant_type == "nf4" and not compress_statistics and weight.numel() % 2 == 0
    flat = weight.float().flatten()
    scales = flat.view(-1, blocksize).abs().amax(1)
    between = (nf4()[1:] + nf4()[:-1]) / 2  # the nearest level changes here
    pairs = torch.bucketize(flat / scales.repeat_interleave(blocksize), between).view(-1, 2)
    codes = (pairs[:, :1] * 16 + pairs[:, 1:]).to(torch.uint8)
    return codes, QuantState(scales, weight.shape, nf4(), blocksize, quant_type, weight.dtype)


def dequantize_4bit(codes: Tensor, state: QuantState) -> Tensor:
    index = torch.cat([codes.view(-1, 1) >> 4, codes.view(-1, 1) & 15], 1).flatten().long()
    return (
        (state.code[index] * state.absmax.repeat_interleave(state.blocksize)[: len(index)])
        .view(state.shape)
        .to(state.dtype)
    )


def matmul_4bit(x: Tensor, codes: Tensor, quant_state: QuantState, bias: Tensor | None = None) -> Tensor:
    return torch.nn.functional.linear(x, dequantize_4bit(codes.t(), quant_state), bias)


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a test, four bits are the library's, or these where it is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        names = {"QuantState": QuantState, "quantize_4bit": quantize_4bit, "dequantize_4bit": dequantize_4bit}
        functional = SimpleNamespace(**names, get_4bit_type=lambda kind, device: nf4().to(device))
        library = SimpleNamespace(matmul_4bit=matmul_4bit, functional=functional)
        monkeypatch.setattr(storage, "four_bit_functions", lambda: library)
