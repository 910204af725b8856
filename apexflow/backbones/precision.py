"""How large a network is, in which precision it computes, and what follows of both."""

from __future__ import annotations

import torch
from torch import nn

LARGE = 500_000_000  # parameters of a denoiser, from which on it is sparing with memory unasked


def bytes_of(network: nn.Module) -> int:
    """What a network's parameters take."""
    return sum(p.nbytes for p in network.parameters())


def is_large(network: nn.Module) -> bool:
    """Whether a denoiser has so many parameters that memory and time are spared unasked."""
    return sum(p.numel() for p in network.parameters()) >= LARGE


def compute_dtype(network: nn.Module) -> torch.dtype:
    """The dtype that a network computes in: that of its parameters, unless they are stored narrower (fp8, 4 bits)."""
    stored = next(network.parameters()).dtype
    return stored if stored.itemsize > 1 else network.dtype  # type: ignore[return-value]


def running_dtype(network: nn.Module) -> torch.dtype:
    """The dtype of a network's activations right now: autocast's where it is on, else `compute_dtype`."""
    device = next(network.parameters()).device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else compute_dtype(network)


def autoencoder_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float32 in place of float16, in which the autoencoders overflow ("force_upcast")."""
    return torch.float32 if dtype == torch.float16 else dtype


def multiply_in_tf32(network: nn.Module, device: str | torch.device) -> None:
    """For a large network in float32 on a GPU: from here on the process multiplies float32 matrices in TF32.

    In full float32 a GPU multiplies many times slower. TF32 has float32's range and float16's mantissa, in which the published
    weights of SANA, the family that is not run in bfloat16, were trained; sums stay in float32. Small networks keep full
    precision: the time that they take is not the matrices'.
    """
    if torch.device(device).type == "cuda" and is_large(network) and compute_dtype(network) == torch.float32:
        torch.set_float32_matmul_precision("high")
