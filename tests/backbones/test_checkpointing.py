"""Gradient checkpointing over the table: the student computed again in backward is the student, whoever answered in between."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
import torch.utils.checkpoint
from tiny import BUILDERS

from apexflow.training.config import Recipe, Tuning
from apexflow.training.roles import checkpointed, make_roles


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", BUILDERS)
def test_gradients_are_those_without_it(name, kind, backbone_of):
    plain = student_gradients(backbone_of(name), kind, False)
    with mock.patch("torch.utils.checkpoint.checkpoint", wraps=torch.utils.checkpoint.checkpoint) as called:
        again = student_gradients(backbone_of(name), kind, True)
    assert called.call_count >= 2
    assert plain.keys() == again.keys()
    for parameter, grad in plain.items():
        assert (again[parameter] - grad).abs().max() <= 1e-5 * grad.abs().max().clamp_min(1), parameter


def student_gradients(backbone, kind, checkpointing):
    """Gradients by name, after passes of all roles as an objective makes them; every one that can exist does."""
    backbone = copy.deepcopy(backbone)
    tuning = Tuning(kind=kind, rank=2, checkpointing=checkpointing)
    torch.manual_seed(0)  # of fresh adapters
    roles = make_roles(backbone, Recipe(output="", tuning=tuning), ("teacher", "reference"))
    generator = torch.Generator().manual_seed(1)
    for parameter, average in zip(roles.trained.values(), roles.average.values(), strict=True):
        # A fresh adapter adds nothing: with it the roles could not be told apart.
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        average += 0.1 * torch.randn(parameter.shape, generator=generator)
    x = torch.randn(2, *backbone.latent_shape((32, 64)), generator=generator)
    t, c = torch.tensor([0.8, 0.4]), backbone.encode_prompts(["a red cube", "a cat"])
    networks = roles.networks(None)
    F = networks.student(x, t, c)
    with torch.no_grad():
        target = networks.teacher(x, t, c) + networks.reference(x, t, c)
    second = networks.student(x + 0.1 * F.detach(), t / 2, c.shift(-0.5, 1.0))
    with torch.no_grad():
        target = target + networks.reference(x, t / 2, c)
    ((F - target).square().mean() + (second - F.detach()).square().mean()).backward()
    without = [n for n in roles.trained if n.removeprefix("transformer.").startswith(tuple(backbone.without_gradient))]
    missing = [n for n, p in roles.trained.items() if p.grad is None]
    assert sorted(missing) == sorted(without)
    return {n: p.grad for n, p in roles.trained.items() if p.grad is not None}


def test_it_is_on_from_half_a_billion_parameters():
    with torch.device("meta"):
        small, large = torch.nn.Linear(1000, 1000), torch.nn.Linear(25_000, 20_000)
    assert not checkpointed(Tuning(), small) and checkpointed(Tuning(), large)
    assert checkpointed(Tuning(checkpointing=True), small) and not checkpointed(Tuning(checkpointing=False), large)
