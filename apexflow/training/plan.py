"""`apexflow plan`: the peak memory of a recipe on each GPU before anything is loaded, and what to switch on if it is too much."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import Any

import torch

from apexflow.backbones import BUILT_IN, Backbone
from apexflow.backbones.precision import bytes_of
from apexflow.backbones.presets import load_shapes
from apexflow.backbones.storage import Kind
from apexflow.training.config import Recipe
from apexflow.training.distributed import rows_each
from apexflow.training.engine import parallel_kind
from apexflow.training.memory import Activations, activations, kept_for_backward, network_sizes
from apexflow.training.passes import Pass, trace_passes
from apexflow.training.prepare import finished_sets, size_of
from apexflow.training.roles import checkpointed, loaded_dtype
from apexflow.training.suited import suited_objective

GIB = 2**30
# Not counted but allowed for: the CUDA context, workspaces of the kernels, and what the allocator loses to fragments. Both were
# fitted to what an H200 held (results/real-size.json), which they meet within 10%.
ALLOWANCE = GIB
FRAGMENTS = 0.06
MOMENTS = {"adamw": 8, "adamw8bit": 2}  # bytes a trained parameter
LASTING = ("trained weights", "frozen weights", "further networks", "average (EMA)", "gradients", "optimizer")


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each of `gpus` GPUs, by what they are: `backward` at its start, and `update` in the optimizer's step.

    cached: bytes a picture that the cache of latents and embeddings holds, on disk or in main memory. host: main memory that
    each process takes while it starts, for the model on its way to the GPU; saving: what the first takes to save a model that
    was sharded, or into which a LoRA is merged.
    """

    backward: dict[str, int]
    update: dict[str, int]
    trainable: int
    checkpointing: bool
    micro_batch: int
    gpus: int
    cached: int
    host: int
    saving: int
    passes: list[Pass]

    @property
    def parts(self) -> dict[str, int]:
        """Those of the moment that takes most."""
        return max(self.backward, self.update, key=lambda moment: sum(moment.values()))

    @property
    def peak(self) -> int:
        return round(sum(self.parts.values()) * (1 + FRAGMENTS)) + ALLOWANCE

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, sizes in GiB."""
        parts = {name: round(size / GIB, 3) for name, size in self.parts.items()}
        return {
            "peak_gib": round(self.peak / GIB, 2),
            "peak_in": "backward" if self.parts is self.backward else "the optimizer's step",
            "parts_gib": parts | {"allowance": round((self.peak - sum(self.parts.values())) / GIB, 3)},
            "trainable": self.trainable,
            "checkpointing": self.checkpointing,
            "micro_batch": self.micro_batch,
            "gpus": self.gpus,
            "cached_bytes_a_picture": self.cached,
            "host_gib": round(self.host / GIB, 2),
            "host_saving_gib": round(self.saving / GIB, 2),
            "rows_with_gradient": sum(made.rows for made in self.passes if made.graph) / self.micro_batch,
            "rows_without_gradient": sum(made.rows for made in self.passes if not made.graph) / self.micro_batch,
        }


def plan(recipe: Recipe, gpus: int = 1, tokens: int | None = None) -> MemoryPlan:
    """What a recipe takes on each of `gpus` GPUs; `tokens` of text a prompt, by default the most that the model reads.

    Reads configs alone. `recipe.micro_batch` counts rows on one GPU; with `parallel=auto` no weights are shared out, and without
    `data.size` pictures have the model's own size (see `settled`). UserError for a model whose configs are not known, and for a
    batch that the GPUs cannot share equally.
    """
    # A copy, which draws at the run's size as a run's does: the shapes are kept for other plans.
    own, backbone, teacher = rows_each(recipe.batch, gpus), copy(shapes_of(recipe)), shapes_of_teacher(recipe)
    size = recipe.data.size or backbone.default_size
    backbone.draw_at(size)
    shape = backbone.latent_shape((size, size))
    tokens = tokens or backbone.most_tokens
    objective = suited_objective(recipe, backbone, teacher)
    rows = min(recipe.micro_batch or own, own)
    with kept_for_backward([]) as kept:
        passes, losses = trace_passes(objective, rows, recipe.batch, shape)
        of_losses = kept.bytes
        del losses
    again = checkpointed(recipe.tuning, backbone.transformer)
    needed = _activations(recipe, backbone, teacher, passes, shape, tokens, rows if recipe.tuning.text_encoder else 0)
    sizes = network_sizes(backbone, recipe, objective.needs, tokens, teacher)
    shared = gpus if recipe.parallel == "fsdp" else 1
    learnt = (sizes.trained + sizes.further) // shared
    width, pooled = backbone.text_width
    latents = 2 * math.prod(shape)
    text = 2 * (tokens * width + (pooled or 0))
    parts = {
        "trained weights": sizes.trained // shared,
        "frozen weights": sizes.frozen // shared,
        "further networks": sizes.further // shared,
        "average (EMA)": sizes.average // shared,
        "gradients": learnt,
        "optimizer": learnt // 4 * MOMENTS[recipe.optimizer.kind],
        "activations": needed.kept + of_losses,
        "one block again": needed.block,
        "batch": 2 * rows * (latents + text),
    }
    if shared > 1:
        parts["one block whole"] = (sizes.trained + sizes.frozen) // max(blocks_of(backbone), 1)
    # Gradients come as the activations go, unless those of the rows before are there. DDP keeps room for them besides.
    held = learnt * (rows < own) + sizes.trained * (gpus > 1 and shared == 1)
    backward = parts | {"gradients": held}
    # Neither optimizer has intermediates of a size on a GPU: one is fused there, the other takes one weight after the other.
    update = {name: size if name in LASTING else 0 for name, size in parts.items()}
    host, saving = _main_memory(recipe, backbone, teacher, shared, sizes.average)
    return MemoryPlan(backward, update, sizes.trained // 4, again, rows, gpus, latents + text, host, saving, passes)


def _main_memory(
    recipe: Recipe, backbone: Backbone, teacher: Backbone | None, shared: int, average: int
) -> tuple[int, int]:
    """`host` and `saving` of a plan, with weights spread over `shared` GPUs."""
    denoiser, named = bytes_of(backbone.transformer), bytes_of(teacher.transformer) if teacher else 0
    encoder = bytes_of(backbone.text_encoder) if recipe.tuning.text_encoder else 0
    saving = denoiser + encoder if shared > 1 else 0
    if recipe.tuning.kind == "lora":
        saving = denoiser + average  # merged on the CPU, however the base is stored
    return (denoiser + named) // shared + encoder, saving


_COUNTED: dict[str, Activations] = {}


def _activations(
    recipe: Recipe,
    backbone: Backbone,
    teacher: Backbone | None,
    passes: Sequence[Pass],
    shape: Sequence[int],
    tokens: int,
    captions: int,
) -> Activations:
    """`activations`, counted once for all that they depend on: much of the advice changes none of it."""
    of_networks = (
        recipe.model,
        recipe.teacher,
        loaded_dtype(recipe),
        replace(recipe.tuning, storage=None),
        recipe.precision,
    )
    key = repr((of_networks, recipe.method, recipe.objective, recipe.seed, passes, shape, tokens, captions))
    if key not in _COUNTED:
        _COUNTED[key] = activations(backbone, recipe, passes, shape, tokens, captions, teacher)
    return _COUNTED[key]


def shapes_of(recipe: Recipe) -> Backbone:
    """The recipe's model on the meta device, in the precision in which its weights are loaded."""
    model = str(BUILT_IN / "mini-teacher") if recipe.model == "miniature" else recipe.model  # of the same shapes
    return _shapes(model, loaded_dtype(recipe))


