"""The state of a run: what a step reads and changes, and a checkpoint keeps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apexflow.backbones import Backbone
from apexflow.backbones.folder import CHECKPOINTS, RECIPE
from apexflow.data.mixture import Cached
from apexflow.errors import UserError
from apexflow.objectives import Networks, Objective
from apexflow.progress import console
from apexflow.training.checkpoint import (
    COUNTERS,
    Checkpoint,
    check_fit,
    read_into,
    read_shapes,
    read_state,
    save_checkpoint,
)
from apexflow.training.config import Recipe
from apexflow.training.distributed import rank, together, world
from apexflow.training.engine import Engine
from apexflow.training.preview import Shown
from apexflow.training.roles import Roles

# Settings that change what is made of the trained weights, or how steps are shared and kept, but no step itself.
FINISHING = {"steps", "minutes", "preview", "sampling_steps", "sampling_guidance", "suite", "checkpoint_every", "keep"}
FINISHING |= {"device", "parallel", "micro_batch", "bad_steps"}
# Settings that decide which weights are trained.
MAKING = {"model", "teacher", "method", "objective", "tuning"}
# What to do about settings that a checkpoint does not go on with.
OTHERWISE = "restore the setting, or choose another output for a new run"
# What each kind of optimizer keeps of a parameter: its number of steps, and moments of the parameter's shape.
MOMENTS = {"adamw": ("step", "exp_avg", "exp_avg_sq"), "adamw8bit": ("step", "state1", "state2")}
# What is made in the folder before the recipe is written there.
BEFORE_A_RUN = {"cache", ".cache.lock", ".cache-finishing.lock", "base", ".partial-base"}


def holds_run(folder: Path) -> bool:
    """Whether a folder that is not empty is a run's, or what one left that ended while it prepared."""
    held = {entry.name for entry in folder.iterdir()}
    return RECIPE in held or held <= BEFORE_A_RUN


def answering(recipe: Recipe, device: torch.device) -> torch.autocast:
    """Within, networks answer in the run's precision. A base in eight bits beside adapters in float32 answers in no other way."""
    return torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16")


@dataclass
class Trainee:
    """A trained role: its parameters by name, the optimizer that moves them, and its learning rate over the recipe's."""

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    rate: float = 1.0

    @property
    def moved(self) -> bool:
        """Whether the loss of this step has reached it."""
        return any(parameter.grad is not None for parameter in self.parameters.values())


@dataclass
class Run:
    """Everything that a step needs and a checkpoint keeps. `trainees` by role; names of parameters differ between them."""

    recipe: Recipe
    folder: Path
    backbone: Backbone
    data: Cached
    objective: Objective
    roles: Roles
    engine: Engine
    trainees: dict[str, Trainee]
    device: torch.device
    shown: Shown | None = None  # by previews; None: this process draws none
    memory: dict[str, Tensor] = field(default_factory=dict)  # this process's own
    step: int = 0
    bad: int = 0
    seconds: float = 0.0  # by the clock
    device_seconds: float = 0.0  # of all processes together
    peak_gib: float = 0.0  # the most that one of them held

    @property
    def networks(self) -> Networks:
        return self.engine.networks

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for trainee in self.trainees.values() for name, p in trainee.parameters.items()}


def save(run: Run) -> Path:
    """Checkpoint a run: everything that the next step depends on. All processes take part.

    While losses are not finite no older checkpoint is deleted: a run that diverges has to go back to one.
    """
    tensors: dict[str, dict[str, Tensor]] = {
        "trained": dict(run.trained),
        "average": run.roles.average,
        "optimizer": {f"{name}/{key}": value for name, p, state in _moments(run) for key, value in state.items()},
        "memory": {f"{rank()}/{name}": tensor for name, tensor in run.memory.items()},
    }
    return save_checkpoint(
        run.folder / CHECKPOINTS, Checkpoint(tensors, state_of(run)), None if run.bad else run.recipe.keep
    )


def state_of(run: Run) -> dict[str, Any]:
    """What a checkpoint says beside its tensors."""
    state: dict[str, Any] = {name: getattr(run, name) for name in COUNTERS}
    state |= {"world": world(), "recipe": run.recipe.to_dict(), "size": run.data.size}
    return state | {"objective": asdict(run.objective)}  # with what its model has put in, which no recipe says


def _moments(run: Run) -> list[tuple[str, nn.Parameter, dict[str, Tensor]]]:
    return [
        (name, parameter, {key: torch.as_tensor(value) for key, value in _state(trainee, parameter).items()})
        for trainee in run.trainees.values()
        for name, parameter in trainee.parameters.items()
    ]


def _state(trainee: Trainee, parameter: nn.Parameter) -> dict[str, Any]:
    return trainee.optimizer.state.get(parameter, {})


