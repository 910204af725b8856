"""The training loop, top to bottom: recipe -> model, data, roles -> steps -> checkpoints -> a saved model and a report."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apexflow.backbones import Backbone
from apexflow.backbones.folder import CHECKPOINTS, RECIPE
from apexflow.backbones.precision import multiply_in_tf32
from apexflow.backbones.storage import storing
from apexflow.conditioning import Condition
from apexflow.data.mixture import Cached
from apexflow.devices import device_name
from apexflow.errors import Stopped, UserError, in_a_shell, is_out_of_memory, is_taken, printable
from apexflow.evaluation.runner import EvaluationSettings, evaluate
from apexflow.files import make_folder, write_json
from apexflow.generator import load
from apexflow.objectives import Objective
from apexflow.progress import Progress, console
from apexflow.reporting.report import write_report
from apexflow.training.checkpoint import checkpoints
from apexflow.training.config import Recipe
from apexflow.training.distributed import gather, in_turn, joined, leads, only_run_in, own_device, own_rows, together
from apexflow.training.engine import Engine, Replicated, Sharded
from apexflow.training.further import copies, make_furthers
from apexflow.training.journal import COST, SOURCES, Journal, last_step
from apexflow.training.prepare import null_condition, prepare
from apexflow.training.preview import save_preview
from apexflow.training.roles import Roles, frozen_dtype, make_roles
from apexflow.training.run import Run, Trainee, answering, ended, holds_run, restore, save, state_of
from apexflow.training.saving import save_model
from apexflow.training.sharding import Place, all_processes, shard_and_read
from apexflow.training.sources import skipped_lines, source_line, used
from apexflow.training.spent import forget_peak, peak_gib, spend, spent
from apexflow.training.step import training_step


def train(recipe: Recipe, resume: bool = False) -> Path:
    """Carry out a recipe; the folder of the saved model. Started by torchrun, its processes share every batch.

    Raises UserError for bad input, an output that exists without `resume` or in which another run goes on, or a loss that stays
    non-finite. On Ctrl-C or SIGTERM to any process the run is saved and Stopped raised.
    """
    with joined(own_device(recipe.device)), only_run_in(Path(recipe.output)):
        run = start(recipe, resume)
        steps(run)
        return finish(run)


def steps(run: Run) -> None:
    """Train until the recipe's end or time limit, with previews and checkpoints on the way."""
    recipe = run.recipe
    with together():
        journal = Journal(run.folder, run.step, silent=not leads())
    forget_peak(run.device)
    began, before = time.monotonic(), run.seconds
    with (
        interruptible() as stop,
        Progress(f"training {recipe.method}", None if recipe.minutes else recipe.steps, run.step) as progress,
    ):
        while not ended(run):
            numbers = training_step(run)
            heard = gather({"seconds": time.monotonic() - began, "peak": peak_gib(run.device), "stop": stop.asked})
            stopped = any(each["stop"] for each in heard)
            spend(run, before + heard[0]["seconds"], max(each["peak"] for each in heard))
            journal.write(run.step, numbers | {"seconds": run.seconds})
            progress.advance(note=_note(numbers))
            last = ended(run)
            if checkpoint_due(run) or last or stopped:
                save(run)
            if run.step % recipe.preview.every == 0 or last:
                journal.show(run.step, {f"previews/{name}": value for name, value in preview(run).items()})
            if stopped:
                journal.close()
                raise Stopped(f"saved at step {run.step}; resume with the same command and --resume")
    journal.close()


def start(recipe: Recipe, resume: bool) -> Run:
    """Build a run from its recipe, and restore it from its last checkpoint with `resume`."""
    folder, device = Path(recipe.output), own_device(recipe.device)
    with together():
        own_rows(recipe.batch)
        if leads() and is_taken(folder):
            _check_taken(recipe, folder, resume)
        if recipe.optimizer.kind == "adamw8bit":
            adam_in_eight_bits()
    torch.manual_seed(recipe.seed)
    torch.set_flush_denormal(True)  # denormals in the optimizer's moments slow a CPU down many times
    saved = gather([str(path) for path in checkpoints(folder / CHECKPOINTS)])[0] if resume else []
    made = in_turn(lambda: prepare(recipe, folder, device, fresh=not saved))
    backbone, objective = made.backbone, made.objective
    multiply_in_tf32(backbone.transformer, device)
    null = null_condition(recipe, backbone, made.data).to(device)
    with together():
        place, further = _placing(made.parallel, recipe, device), copies(objective.further)
        roles = make_roles(backbone, recipe, objective.needs, place, made.teacher, further, made.start)
    engine = _engine(made.parallel, backbone, roles, recipe, null)
    trainees = {"student": Trainee(roles.trained, optimizer_of(recipe, list(roles.trained.values())))}
    trainees |= _further(recipe, objective, backbone, roles, engine, null)
    run = Run(recipe, folder, backbone, made.data, objective, roles, engine, trainees, device, made.shown)
    if saved:
        restore(run, Path(saved[-1]))
    elif resume:
        console.print(f"{folder} has no checkpoint: the run starts from the first step")
    with together():
        if leads():
            make_folder(folder)
            write_json(folder / RECIPE, recipe.to_dict())
            _tell_sources(recipe, folder, made.data)
    return run


