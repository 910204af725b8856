"""Weights spread over the processes by FSDP2, and made whole again. All of it is collective."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from apexflow.backbones import second_time
from apexflow.backbones.parts import without_weights
from apexflow.backbones.weights import guarded, weight_files
from apexflow.training.distributed import leads, world

Place = Callable[[nn.Module], None]  # shards a network, or leaves it where it is


def leave(network: nn.Module) -> None:
    """A network stays where it is and as it is."""


def all_processes(device: torch.device) -> DeviceMesh:
    """What weights are spread over."""
    return init_device_mesh(device.type, (world(),))


def shard_and_read(network: nn.Module, mesh: DeviceMesh, half: bool, device: torch.device) -> None:
    """Shard a network in place. A hollow one then reads its share of the weights: no process holds them whole.

    UserError for weights that cannot be read, or are another network's.
    """
    empty = [name for name, parameter in network.named_parameters() if parameter.is_meta]
    shard(network, mesh, half)
    path = vars(network).get("weights_from")
    if empty and path is not None:
        network._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
        guarded(path, lambda: read_shares(network, path, empty))


@torch.no_grad()
def read_shares(network: nn.Module, path: Path, needed: Sequence[str]) -> None:
    """Fill a sharded network from the files in `path`; ValueError where one of the `needed` parameters is not there."""
    files = weight_files(path)
    tensors = {_in_file(name): tensor for name, tensor in network.state_dict().items()}
    if missing := sorted({_in_file(name) for name in needed} - files.keys()):
        raise ValueError(
            f"the weights are of another network: {len(missing)} tensors are missing, such as {missing[0]}"
        )
    for file in sorted(set(files.values())):
        with safe_open(file, "pt") as opened:
            for name in sorted(name for name in tensors.keys() & files.keys() if files[name] == file):
                read_share(opened.get_slice(name), tensors[name])


def read_share(saved: Any, tensor: Tensor) -> None:
    """Fill a tensor, or this process's rows of one sharded by rows, from a slice of a file."""
    if list(tensor.shape) != saved.get_shape():
        raise ValueError(
            f"the weights are of another network: the shape should be {tuple(tensor.shape)}, not {saved.get_shape()}"
        )
    if not isinstance(tensor, DTensor):
        tensor.copy_(saved[:])
        return
    own = tensor.to_local()
    first = tensor.device_mesh.get_local_rank() * -(-len(tensor) // tensor.device_mesh.size())
    if len(own):
        own.copy_(saved[first : first + len(own)])


def _in_file(name: str) -> str:
    """What the model folder calls a tensor of a network under adapters."""
    return name.replace(".base_layer.", ".")


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
    # Some families answer with a view. Writing into it would be wrong, as torch warns; nothing here writes into an answer.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
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
    """Whether some of a network's weights are spread over the processes."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def whole(tensor: Tensor) -> Tensor:
    """A tensor's full value, where it lies; for a sharded one a collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(
    tensors: Iterable[tuple[str, Tensor]], change: Callable[[str, Tensor], Tensor] = lambda _, tensor: tensor
) -> dict[str, Tensor]:
    """Full values on the CPU of the first process, changed before they go there; the others keep none.

    One after the other: a GPU that training has filled has room for one, not for all.
    """
    full = ((name, whole(tensor)) for name, tensor in tensors)
    return {name: change(name, tensor).cpu() for name, tensor in full if leads()}


def unsharded(module: nn.Module) -> nn.Module:
    """In the first process a copy of a sharded network with whole weights on the CPU; elsewhere, or if it is whole, itself."""
    if isinstance(module, nn.ModuleDict):
        return nn.ModuleDict({name: unsharded(part) for name, part in module.items()})
    if not is_sharded(module):
        return module
    tensors = gathered(module.state_dict().items())
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
    made = copy.deepcopy(module, empty).eval()
    vars(made).pop("weights_from", None)
    return made


@torch.no_grad()
def fill(empty: nn.Module, module: nn.Module, place: Place) -> None:
    """Make a hollow copy of a network whole, where that is now: sharded with it, so that nobody holds it whole twice."""
    if is_sharded(module):
        place(empty)
    tied = _tied(empty)
    empty.to_empty(device=next(module.parameters()).device)
    for first, *others in tied:  # weights under several names, as T5's embedding, which are apart now
        for name in others:
            owner, _, last = name.rpartition(".")
            setattr(empty.get_submodule(owner), last, empty.get_parameter(first))
    for own, other in zip(_tensors(empty), _tensors(module), strict=True):
        own.copy_(other)


def _tied(module: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [each for each in names.values() if len(each) > 1]


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
