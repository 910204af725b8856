"""How a frozen denoiser is kept, under a LoRA or to draw: in eight bits (fp8, by diffusers) or in four (nf4, by bitsandbytes).

Under a LoRA it comes after the adapters, which stay as they are: cast with the base, they could not be trained.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from apexflow.backbones import second_time
from apexflow.backbones.precision import compute_dtype
from apexflow.errors import UserError

Kind = Literal["fp8", "nf4"]
BLOCK = 64  # weights that share a scale in four bits
KEPT = ("pos_embed", "norm", "lora_", second_time.NAME)


def check_kind(kind: str | None) -> None:
    """UserError for a kind that is unknown, or whose library is not installed: told before a large model is read for minutes."""
    if kind not in (None, *get_args(Kind)):
        raise UserError(f"storage is {kind!r}: use fp8 or nf4, or leave it out")
    if kind == "nf4":
        four_bit_functions()


def storing(kind: Kind | None, compute: torch.dtype, device: torch.device) -> Callable[[nn.Module], None]:
    """What moves a network to `device`, its matrices kept in `kind` (None: as they are) and computed in `compute`.

    They go there one by one in four bits, so that a GPU never holds them in full precision.
    """

    def store(network: nn.Module) -> None:
        if kind == "fp8":
            store_fp8(network, compute)
        elif kind == "nf4":
            store_nf4(network, compute, device)
        network.to(device)

    return store


def store_fp8(network: nn.Module, compute: torch.dtype) -> None:
    """Keep the matrices in fp8 (e4m3) and compute in `compute`, layer by layer.

    Convolutions stay: backward reads their weight after it has gone back to eight bits.
    """
    from diffusers.hooks import apply_layerwise_casting

    apply_layerwise_casting(network, torch.float8_e4m3fn, compute, _kept(network), (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def store_nf4(network: nn.Module, compute: torch.dtype, device: torch.device) -> None:
    """Keep the matrices in NF4 (Dettmers et al., 2023), a scale for 64 weights. UserError where the extra is not installed.

    A matrix whose rows are not whole blocks stays: bitsandbytes 0.50 misreads its scales on a CPU.
    """
    if device.type != "meta":
        four_bit_functions()
    for name, module in list(network.named_modules()):
        fits = isinstance(module, nn.Linear) and module.in_features % BLOCK == 0
        if fits and not any(part in name for part in _kept(network)):
            parent, _, own = name.rpartition(".")
            setattr(network.get_submodule(parent), own, FourBit(module, compute, device))


def stored_kind(network: nn.Module) -> Kind | None:
    """How the matrices of a network are kept."""
    if any(isinstance(module, FourBit) for module in network.modules()):
        return "nf4"
    return "fp8" if any(parameter.dtype == torch.float8_e4m3fn for parameter in network.parameters()) else None


def _kept(network: nn.Module) -> tuple[str, ...]:
    """Parts of the names of layers that stay: ours, and those that diffusers says of the network's class."""
    return (*KEPT, *(getattr(network, "_skip_layerwise_casting_patterns", None) or ()))


def four_bit_functions() -> Any:
    """bitsandbytes, for `matmul_4bit` and what is in `functional`; UserError where the extra is not installed."""
    try:
        importlib.import_module("bitsandbytes.functional")
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise UserError("storage nf4 needs bitsandbytes: pip install 'apexflow[4bit]'") from error


class FourBit(nn.Module):
    """A linear layer whose weight is kept in NF4: two weights a byte in `codes`, a float32 scale a block in `scales`.

    Plain buffers, so that it is counted on the meta device, moved and saved like any other layer.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear, compute: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.in_features, self.out_features, self.compute_dtype = linear.in_features, linear.out_features, compute
        self.bias = linear.bias
        count = linear.weight.numel()
        codes = torch.empty(-(-count // 2), 1, dtype=torch.uint8, device="meta")
        scales = torch.empty(-(-count // BLOCK), device="meta")
        if linear.weight.device.type != "meta":
            weight = linear.weight.detach().to(device, compute).contiguous()
            codes, state = four_bit_functions().functional.quantize_4bit(
                weight, blocksize=BLOCK, compress_statistics=False, quant_type="nf4"
            )
            scales = state.absmax
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    @property
    def weight(self) -> Tensor:
        """The codes: where a further adapter must lie."""
        return self.codes

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.compute_dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        library = four_bit_functions()
        return library.matmul_4bit(x.to(dtype), self.codes.t(), quant_state=self._state(dtype), bias=bias)

    def whole(self) -> Tensor:
        """The weight as it acts, in the dtype that it computes in."""
        return four_bit_functions().functional.dequantize_4bit(self.codes, self._state(self.compute_dtype))

    def _state(self, dtype: torch.dtype) -> Any:
        functional = four_bit_functions().functional
        return functional.QuantState(
            absmax=self.scales,
            shape=torch.Size((self.out_features, self.in_features)),
            code=levels(self.codes.device),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=dtype,
        )


@lru_cache
def levels(device: torch.device) -> Tensor:
    """The 16 numbers that four bits stand for. The library copies them to the device whenever it is asked: here that is once."""
    return four_bit_functions().functional.get_4bit_type("nf4", device=device)


def plain_weights(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of a network under adapters with their plain names. What is stored narrower comes in the dtype that the network
    computes in, made when it is asked for: all at once would be the whole base beside itself.
    """
    compute = compute_dtype(network)
    four_bits = {name: module for name, module in network.named_modules() if isinstance(module, FourBit)}
    for name, tensor in network.state_dict().items():
        module, _, last = name.rpartition(".")
        plain = name.replace(".base_layer.", ".")
        if module in four_bits and last == "codes":
            yield f"{plain.removesuffix('codes')}weight", four_bits[module].whole()
        elif ".lora_" not in name and not (module in four_bits and last == "scales"):
            yield plain, tensor.to(compute) if tensor.itemsize == 1 else tensor
