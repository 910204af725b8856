"""The training loop, top to bottom: recipe -> model, data, roles -> steps -> checkpoints -> a saved model and a report."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apexflow.backbones import Backbone
from apexflow.conditioning import Condition, replace_rows
from apexflow.data.cache import CachedSet
from apexflow.errors import Stopped, UserError
from apexflow.evaluation.runner import Settings, evaluate, write_json
from apexflow.generator import load, pick_device
from apexflow.objectives import Batch, Networks
from apexflow.progress import Progress, console
from apexflow.randomness import RowRandom, mix
from apexflow.report import write_report
from apexflow.training.checkpoint import (
    Checkpoint,
    checkpoints,
    copy_into,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from apexflow.training.config import Recipe
from apexflow.training.journal import Journal
from apexflow.training.prepare import prepare
from apexflow.training.preview import save_preview
from apexflow.training.roles import FullRoles, LoraRoles, make_roles, update_average
from apexflow.training.saving import save_model

CHECKPOINTS = "checkpoints"


@dataclass
class Run:
    """Everything that a step needs and a checkpoint keeps."""

    recipe: Recipe
    folder: Path
    backbone: Backbone
    data: CachedSet
    objective: Any
    roles: FullRoles | LoraRoles
    networks: Networks
    optimizer: torch.optim.Optimizer
    device: torch.device
    memory: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    bad: int = 0
    seconds: float = 0.0


def train(recipe: Recipe, resume: bool = False) -> Path:
    """Carry out a recipe; the folder of the saved model.

    Raises UserError for bad input, an output that exists without `resume`, or a loss that stays non-finite. On Ctrl-C or
    SIGTERM the run is saved and Stopped raised.
    """
    run = start(recipe, resume)
    journal = Journal(run.folder, run.step)
    began, before = time.monotonic(), run.seconds
    with (
        interruptible() as stop,
        Progress(f"training {recipe.method}", None if recipe.minutes else recipe.steps, run.step) as progress,
    ):
        while run.step < recipe.steps and not _time_is_up(run):
            numbers = training_step(run)
            run.seconds = before + time.monotonic() - began
            journal.write(run.step, numbers | {"seconds": run.seconds})
            progress.advance(note=_note(numbers))
            last = run.step == recipe.steps
            if run.step % recipe.preview.every == 0 or last:
                save_preview(run.backbone, run.roles, recipe.preview, run.folder, run.step)
            if run.step % recipe.checkpoint_every == 0 or last or stop.asked:
                save(run)
            if stop.asked:
                journal.close()
                raise Stopped(f"saved at step {run.step}; go on with the same command and --resume")
    if run.step % recipe.checkpoint_every != 0 and run.step != recipe.steps:
        save(run)  # the time limit ended the run between checkpoints
    journal.close()
    return finish(run)


def start(recipe: Recipe, resume: bool) -> Run:
    """Build a run from its recipe, and restore it from its last checkpoint with `resume`."""
    folder = Path(recipe.output)
    saved = checkpoints(folder / CHECKPOINTS)
    if folder.exists() and any(folder.iterdir()) and not resume:
        raise UserError(f"output {folder} exists: pass --resume to go on with it, or choose another with output=FOLDER")
    torch.manual_seed(recipe.seed)
    torch.set_flush_denormal(True)  # denormals in the optimizer's moments slow a CPU down many times
    device = torch.device(pick_device(recipe.device))
    objective = recipe.build_objective()
    backbone, data = prepare(recipe, folder, device)
    roles = make_roles(backbone, recipe.tuning, objective.needs)
    with torch.no_grad():
        null = backbone.encode_prompts([""])
    optimizer = torch.optim.AdamW(
        list(roles.trained.values()),
        lr=recipe.optimizer.learning_rate,
        betas=recipe.optimizer.betas,
        weight_decay=recipe.optimizer.weight_decay,
    )
    run = Run(recipe, folder, backbone, data, objective, roles, roles.networks(null), optimizer, device)
    if resume and saved:
        restore(run, saved[-1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.json").write_text(json.dumps(recipe.to_dict(), indent=2))
    return run


def training_step(run: Run) -> dict[str, float]:
    """One optimizer step over a global batch, in micro-batches; the numbers to record. A non-finite step is skipped."""
    recipe = run.recipe
    terms: dict[str, float] = {}
    for rows in torch.arange(recipe.batch).split(recipe.micro_batch or recipe.batch):
        with torch.autocast(run.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            losses = run.objective(run.networks, make_batch(run, rows), run.memory)
        losses.total.backward()
        for name, value in losses.terms.items():
            terms[name] = terms.get(name, 0.0) + float(value)
    parameters = list(run.roles.trained.values())
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, recipe.optimizer.clip_norm))
    rate = learning_rate(recipe, run.step)
    if math.isfinite(norm) and all(math.isfinite(value) for value in terms.values()):
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        run.optimizer.step()
        update_average(run.roles, recipe.ema_decay, run.step)
        run.bad = 0
    else:
        run.bad += 1
        if run.bad >= recipe.bad_steps:
            raise UserError(
                f"the loss was not finite for {run.bad} steps in a row (step {run.step}): lower "
                f"optimizer.learning_rate; the last checkpoint is in {run.folder / CHECKPOINTS}"
            )
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    return terms | {"grad_norm": norm, "learning_rate": rate, "skipped": float(run.bad > 0)}


def make_batch(run: Run, rows: Tensor) -> Batch:
    """The rows of this step's global batch: which pictures, their conditions and their random numbers."""
    recipe = run.recipe
    index = [data_row(run.step * recipe.batch + row, len(run.data), recipe.seed) for row in rows.tolist()]
    random = RowRandom(recipe.seed, run.step, rows.tolist(), run.device)
    dropped = RowRandom(mix(recipe.seed, 1), run.step, rows.tolist()).uniform() < recipe.caption_dropout
    x = run.data.latents[index].float().to(run.device)
    return Batch(x, _condition(run, index, dropped), random, rows.to(run.device), recipe.batch, run.step / recipe.steps)


