"""A run that is interrupted between two checkpoints and goes on."""

from __future__ import annotations

from apexflow.training.config import Recipe
from apexflow.training.loop import start, train
from apexflow.training.run import save
from apexflow.training.step import training_step


def train_in_parts(recipe: Recipe) -> None:
    """Save after two steps, take a third that is lost, as when a process is killed, and resume to the end."""
    run = start(recipe, resume=False)
    for _ in range(2):
        training_step(run)
    save(run)
    training_step(run)
    train(recipe, resume=True)
