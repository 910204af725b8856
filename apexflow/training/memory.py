"""What a training step keeps in memory, counted on shapes: no weights are read and nothing is computed.

Activations are counted by a forward pass on fake tensors (shapes of the CPU kernels, attention fused), through
`saved_tensors_hooks`. Where a network has many like blocks, a shallow one is counted twice and the rest extrapolated.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode

from apexflow.backbones import Backbone
from apexflow.conditioning import Condition
from apexflow.errors import UserError
from apexflow.objectives import Field, Networks
from apexflow.training.config import Recipe
from apexflow.training.depth import SHALLOW, at_depth, by_depth, layers_of
from apexflow.training.further import Furthers, copies, make_furthers
from apexflow.training.passes import Pass
from apexflow.training.roles import Roles, checkpointed, make_roles


@dataclass(frozen=True)
class Sizes:
    """Bytes of tensors that live as long as the run, by what they are. further: what a method trains beside the student."""

    trained: int
    average: int
    frozen: int
    further: int = 0


def sizes_of(roles: Roles, furthers: Furthers | None = None) -> Sizes:
    """The networks of a run, by what happens to their tensors. Each storage counts once."""
    trained, average = _storages(roles.trained.values()), _storages(roles.average.values())
    further = _storages(p for one in (furthers or Furthers()).trained.values() for p in one.values())
    modules = [value for value in vars(roles).values() if isinstance(value, nn.Module)] + [roles.backbone.transformer]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    rest = _storages(tensors).items()
    frozen = sum(size for key, size in rest if not any(key in known for known in (trained, average, further)))
    return Sizes(sum(trained.values()), sum(average.values()), frozen, sum(further.values()))


def network_sizes(
    backbone: Backbone, recipe: Recipe, needs: tuple[str, ...], tokens: int, teacher: Backbone | None = None
) -> Sizes:
    """The sizes of a run's networks, from roles made on the meta device; `teacher`: a model of its own, if the recipe has one."""
    # A judge has to look into the network to be made, which no base in four bits can answer on shapes.
    whole = replace(recipe, tuning=replace(recipe.tuning, storage=None))

    def alone(student: Backbone, teacher: Backbone | None) -> Sequence[int]:
        with torch.device("meta"):
            return astuple(sizes_of(make_roles(student, recipe, needs, teacher=teacher)))

    def further(student: Backbone, teacher: Backbone | None) -> Sequence[int]:
        made = on_shapes(student, whole, tokens, teacher)
        return [sizes_of(made.roles, made.furthers).further]

    sizes = Sizes(*by_depth(alone, backbone, teacher))
    if not recipe.build_objective().further:
        return sizes
    return replace(sizes, further=by_depth(further, backbone, teacher)[0])


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}


class Saved:
    """One tensor that autograd saved, for as long as a graph needs it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@dataclass
class Kept:
    """What graphs hold for backward right now, parameters excepted."""

    excepted: set[int]
    saved: list[weakref.ref[Saved]] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        alive = [found.tensor for reference in self.saved if (found := reference()) is not None]
        return sum(size for key, size in _storages(alive).items() if key not in self.excepted)


@contextmanager
def kept_for_backward(networks: Iterable[nn.Module]) -> Iterator[Kept]:
    """Within, whatever autograd saves is noted in the `Kept` that this yields, but parameters and views of the networks'."""
    kept = Kept({key for network in networks for key in _storages(network.parameters())})

    def note(tensor: Tensor) -> Saved:
        saved = Saved(tensor)
        if not isinstance(tensor, nn.Parameter):
            kept.saved.append(weakref.ref(saved))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved.tensor):
        yield kept


@dataclass(frozen=True)
class Activations:
    """Bytes kept at the end of the forward passes of one micro-batch, and of one block computed again in backward."""

    kept: int
    block: int


def activations(
    backbone: Backbone,
    recipe: Recipe,
    passes: Sequence[Pass],
    shape: Sequence[int],
    tokens: int,
    captions: int = 0,
    teacher: Backbone | None = None,
) -> Activations:
    """What the passes with a graph keep. `backbone` and a `teacher` of its own are on the meta device; `shape` (C, h, w) of
    latents; `captions` are encoded by a text encoder that is trained."""
    graphs = [made for made in passes if made.graph]
    # How the base is stored changes nothing here, since a layer runs in the precision of the run; captions are counted apart.
    again = checkpointed(recipe.tuning, backbone.transformer)
    plain = replace(recipe, tuning=replace(recipe.tuning, storage=None, text_encoder=False, checkpointing=again))

    def count(student: Backbone, teacher: Backbone | None) -> Sequence[int]:
        return [_count(student, plain, graphs, shape, tokens, teacher)]

    kept = by_depth(count, backbone, teacher)[0]
    kept += _count_captions(backbone, captions, tokens) if captions else 0
    if not again:
        return Activations(kept, 0)
    trained = [backbone, *([teacher] if teacher and copies(recipe.build_objective().further) else [])]
    rows = max(made.rows for made in graphs)
    return Activations(kept, max(_one_block(one, plain, rows, shape, tokens) for one in trained))


def _one_block(backbone: Backbone, recipe: Recipe, rows: int, shape: Sequence[int], tokens: int) -> int:
    """The most that is kept of a pass of `rows` by what is computed again at once: a block, or of a UNet a part of one."""
    parts: list[int] = []
    shallow = at_depth(backbone, SHALLOW[0] if layers_of(backbone) else None)
    _count(shallow, recipe, [Pass("student", rows, True)], shape, tokens, parts=parts)
    return max(parts, default=0)  # none of a network that has nothing to compute again