def shapes_of_teacher(recipe: Recipe) -> Backbone | None:
    """The same of the teacher that a recipe names."""
    return _shapes(recipe.teacher, loaded_dtype(recipe)) if recipe.teacher else None


@lru_cache(maxsize=2)
def _shapes(model: str, dtype: torch.dtype) -> Backbone:
    return load_shapes(model, dtype)


def settled(recipe: Recipe, gpus: int, memory: int | None) -> Recipe:
    """The recipe with the size of its finished caches, and with `parallel` as a run takes it on so many GPUs of `memory` bytes
    (None: on a CPU)."""
    recipe = replace(recipe, data=replace(recipe.data, size=size_of(recipe.data, finished_sets(recipe.data))))
    if gpus == 1:
        return recipe
    models = [one for one in (shapes_of(recipe), shapes_of_teacher(recipe)) if one is not None]
    return replace(recipe, parallel=parallel_kind(recipe, models, memory))


def blocks_of(backbone: Backbone) -> int:
    """How many blocks the network has."""
    return sum(len(part) for part in backbone.transformer.children() if isinstance(part, torch.nn.ModuleList))


# -- What to switch on -------------------------------------------------------------------------------------------------


Change = tuple[str, Recipe, int]  # what to add to the command, and recipe and GPUs then


def advise(recipe: Recipe, limit: int, gpus: int = 1, tokens: int | None = None) -> list[tuple[str, MemoryPlan]]:
    """Changes that make a recipe fit into `limit` bytes, each on top of those before it, up to the first that fits.

    Each is (what to add to the command, the plan then). Empty if it fits as it is.
    """
    found: list[tuple[str, MemoryPlan]] = []
    if plan(recipe, gpus, tokens).peak <= limit:
        return found
    for change, then in _changes(recipe, gpus, tokens, lambda now, then: then.peak < now.peak):
        found.append((change, then))
        if then.peak <= limit:
            break
    return found