def _condition(run: Run, index: list[int], dropped: Tensor) -> Condition:
    """Conditions from the text encoder while it is trained, else from the cache; dropped captions become the null prompt."""
    if run.data.embeds is None:
        prompts = ["" if drop else run.data.captions[i] for i, drop in zip(index, dropped.tolist(), strict=True)]
        return run.backbone.encode_prompts(prompts)
    c = run.data.condition(index).to(run.device)
    return c if run.networks.null is None else replace_rows(c, dropped.to(run.device), run.networks.null)


def data_row(position: int, count: int, seed: int) -> int:
    """Which picture stands at a position of the endless, shuffled stream of epochs."""
    epoch, offset = divmod(position, count)
    return int(epoch_order(epoch, count, seed)[offset])


@lru_cache(maxsize=2)
def epoch_order(epoch: int, count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(mix(seed, 2, epoch)))


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then constant or a cosine to a fiftieth of the peak."""
    settings = recipe.optimizer
    rate = settings.learning_rate * min(1.0, (step + 1) / max(settings.warmup, 1))
    if settings.schedule == "cosine":
        rate *= 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(step / recipe.steps, 1.0)))
    return rate


def save(run: Run) -> Path:
    """Checkpoint a run: everything that the next step depends on."""
    tensors: dict[str, dict[str, Tensor]] = {
        "trained": dict(run.roles.trained),
        "average": run.roles.average,
        "optimizer": optimizer_tensors(run.optimizer, run.roles.trained),
        "memory": run.memory,
    }
    state = {"step": run.step, "bad": run.bad, "seconds": run.seconds, "recipe": run.recipe.to_dict()}
    return save_checkpoint(run.folder / CHECKPOINTS, Checkpoint(tensors, state), run.recipe.keep)


def restore(run: Run, path: Path) -> None:
    """Put a run back where a checkpoint left it; UserError if the checkpoint is damaged or of another model."""
    checkpoint = load_checkpoint(path)
    copy_into(run.roles.trained, checkpoint.tensors["trained"], str(path))
    copy_into(run.roles.average, checkpoint.tensors["average"], str(path))
    restore_optimizer(run.optimizer, run.roles.trained, checkpoint.tensors["optimizer"])
    run.memory = {name: tensor.to(run.device) for name, tensor in checkpoint.tensors["memory"].items()}
    run.step, run.bad, run.seconds = (checkpoint.state[key] for key in ("step", "bad", "seconds"))
    console.print(f"resumed {path}")


def finish(run: Run) -> Path:
    """Save the averaged student as a model folder, score it if the recipe says so, write the report; the folder's path."""
    card = {"steps": run.step, "seconds": round(run.seconds)}
    model = save_model(run.backbone, run.roles, run.recipe, run.folder, card)
    scores = {}
    if run.recipe.suite:
        settings = Settings(suite=run.recipe.suite, per_prompt=1)
        scores["student"] = evaluate(load(str(model), run.device.type), settings, name="student")
        write_json(run.folder / "scores.json", scores)
    write_report(run.folder, scores)
    return model


def _time_is_up(run: Run) -> bool:
    return run.recipe.minutes is not None and run.seconds > 60 * run.recipe.minutes


def _note(numbers: dict[str, float]) -> str:
    shown = {k: v for k, v in numbers.items() if k not in ("learning_rate", "skipped")}
    return "  ".join(f"{name} {value:.3f}" for name, value in shown.items())


@dataclass
class Stop:
    asked: bool = False


@contextmanager
def interruptible() -> Iterator[Stop]:
    """Within, Ctrl-C and SIGTERM ask for a stop after the current step; a second Ctrl-C stops at once."""
    stop = Stop()

    def ask(number: int, frame: object) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True
        console.print("stopping after this step (again to stop at once)")

    try:
        previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever runs us there handles signals
        previous = {}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
