"""Weights spread over the processes by FSDP2, and made whole again. All of it is collective."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from apexflow.backbones import second_time
from apexflow.backbones.parts import without_weights
from apexflow.training.distributed import leads, world

Place = Callable[[nn.Module], None]  # shards a network, or leaves it where it is


def leave(network: nn.Module) -> None:
    """A network stays where it is and as it is."""


def all_processes(device: torch.device) -> DeviceMesh:
    """What weights are spread over."""
    return init_device_mesh(device.type, (world(),))


def shard(module: nn.Module, mesh: DeviceMesh, half: bool) -> None:
    """Shard a denoiser, or one or several text encoders, over all processes in place, block by block; it moves to their device.

    Nothing stays whole after a forward pass, the root neither: a root kept whole would not see the optimizer's step. With
    `half`, a denoiser's float32 weights travel in bfloat16; inputs are not cast, since times must keep their float32. Text
    encoders run in the precision of their weights.
    """
    from diffusers import ModelMixin

    if isinstance(module, nn.ModuleDict):
        for part in module.values():
            shard(part, mesh, half)
        return
    half = half and isinstance(module, ModelMixin)
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if half else None,
        reduce_dtype=torch.float32 if half else None,
        cast_forward_inputs=False,
    )
    options: Any = {"mesh": mesh, "reshard_after_forward": True, "mp_policy": policy}
    # A text encoder under a head may be asked without it.
    bare = getattr(module, "base_model", module)
    for part in dict.fromkeys((*_blocks(module), bare, module)):
        made = fully_shard(part, **options)
        made.set_gradient_divide_factor(1.0)
        made.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists."""
    for part in module.children():
        yield from part if isinstance(part, nn.ModuleList) else _blocks(part)


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(part, FSDPModule) for part in module.modules())


def whole(tensor: Tensor) -> Tensor:
    """A tensor's full value; for a sharded one a collective, after which it lies on the CPU."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Full values in the first process, one after the other; the others keep none."""
    full = ((name, whole(tensor)) for name, tensor in tensors.items())
    return {name: tensor for name, tensor in full if leads()}


def unsharded(module: nn.Module) -> nn.Module:
    """In the first process a copy of a sharded network with whole weights on the CPU; elsewhere, or if it is whole, itself."""
    if isinstance(module, nn.ModuleDict):
        return nn.ModuleDict({name: unsharded(part) for name, part in module.items()})
    if not is_sharded(module):
        return module
    tensors = gathered(module.state_dict())
    if not leads():
        return module
    plain = without_weights(original_class(module), module.config)
    if second_time.second_time_of(module) is not None:
        second_time.attach(plain)
    plain.load_state_dict(tensors, assign=True)
    return plain.eval().requires_grad_(False)


def original_class(module: nn.Module) -> Any:
    """A network's class of diffusers or transformers, which sharding hides behind one of its own."""
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def hollow(module: nn.Module) -> nn.Module:
    """A frozen copy whose parameters take no memory until `fill` gives them their values."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), False) for p in module.parameters()}
    return copy.deepcopy(module, empty).eval()


@torch.no_grad()
def fill(empty: nn.Module, module: nn.Module, place: Place) -> None:
    """Make a hollow copy of a network whole, where that is now: sharded with it, so that nobody holds it whole twice."""
    if is_sharded(module):
        place(empty)
    empty.to_empty(device=next(module.parameters()).device)
    for own, other in zip(_tensors(empty), _tensors(module), strict=True):
        own.copy_(other)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