@dataclass(frozen=True)
class OnShapes:
    """A run's networks on the meta device: roles, further networks, and what both are asked through."""

    roles: Roles
    furthers: Furthers
    networks: Networks

    @property
    def modules(self) -> list[nn.Module]:
        judges = [one for one in self.furthers.fields.values() if isinstance(one, nn.Module)]
        return [*self.roles.everything, *judges]

    def field(self, one: Pass) -> Field:
        """Who answers a pass."""
        named = self.networks.frozen if one.held else self.networks.further
        return named[one.role] if one.role in named else getattr(self.networks, one.role)


def on_shapes(backbone: Backbone, recipe: Recipe, tokens: int, teacher: Backbone | None = None) -> OnShapes:
    """The networks that a recipe asks, around a backbone, and a teacher of its own, on the meta device."""
    declared = recipe.build_objective().further
    with torch.device("meta"), counting(backbone, tokens):
        needs = ("teacher",) if declared else ()
        roles = make_roles(backbone, recipe, needs, teacher=teacher, further=copies(declared))
        null = example_condition(backbone, 1, tokens)
        networks = roles.networks(null)
        furthers = make_furthers(declared, backbone, roles, networks, null, recipe.seed)
    return OnShapes(roles, furthers, furthers.join(networks))


def _count(
    backbone: Backbone,
    recipe: Recipe,
    graphs: Sequence[Pass],
    shape: Sequence[int],
    tokens: int,
    teacher: Backbone | None = None,
    parts: list[int] | None = None,
) -> int:
    """What the passes keep. With a list for `parts` nothing is computed again, and it gets what each part keeps that would be."""
    made, mode = on_shapes(backbone, recipe, tokens, teacher), FakeTensorMode(allow_non_fake_inputs=True)
    turned = as_fake(made.modules, mode)
    for table in (made.roles.trained, *made.furthers.trained.values()):
        table.update({name: turned[id(parameter)] for name, parameter in table.items()})
    half = torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16")

    def ask(one: Pass) -> Tensor:
        x_t, t, c = example_inputs(backbone, one.rows, shape, tokens)
        return made.field(one)(x_t.requires_grad_(one.held), t, c)

    with mode, kept_for_backward(made.modules) as kept, half, counting(backbone, tokens):
        if parts is not None:
            noting(made.modules, kept, parts)
        alive = [ask(one) for one in graphs]
        found = kept.bytes
        del alive
    return found


def noting(networks: Iterable[nn.Module], kept: Kept, parts: list[int]) -> None:
    """Let networks run what they would compute again as it is, and note what each part of that keeps."""

    def run(part: Callable[..., Any], *inputs: Any) -> Any:
        before = kept.bytes
        answer = part(*inputs)
        parts.append(kept.bytes - before)
        return answer

    modules: Iterable[Any] = (module for network in networks for module in network.modules())
    for module in modules:
        if getattr(module, "gradient_checkpointing", False):
            module._gradient_checkpointing_func = run  # diffusers' own place for it


def _count_captions(backbone: Backbone, rows: int, tokens: int) -> int:
    """What the text encoders keep of `rows` captions, all of one length. They run in the precision of their weights."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    encoder: Any = copy.deepcopy(backbone.text_encoder).requires_grad_(True)
    as_fake([encoder], mode)
    with mode, kept_for_backward([encoder]) as kept, counting(backbone, tokens):
        several = encoder.values() if isinstance(encoder, nn.ModuleDict) else [encoder]
        # CLIP reads 77 tokens, whatever its companion takes.
        lengths = [min(tokens, getattr(one.config, "max_position_embeddings", tokens)) for one in several]
        ids = [torch.zeros(rows, length, dtype=torch.int64) for length in lengths]
        alive = [one(input_ids=read)[0] for one, read in zip(several, ids, strict=True)]
        found = kept.bytes
        del alive
    return found


@contextmanager
def counting(backbone: Backbone, tokens: int) -> Iterator[None]:
    """Within, a network that asks how long its texts are hears `tokens`; UserError for one that reads other numbers."""
    try:
        with _Lengths(tokens):
            yield
    except DataDependentOutputException as error:
        raise UserError(
            f"activations of {backbone.family} cannot be counted: its network reads numbers, not only shapes"
        ) from error


class _Lengths(TorchFunctionMode):
    """Answers for the numbers of integer tensors, (B,) or one of them, which are lengths of texts: nothing is padded here."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Fake tensors turn tolist() into an item() for each number.
        if func in (Tensor.tolist, Tensor.item) and args[0].ndim < 2 and args[0].dtype == torch.int64:
            return [self.tokens] * len(args[0]) if args[0].ndim else self.tokens
        return func(*args, **(kwargs or {}))


def example_inputs(
    backbone: Backbone, rows: int, shape: Sequence[int], tokens: int
) -> tuple[Tensor, Tensor, Condition]:
    """Latents, times and a condition as a cache would hand them over, without padding."""
    return torch.zeros(rows, *shape), torch.full((rows,), 0.5), example_condition(backbone, rows, tokens)


def example_condition(backbone: Backbone, rows: int, tokens: int) -> Condition:
    """A condition of the shapes that the network takes: all of one length, so without a mask."""
    width, pooled = backbone.text_width
    return Condition(torch.zeros(rows, tokens, width), pooled=None if pooled is None else torch.zeros(rows, pooled))


def as_fake(networks: Iterable[nn.Module], mode: FakeTensorMode) -> dict[int, Any]:
    """Put fake CPU tensors in place of meta tensors, by whose id they are returned: dispatch is the CPU's, nothing is held."""
    turned: dict[int, Any] = {}

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

    for module in (part for network in networks for part in network.modules()):
        plain = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        vars(module).update({name: turn(value) for name, value in plain.items()})
        for table in (module._parameters, module._buffers):
            table.update({name: turn(value) for name, value in table.items()})
    return turned