def out_of_memory(recipe: Recipe, gpus: int = 1) -> str:
    """What a run that ran out of memory is told: what the plan says, and what to switch on."""
    first = f"out of memory: `apexflow plan` counts {plan(recipe, gpus).peak / GIB:.1f} GiB on each of {gpus} GPU(s)"
    # The run knows better than the plan: what this one has no use for may help.
    changes = islice(_changes(recipe, gpus, None, lambda now, then: True), 2)
    told = [f"{change} ({then.peak / GIB:.1f} GiB)" for change, then in changes]
    return f"{first}; switch on {', then '.join(told)}" if told else first


def _changes(
    recipe: Recipe, gpus: int, tokens: int | None, is_better: Callable[[MemoryPlan, MemoryPlan], bool]
) -> Iterator[tuple[str, MemoryPlan]]:
    """Changes by which a plan gets better, each on top of those before it, in the order of what they cost: time, then precision,
    then money, then what is tuned."""
    now, again = plan(recipe, gpus, tokens), True
    while again:  # what did not help may do so once another change has moved the peak
        again = False
        for kind in (_checkpointing, _fewer_rows, _narrower_base, _narrower_moments, _more_gpus, _adapter):
            for change, changed, count in kind(recipe, gpus):
                then = plan(changed, count, tokens)
                if is_better(now, then):
                    recipe, gpus, now, again = changed, count, then, True
                    yield change, then


def _checkpointing(recipe: Recipe, gpus: int) -> Iterator[Change]:
    if recipe.tuning.checkpointing is not True:
        tuning = replace(recipe.tuning, checkpointing=True)
        yield "tuning.checkpointing=true", replace(recipe, tuning=tuning), gpus


def _fewer_rows(recipe: Recipe, gpus: int) -> Iterator[Change]:
    rows = recipe.micro_batch or max(recipe.batch // gpus, 1)
    while rows > 1:
        rows = max(rows // 4, 1)
        yield f"micro_batch={rows}", replace(recipe, micro_batch=rows), gpus


def _narrower_base(recipe: Recipe, gpus: int) -> Iterator[Change]:
    kinds: list[Kind] = ["fp8", "nf4"] if recipe.tuning.storage is None else ["nf4"]
    for storage in kinds if recipe.tuning.kind == "lora" and recipe.parallel != "fsdp" else []:
        if recipe.tuning.storage != storage:
            yield f"tuning.storage={storage}", replace(recipe, tuning=replace(recipe.tuning, storage=storage)), gpus


def _narrower_moments(recipe: Recipe, gpus: int) -> Iterator[Change]:
    if recipe.optimizer.kind == "adamw" and recipe.parallel != "fsdp":
        optimizer = replace(recipe.optimizer, kind="adamw8bit")
        yield "optimizer.kind=adamw8bit", replace(recipe, optimizer=optimizer), gpus


def _more_gpus(recipe: Recipe, gpus: int) -> Iterator[Change]:
    wide = replace(recipe.optimizer, kind="adamw")  # neither narrow moments nor a narrow base can be shared out
    whole = replace(recipe, parallel="fsdp", optimizer=wide, tuning=replace(recipe.tuning, storage=None))
    for count in (2, 4, 8, 16):
        more = count > gpus or (count == gpus and recipe.parallel != "fsdp")
        if more and recipe.batch % count == 0:
            yield f"parallel=fsdp on {count} GPUs, with full precision again", whole, count


def _adapter(recipe: Recipe, gpus: int) -> Iterator[Change]:
    if recipe.tuning.kind == "full" and not recipe.tuning.text_encoder and recipe.teacher is None:
        yield "tuning.kind=lora", replace(recipe, tuning=replace(recipe.tuning, kind="lora")), gpus


def plan_table(found: MemoryPlan, advice: list[tuple[str, MemoryPlan]], memory: float) -> str:
    """A plan and its advice as text."""
    shown = found.to_dict()
    lines = [f"{name:20} {size:8.2f} GiB" for name, size in shown["parts_gib"].items() if size >= 0.005]
    passes = f"for each row {shown['rows_with_gradient']:g} passes with gradient and {shown['rows_without_gradient']:g} without"
    lines += [
        f"{'peak on each GPU':20} {shown['peak_gib']:8.2f} GiB of {memory:g}, in {shown['peak_in']}",
        f"{found.gpus} GPU(s), {found.micro_batch} rows at a time, {found.trainable:,} trainable parameters, {passes}; "
        f"checkpointing {'on' if found.checkpointing else 'off'}; the cache takes {found.cached / 1e6:.2f} MB a picture",
        f"at startup each process takes {shown['host_gib']:.2f} GiB of main memory"
        + (f"; the first one {shown['host_saving_gib']:.2f} GiB to save the model" if found.saving else ""),
    ]
    if found.peak > memory * GIB:
        lines.append("does not fit. Switch on, in this order:")
        lines += [f"  {change:28} {then.peak / GIB:8.2f} GiB" for change, then in advice]
        if not advice or advice[-1][1].peak > memory * GIB:
            lines.append("  and it still does not fit: use more or larger GPUs")
    return "\n".join(lines)