def restore(run: Run, path: Path) -> None:
    """Put a run back where a checkpoint left it, whatever number of processes wrote it.

    UserError if the checkpoint is damaged or of another model.
    """
    with together():
        state, found = read_state(path, path.name), read_shapes(path)
        before = state["recipe"] | {"output": run.recipe.output}  # a folder may be moved
        said = changed(before, run.recipe.to_dict())
        try:
            check_fit(run.trained, found, "trained", str(path))
            check_fit(run.roles.average, found, "average", str(path))
        except UserError as error:
            # Whoever changed a setting is helped by its name, not by that of a tensor.
            if cause := [one for one in said if one.partition(" ")[0].partition(".")[0] in MAKING]:
                raise UserError(f"{path} cannot be resumed with {', '.join(cause)}: {OTHERWISE}") from error
            raise
        targets = {f"trained/{name}": p.data for name, p in run.trained.items()}
        targets |= {f"average/{name}": tensor for name, tensor in run.roles.average.items()}
        targets |= _optimizer_targets(run, found, str(path))
        _check_moments(run, state, path, said)
        targets |= _memory_targets(run, found, state["world"])
    with together():
        read_into(path, targets)
    for trainee in run.trainees.values():
        for moments in trainee.optimizer.state.values():
            # The optimizer in eight bits counts its steps in a plain integer.
            if not moments["step"].is_floating_point():
                moments["step"] = int(moments["step"])
    for name in COUNTERS:
        setattr(run, name, state[name])
    console.print(f"resumed {path}")
    if isinstance(objective := state.get("objective"), dict):
        said = [one for one in said if not one.startswith("objective ")]
        said += changed(objective, asdict(run.objective), "objective.")
    _check_left(run, said)
    if said:
        console.print(f"settings changed since the last step: {', '.join(said)}")


def ended(run: Run) -> bool:
    """Whether all steps of the recipe are made, or its time is up."""
    minutes = run.recipe.minutes
    return run.step >= run.recipe.steps or (minutes is not None and run.seconds > 60 * minutes)


def _check_left(run: Run, said: Sequence[str]) -> None:
    """UserError where settings are changed and no step is left to make with them: they would be told as those of the run."""
    if run.step > run.recipe.steps:
        raise UserError(f"{run.folder} has already made {run.step} steps: set steps={run.step} or more")
    trained = [one for one in said if one.partition(" ")[0].partition(".")[0] not in FINISHING]
    if trained and ended(run):
        raise UserError(
            f"{run.folder} has no steps left after {run.step}, so {trained[0]} would have no effect: raise "
            "steps (or minutes), or restore the settings"
        )


def changed(before: Mapping[str, Any], now: Mapping[str, Any], section: str = "") -> list[str]:
    """What a recipe says otherwise than it did, by dotted key; what was not known then is left out."""
    said = []
    for key, old in before.items():
        new = json.loads(json.dumps(now.get(key, old)))  # as a checkpoint keeps it
        # What a recipe says of its objective is no more than was given, so it is told whole.
        if isinstance(old, dict) and isinstance(new, dict) and key != "objective":
            said += changed(old, new, f"{section}{key}.")
        elif new != old:
            said.append(f"{section}{key} {new} instead of {old}")
    return said


def _optimizer_targets(run: Run, found: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    """Make room for the moments that a checkpoint holds, laid out like their parameters."""
    states = {name: (trainee, p) for trainee in run.trainees.values() for name, p in trainee.parameters.items()}
    targets = {}
    for full, saved in found.items():
        if not full.startswith("optimizer/"):
            continue
        name, key = full.removeprefix("optimizer/").rsplit("/", 1)
        if name not in states:
            raise UserError(f"{what}: optimizer state belongs to another model: {name} is not trained here")
        trainee, parameter = states[name]
        alike = saved.shape == parameter.shape
        # What is not like its parameter: the number of steps, which a fused optimizer reads on the device, and the tables of
        # moments in eight bits.
        on_cpu = saved.ndim == 0 and not trainee.optimizer.defaults.get("fused")
        where = "cpu" if on_cpu else parameter.device
        value = torch.empty_like(parameter.data, dtype=saved.dtype) if alike else torch.empty_like(saved, device=where)
        trainee.optimizer.state[parameter][key] = targets[full] = value
    return targets


def _check_moments(run: Run, state: Mapping[str, Any], path: Path, said: Sequence[str]) -> None:
    """UserError where a checkpoint lacks what the optimizer's next step would ask for: it is damaged, unless another kind of
    optimizer is among what is `said` otherwise than in it."""
    kind, moments = run.recipe.optimizer.kind, _moments(run)
    # Where no step was finite, and a parameter that no loss has reached, there are none.
    lack = "the optimizer's state" if state["bad"] < state["step"] and not any(held for *_, held in moments) else ""
    for name, parameter, held in moments:
        for key in MOMENTS[kind] if held else ():
            if key not in held or held[key].shape != (() if key == "step" else parameter.shape):
                lack = lack or f"{key} of {name}, which optimizer.kind={kind} needs"
    if lack and (cause := [one for one in said if one.startswith("optimizer.kind ")]):
        raise UserError(f"{path} cannot be resumed with {cause[0]}: {OTHERWISE}")
    if lack:
        raise UserError(f"checkpoint {path} lacks {lack}: delete it to resume from the one before")


def _memory_targets(run: Run, found: dict[str, Tensor], saved_world: int) -> dict[str, Tensor]:
    """Make room for an objective's memory. Another number of processes takes over what there is, in turn."""
    prefix = f"memory/{rank() % saved_world}/"
    names = {full: full.removeprefix(prefix) for full in found if full.startswith(prefix)}
    run.memory = {name: torch.empty_like(found[full], device=run.device) for full, name in names.items()}
    return {full: run.memory[name] for full, name in names.items()}
