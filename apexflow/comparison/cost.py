"""What a step of a method costs: bytes that it holds, and seconds. And, before anything is trained, whether it can be taken."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, median_high
from typing import Any

from torch import Tensor

from apexflow.comparison.plan import Plan
from apexflow.data.cache import CachedSet
from apexflow.data.hub import located
from apexflow.data.readers import recognise
from apexflow.errors import UserError
from apexflow.evaluation.against import CLIP
from apexflow.evaluation.suite import needs
from apexflow.training.loop import start
from apexflow.training.memory import kept_for_backward
from apexflow.training.prepare import finished_cache
from apexflow.training.run import Run, answering
from apexflow.training.step import make_batch, micro_batches

# How to compare a method with other settings than its defaults: errors of a run name the `objective` of its own recipe.
OTHER_SETTINGS = "; a comparison takes objective.* from the recipe that --recipe names, for the method of that recipe"


def check_pictures(plan: Plan) -> None:
    """UserError for a set of prompts alone: there are no true pictures to measure against, whatever the methods need."""
    data = plan.recipe.data
    cached = finished_cache(data)
    if cached is not None:
        pictures = CachedSet(cached).has_pictures
    else:
        pictures = data.drawn or recognise(located(str(data.source))).kind.pictures
    if not pictures:
        raise UserError(
            f"{data.told} holds only prompts, and a comparison needs true pictures to measure against: make them with "
            "`apexflow synthesize`"
        )


def check_clip(plan: Plan) -> None:
    """UserError for a folder that is not there, or that scenes have no use for."""
    if plan.clip is None:
        return
    if plan.scenes:
        raise UserError(
            f"--clip cannot be used with {plan.recipe.data.told}, scenes that mini-GenEval scores: leave it out"
        )
    needs(plan.clip, "--clip", CLIP, Path.is_dir)


def measure(plan: Plan, name: str) -> dict[str, Any]:
    """Memory of a method's first step and its networks; UserError says why this backbone cannot take it."""
    with tempfile.TemporaryDirectory() as scratch:
        recipe = plan.recipe_for(name, Path(scratch) / "run", plan.rates[0], 10)
        try:
            run = start(recipe, resume=False)
            kept = most_kept(run)
        except UserError as error:
            mend = OTHER_SETTINGS if "objective." in str(error) else ""
            raise UserError(f"method {name} cannot be compared on {plan.recipe.model}: {error}{mend}") from error
    return {"bytes": lasting(run) + kept, "further": sorted(set(run.trainees) - {"student"})}


def lasting(run: Run) -> int:
    """Bytes of all weights, and of gradients and both moments of what is trained."""
    trained = list(run.trained.values())
    everything = [p for network in run.roles.everything for p in network.parameters()]
    return _bytes([*everything, *trained]) + 3 * _bytes(trained)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


def most_kept(run: Run) -> int:
    """Bytes that a micro-batch of the next step keeps for backward: those of the one that keeps most."""
    found = []
    for part in micro_batches(run.recipe):
        # Views of weights count, here as in every published table; only the weights themselves do not.
        with kept_for_backward(()) as kept, answering(run.recipe, run.device):
            losses = run.objective(run.networks, make_batch(run, part), run.memory)
            found.append(kept.bytes)
        del losses  # whose graph is what was counted
    return max(found)


def seconds_a_step(lines: Sequence[dict[str, Any]]) -> float:
    """Mean over steps of a run's metrics, pauses of the machine left out.

    A pause is known among the steps that moved the same networks: where these take turns, some take many times as long as others.
    """
    turns: dict[frozenset[str], list[float]] = {}
    for earlier, later in pairwise(lines):
        if (time := later["seconds"] - earlier["seconds"]) > 0:
            turns.setdefault(frozenset(key for key in later if key.startswith("grad_norm")), []).append(time)
    if not turns:
        return lines[0]["seconds"]
    return sum(len(times) * _undisturbed(times) for times in turns.values()) / sum(map(len, turns.values()))


def _undisturbed(times: Sequence[float]) -> float:
    """The mean without what is beyond three times the median."""
    bound = 3 * median_high(times)
    return mean(time for time in times if time <= bound)