def _tell_sources(recipe: Recipe, folder: Path, data: Cached) -> None:
    """Keep what is trained on beside the run, and say it where it is several sets, and what of them could not be used."""
    sources = used(recipe.data, data)
    write_json(folder / SOURCES, {"sources": sources})
    if len(sources) > 1:
        console.print("\n".join(["trained on", *map(source_line, sources)]))
    for line in skipped_lines(recipe.data, data):
        console.print(printable(line))


def _check_taken(recipe: Recipe, folder: Path, resume: bool) -> None:
    if not resume:
        raise UserError(f"output {folder} exists: pass --resume to continue it, or choose another with output=FOLDER")
    if not holds_run(folder):
        raise UserError(f"output {folder} is not the output of a run: choose another with output=FOLDER")
    # Before its first checkpoint a run has nothing to lose, and begins again.
    trained = last_step(folder)
    if trained > recipe.checkpoint_every and not checkpoints(folder / CHECKPOINTS):
        raise UserError(
            f"{folder} has trained {trained} steps and has no intact checkpoint: put {folder / CHECKPOINTS} back, or delete "
            f"{folder} to start over"
        )


def _placing(kind: str, recipe: Recipe, device: torch.device) -> Place:
    """What is done with each network of a run, made on the CPU, once it is complete."""
    if kind != "fsdp":
        return storing(recipe.tuning.storage, frozen_dtype(recipe), device)
    half, mesh = recipe.precision == "bf16" and recipe.tuning.kind == "full", all_processes(device)
    return lambda network: shard_and_read(network, mesh, half, device)


def _engine(kind: str, backbone: Backbone, roles: Roles, recipe: Recipe, null: Condition) -> Engine:
    networks = roles.networks(null)
    if kind == "fsdp":
        return Sharded(networks)
    if kind == "ddp":
        partly_used = bool(backbone.without_gradient) or recipe.tuning.text_encoder
        return Replicated(networks, roles.modules, partly_used)
    return Engine(networks)


def _further(
    recipe: Recipe, objective: Objective, backbone: Backbone, roles: Roles, engine: Engine, null: Condition
) -> dict[str, Trainee]:
    """The networks that the method declares beside the student, each with its own optimizer, made known to the engine."""
    declared = objective.further
    with answering(recipe, null.embeds.device):
        furthers = make_furthers(declared, backbone, roles, roles.networks(null), null, recipe.seed)
    engine.add(furthers.fields, furthers.frozen)
    return {
        one.name: Trainee(trained, optimizer_of(recipe, list(trained.values()), one.betas), one.rate)
        for one, trained in zip(declared, furthers.trained.values(), strict=True)
    }


def optimizer_of(
    recipe: Recipe, parameters: list[nn.Parameter], betas: tuple[float, float] | None = None
) -> torch.optim.Optimizer:
    """The recipe's optimizer over a role's parameters, all on one device. UserError where an extra is missing."""
    settings = recipe.optimizer
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": betas or settings.betas,
        "weight_decay": settings.weight_decay,
    }
    if settings.kind == "adamw8bit":
        return adam_in_eight_bits()(parameters, **options)
    # One kernel over all weights on a GPU. What torch takes by itself there launches a dozen, and holds their size once more.
    return torch.optim.AdamW(parameters, **options, fused=parameters[0].device.type == "cuda" or None)


def adam_in_eight_bits() -> Any:
    """bitsandbytes' AdamW8bit; UserError where the extra is not installed."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError("optimizer.kind=adamw8bit needs bitsandbytes: pip install 'apexflow[8bit]'") from error
    return AdamW8bit


def checkpoint_due(run: Run) -> bool:
    """Whether it is time for a checkpoint. While losses are not finite it is not, if one was due before: it would hold
    the weights that gave such losses, and be the one that a run which diverges is told to go back to."""
    good, every = run.step - run.bad, run.recipe.checkpoint_every
    return run.step % every == 0 and (run.bad == 0 or good < every)


def preview(run: Run) -> dict[str, float]:
    """A sample grid, and what its pictures look like, in the first process."""
    with together():
        if run.shown is not None:
            wanted = run.recipe.preview
            drawn = (run.data.size, wanted, run.objective.sampling(wanted.steps))
            with answering(run.recipe, run.device):
                return save_preview(run.backbone, run.roles, run.shown, *drawn, run.folder, run.step)
    return {}


def finish(run: Run) -> Path:
    """Save the averaged student as a model folder, score it if the recipe says so, write the report; the folder's path."""
    cost = spent(state_of(run), run.recipe.batch) | {"device": device_name()}
    model = save_model(run.backbone, run.roles, run.recipe, run.folder, cost)
    if not leads():
        return model
    write_json(run.folder / COST, cost)
    write_report(run.folder)  # now, since scoring takes a second model and may find no room for it
    if run.recipe.suite:
        score(run, run.recipe.suite, model)
    return model


def score(run: Run, suite: str, model: Path) -> None:
    """Score the saved student, once a prompt, and write its report anew; UserError where there is no memory for that."""
    try:
        settings = EvaluationSettings(suite=suite, per_prompt=1)
        scores = {"student": evaluate(load(str(model), run.device.type), settings, name="student")}
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        mend = f"score it separately with `apexflow evaluate --model {in_a_shell(model)} --suite {suite}`"
        raise UserError(
            f"out of memory while scoring; the training is complete, and its model is {model}: {mend}"
        ) from error
    write_json(run.folder / "scores.json", scores)
    write_report(run.folder, scores)


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
