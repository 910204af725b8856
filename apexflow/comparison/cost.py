"""What a step of a method costs: bytes that it holds, and seconds. And, before anything is trained, whether it can be taken."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apexflow.comparison.plan import Plan
from apexflow.errors import UserError
from apexflow.training.loop import start
from apexflow.training.run import Run
from apexflow.training.step import accumulate


def measure(plan: Plan, name: str) -> dict[str, Any]:
    """Memory of a method's first step and its networks; UserError says why this backbone cannot take it."""
    with tempfile.TemporaryDirectory() as scratch:
        recipe = plan.recipe_for(name, Path(scratch) / "run", plan.rates[0], 10)
        try:
            run = start(recipe, resume=False)
            with saved_for_backward() as saved:
                accumulate(run)
        except UserError as error:
            raise UserError(f"method {name} cannot be compared on {plan.recipe.model}: {error}") from error
    return {"bytes": held(run) + sum(saved.values()), "further": sorted(set(run.trainees) - {"student"})}


def held(run: Run) -> int:
    """Bytes of all weights, and of gradients and both moments of what is trained."""
    trained = list(run.trained.values())
    everything = [p for network in run.roles.everything for p in network.parameters()]
    return _bytes([*everything, *trained]) + 3 * _bytes(trained)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


@contextmanager
def saved_for_backward() -> Iterator[dict[int, int]]:
    """Within, what autograd keeps for backward: bytes by place in memory, so that nothing counts twice."""
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved


def seconds_a_step(lines: Sequence[dict[str, Any]]) -> float:
    """Mean over steps of a run's metrics, pauses of the machine left out (beyond three times the median)."""
    times = sorted(later["seconds"] - earlier["seconds"] for earlier, later in pairwise(lines))
    times = [time for time in times if time > 0] or [lines[0]["seconds"]]
    kept = [time for time in times if time <= 3 * times[len(times) // 2]]
    return sum(kept) / len(kept)
