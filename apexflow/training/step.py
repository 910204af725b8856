"""One step: which rows, their losses and gradients, the optimizers, the average."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from apexflow.backbones.folder import CHECKPOINTS
from apexflow.conditioning import Condition, replace_rows
from apexflow.errors import Diverged
from apexflow.objectives import Batch
from apexflow.randomness import RowRandom, mix
from apexflow.training.checkpoint import checkpoints
from apexflow.training.config import Recipe
from apexflow.training.distributed import own_rows, summed, together, world
from apexflow.training.engine import sum_gradients
from apexflow.training.roles import update_average
from apexflow.training.run import Run, Trainee, answering
from apexflow.training.sharding import whole


def training_step(run: Run) -> dict[str, float]:
    """One step of every optimizer over a global batch; the numbers to record. A non-finite step is skipped."""
    recipe = run.recipe
    parts = accumulate(run)
    moved = {role: trainee for role, trainee in run.trainees.items() if trainee.moved}
    clipped = {norm_of(role): clip(trainee, recipe.optimizer.clip_norm) for role, trainee in moved.items()}
    told = numbers(parts | clipped)
    terms, norms = summed({name: told[name] for name in parts}), {name: told[name] for name in clipped}
    rate = learning_rate(recipe, run.step)
    if all(math.isfinite(value) for value in (*terms.values(), *norms.values())):
        for trainee in moved.values():
            for group in trainee.optimizer.param_groups:
                group["lr"] = rate * trainee.rate
            trainee.optimizer.step()
        if "student" in moved:
            update_average(run.roles, recipe.ema_decay, run.step)
        run.bad = 0
    else:
        run.bad += 1
        if run.bad >= min(recipe.bad_steps, max(recipe.steps // 2, 1)):  # a run too short for the limit fails, too
            last = [f"; the last checkpoint is {path}" for path in checkpoints(run.folder / CHECKPOINTS)[-1:]]
            raise Diverged(
                f"the loss was not finite for {run.bad} steps in a row (step {run.step}): lower optimizer.learning_rate"
                + "".join(last)
            )
    for trainee in run.trainees.values():
        trainee.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    return terms | norms | {"learning_rate": rate, "skipped": float(run.bad > 0)}


def norm_of(role: str) -> str:
    """What the norm of a role's gradient is recorded as."""
    return "grad_norm" if role == "student" else f"grad_norm_{role}"


def numbers(scalars: dict[str, Tensor]) -> dict[str, float]:
    """Scalars of one device as plain numbers. They come over together, since each transfer waits for the device."""
    values = torch.stack([scalar.double() for scalar in scalars.values()]).tolist() if scalars else []
    return dict(zip(scalars, values, strict=True))


def accumulate(run: Run) -> dict[str, Tensor]:
    """Forward and backward over this process's rows in micro-batches; its part of the terms to show, in double precision.

    They stay on the device, so that the next rows are read while it computes. Afterwards every gradient is that of the global
    batch, in all processes.
    """
    recipe = run.recipe
    parts = micro_batches(recipe)
    terms: dict[str, Tensor] = {}
    for number, part in enumerate(parts):
        with together():
            batch = make_batch(run, part)
        with run.engine.micro_batch(batch, last=number == len(parts) - 1):
            with answering(recipe, run.device):
                losses = run.objective(run.networks, batch, run.memory)
                total = losses.everything + run.engine.owed()
            total.backward()
        for name, value in losses.terms.items():
            terms[name] = terms.get(name, 0.0) + value.double()
    if world() > 1:
        for role, trainee in run.trainees.items():
            if role != "student":
                sum_gradients([p for p in trainee.parameters.values() if not isinstance(p, DTensor)])
    return terms


def micro_batches(recipe: Recipe) -> tuple[Tensor, ...]:
    """This process's rows of a global batch, as many at once as the recipe says."""
    rows = own_rows(recipe.batch)
    return rows.split(recipe.micro_batch or len(rows))


def clip(trainee: Trainee, most: float) -> Tensor:
    """Scale gradients down to a norm of at most `most`; the norm before."""
    return whole(torch.nn.utils.clip_grad_norm_(list(trainee.parameters.values()), most))


def make_batch(run: Run, rows: Tensor) -> Batch:
    """The rows of this step's global batch: which pictures, their conditions and their random numbers."""
    recipe = run.recipe
    index = run.data.batch_rows(run.step, rows.tolist(), recipe.batch, recipe.seed)
    random = RowRandom(recipe.seed, run.step, rows.tolist(), run.device)
    dropped = RowRandom(mix(recipe.seed, 1), run.step, rows.tolist()).uniform() < recipe.caption_dropout
    x, c = run.data.latents(index).to(run.device, non_blocking=True), _condition(run, index, dropped)
    following = partial(_following, run, rows) if recipe.batch > 1 else None
    return Batch(
        x, c, random, rows.to(run.device, non_blocking=True), recipe.batch, run.step / recipe.steps, run.step, following
    )


@torch.no_grad()
def _following(run: Run, rows: Tensor) -> Condition:
    """Conditions of the rows after these in this step's global batch; no caption is dropped."""
    recipe = run.recipe
    numbers = ((rows + 1) % recipe.batch).tolist()
    index = run.data.batch_rows(run.step, numbers, recipe.batch, recipe.seed)
    return _condition(run, index, torch.zeros(len(index), dtype=torch.bool))


def _condition(run: Run, index: list[int], dropped: Tensor) -> Condition:
    """Conditions from the text encoder while it is trained, else from the cache; dropped captions become the null prompt."""
    if run.recipe.tuning.text_encoder:
        captions = run.data.captions(index)
        return run.backbone.encode_prompts(
            ["" if drop else text for text, drop in zip(captions, dropped.tolist(), strict=True)]
        )
    c = run.data.condition(index).to(run.device)
    return c if run.networks.null is None else replace_rows(c, dropped, run.networks.null)


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then constant or a cosine to a fiftieth of the peak."""
    settings = recipe.optimizer
    rate = settings.learning_rate * min(1.0, (step + 1) / max(settings.warmup, 1))
    if settings.schedule == "cosine":
        rate *= 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(step / recipe.steps, 1.0)))
    return rate
