"""What a training step keeps in memory, counted on shapes: no weights are read and nothing is computed.

Activations are counted by a forward pass on fake tensors (shapes of the CPU kernels, attention fused), through
`saved_tensors_hooks`. Where a network has many like blocks, a shallow one is counted twice and the rest extrapolated.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from apexflow.backbones import Backbone
from apexflow.conditioning import Condition
from apexflow.errors import UserError
from apexflow.training.config import Recipe
from apexflow.training.passes import Pass
from apexflow.training.roles import checkpointed, make_roles

SHALLOW = (2, 3)


@dataclass(frozen=True)
class Sizes:
    """Bytes of tensors that live as long as the run, by what they are."""

    trained: int
    average: int
    frozen: int


def sizes_of(roles: Any) -> Sizes:
    """The networks of a run, by what happens to their tensors. Each storage counts once."""
    trained, average = _storages(roles.trained.values()), _storages(roles.average.values())
    modules = [value for value in vars(roles).values() if isinstance(value, nn.Module)] + [roles.backbone.transformer]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    everything = _storages(tensors)
    frozen = sum(size for key, size in everything.items() if key not in trained and key not in average)
    return Sizes(sum(trained.values()), sum(average.values()), frozen)


def network_sizes(backbone: Backbone, recipe: Recipe, needs: tuple[str, ...]) -> Sizes:
    """The sizes of a run's networks, from roles made on the meta device; like blocks are counted on a shallow network."""

    def count(depth: int | None) -> Sizes:
        with torch.device("meta"):
            return sizes_of(make_roles(at_depth(backbone, depth), recipe, needs))

    layers = layers_of(backbone)
    if layers is None:
        return count(None)
    few, more = (astuple(count(depth)) for depth in SHALLOW)
    return Sizes(*(one + (layers - SHALLOW[0]) * (two - one) for one, two in zip(few, more, strict=True)))


def layers_of(backbone: Backbone) -> int | None:
    """How many like blocks the network has, where counting two shallow ones is enough."""
    config: Any = backbone.transformer.config
    layers = config[backbone.depth] if backbone.depth else 0
    return layers if layers > SHALLOW[1] else None


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}


@dataclass
class Kept:
    """Storages that backward will need, parameters excepted. Held, so that no address is used twice."""

    excepted: set[int]
    storages: dict[int, torch.UntypedStorage]

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


@contextmanager
def kept_for_backward(networks: Iterable[nn.Module]) -> Any:
    """Within, whatever autograd saves is noted in the `Kept` that this yields."""
    kept = Kept({key for network in networks for key in _storages(network.parameters())}, {})

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in kept.excepted:
            kept.storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept


@dataclass(frozen=True)
class Activations:
    """Bytes kept at the end of the forward passes of one micro-batch, and of one block computed again in backward."""

    kept: int
    block: int


def activations(
    backbone: Backbone, recipe: Recipe, passes: Sequence[Pass], shape: Sequence[int], tokens: int
) -> Activations:
    """What the passes with a graph keep. `backbone` is on the meta device; `shape` (C, h, w) of latents."""
    graphs = [made.rows for made in passes if made.graph]
    # How the base is stored changes nothing here: a layer runs in the precision of the run.
    whole = replace(recipe, tuning=replace(recipe.tuning, checkpointing=False, storage=None))
    again = replace(recipe, tuning=replace(recipe.tuning, checkpointing=True, storage=None))
    layers = layers_of(backbone)
    checkpointing = checkpointed(recipe.tuning, backbone.transformer)

    def count(settings: Recipe, rows: Sequence[int], depth: int | None) -> int:
        return _count(at_depth(backbone, depth), settings, rows, shape, tokens)

    if layers is None:
        blocks = max(len(m) for m in backbone.transformer.children() if isinstance(m, nn.ModuleList))
        kept = count(again if checkpointing else whole, graphs, None)
        return Activations(kept, count(whole, [max(graphs)], None) // blocks if checkpointing else 0)
    few, more = (count(again if checkpointing else whole, graphs, depth) for depth in SHALLOW)
    kept = few + (layers - SHALLOW[0]) * (more - few)
    if not checkpointing:
        return Activations(kept, 0)
    one, two = (count(whole, [max(graphs)], depth) for depth in SHALLOW)
    return Activations(kept, two - one)


def at_depth(backbone: Backbone, depth: int | None) -> Backbone:
    """The backbone with a transformer of its own, of `depth` blocks (None: as many as it has), on the meta device."""
    other: Any = copy.copy(backbone)
    transformer: Any = backbone.transformer
    config = dict(transformer.config) | ({backbone.depth: depth} if depth is not None else {})
    kind: Any = type(transformer)
    dtype = next(backbone.transformer.parameters()).dtype
    with torch.device("meta"):
        other.transformer = kind.from_config(config).to(dtype).requires_grad_(False)
    return other


def _count(backbone: Backbone, recipe: Recipe, graphs: Sequence[int], shape: Sequence[int], tokens: int) -> int:
    with torch.device("meta"):
        make_roles(backbone, recipe, ())
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    network = as_fake(backbone.transformer, mode)
    half = torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16")
    with mode, kept_for_backward([network]) as kept, half:
        try:
            alive = [backbone.velocity(network, *example_inputs(backbone, rows, shape, tokens)) for rows in graphs]
        except DataDependentOutputException as error:
            raise UserError(
                f"activations of {backbone.family} cannot be counted: its network reads numbers, not only shapes"
            ) from error
        del alive
    return kept.bytes


def example_inputs(
    backbone: Backbone, rows: int, shape: Sequence[int], tokens: int
) -> tuple[Tensor, Tensor, Condition]:
    """Latents, times and a condition as a cache would hand them over, without padding."""
    width, pooled = backbone.text_width
    c = Condition(torch.zeros(rows, tokens, width), None, None if pooled is None else torch.zeros(rows, pooled))
    return torch.zeros(rows, *shape), torch.full((rows,), 0.5), c


def as_fake(network: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The network with fake CPU tensors in place of its meta tensors: dispatch is the CPU's, nothing is allocated."""
    turned: dict[int, Tensor] = {}

    def turn(value: Any) -> Any:
        if isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
            return type(value)(turn(item) for item in value)
        if not isinstance(value, Tensor) or value.device.type != "meta":
            return value
        if id(value) not in turned:
            with mode:
                fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
            turned[id(value)] = nn.Parameter(fake, value.requires_grad) if isinstance(value, nn.Parameter) else fake
        return turned[id(value)]

    for module in network.modules():
        plain = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        vars(module).update({name: turn(value) for name, value in plain.items()})
        for table in (module._parameters, module._buffers):
            table.update({name: turn(value) for name, value in table.items()})
    return network
