"""Every family on a GPU: the pictures and gradients of the CPU, and steps in bf16, checkpointed and from a base in eight bits."""

from __future__ import annotations

import math
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from tiny import BUILDERS

from apexflow.backbones import load_backbone
from apexflow.backbones.storage import stored_kind, storing
from apexflow.generator import Generator, load
from apexflow.objectives import Batch
from apexflow.randomness import RowRandom
from apexflow.training.config import Recipe, Tuning
from apexflow.training.distributed import own_device
from apexflow.training.roles import frozen_dtype, loaded_dtype, make_roles
from apexflow.training.run import answering

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and benchmarks/on_gpu.sh")
GPU = torch.device("cuda")
PROMPTS = ["a red cube", "a cat"]
FOUR = pytest.param(
    "nf4", marks=pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs the extra apexflow[4bit]")
)
WAYS = [("full", None), ("lora", None), ("lora", "fp8"), pytest.param("lora", "nf4", marks=FOUR.marks)]
TOO_SMALL = [("nf4", name) for name in ("z_image", "pixart_alpha", "pixart_sigma")]  # no row is a whole block


@pytest.fixture(autouse=True)
def as_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels that training takes; convolutions in float32 and not in TF32, so that both devices can be compared."""
    own_device("cuda")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", BUILDERS)
def test_pictures_are_those_of_the_cpu(name, guidance, folder_of):
    drawn = [
        Generator(load_backbone(str(folder_of(name)), device)).generate(PROMPTS, 2, 5, 64, guidance)
        for device in ("cpu", GPU)
    ]
    for ours, theirs in zip(*drawn, strict=True):
        difference = np.abs(np.asarray(ours, np.int64) - np.asarray(theirs, np.int64))
        assert difference.mean() < 0.1 and difference.max() <= 3


@pytest.mark.parametrize("name", BUILDERS)
def test_a_large_model_draws_in_half_precision(name, folder_of, monkeypatch):
    monkeypatch.setattr("apexflow.generator.LARGE", 1000)
    model = load(str(folder_of(name)))
    model.generate(PROMPTS, 2, 5, 64, 3.0)
    suits = type(model.backbone).bfloat16
    assert next(model.backbone.transformer.parameters()).dtype == (torch.bfloat16 if suits else torch.float32)
    assert model.finite == [True, True]


@pytest.mark.parametrize("name", BUILDERS)
def test_a_model_without_room_draws_the_same_in_turn(name, folder_of, monkeypatch):
    usual = load(str(folder_of(name)))
    monkeypatch.setattr("apexflow.generator.room_on", lambda device: 0)
    model = load(str(folder_of(name)))
    drawn = [np.asarray(one.generate(PROMPTS, 2, 5, 64, 3.0), np.int64) for one in (usual, model)]
    assert np.abs(drawn[0] - drawn[1]).max() <= 1
    assert model.backbone.device.type == "cuda" and next(model.backbone.text_encoder.parameters()).device.type == "cpu"


@pytest.mark.parametrize("storage", ["fp8", FOUR])
@pytest.mark.parametrize("name", BUILDERS)
def test_a_network_in_few_bits_draws(name, storage, folder_of):
    model = load(str(folder_of(name)), dtype="bfloat16", storage=storage)
    model.generate(PROMPTS, 2, 5, 64)
    assert model.finite == [True, True]
    assert stored_kind(model.backbone.transformer) == storage or (storage, name) in TOO_SMALL


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", BUILDERS)
def test_gradients_are_those_of_the_cpu(name, kind, checkpointing, folder_of):
    tuning = Tuning(kind=kind, rank=2, checkpointing=checkpointing)
    recipe = Recipe(output="", tuning=tuning, objective={"guidance": 2.5})
    there, here = (gradients(str(folder_of(name)), recipe, device) for device in ("cpu", GPU))
    assert there.keys() == here.keys() and any(bool(gradient.any()) for gradient in there.values())
    for parameter, gradient in there.items():
        assert (here[parameter].cpu() - gradient).abs().max() <= 3e-3 * gradient.abs().max() + 1e-5, parameter


@pytest.mark.parametrize(("kind", "storage"), WAYS)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", BUILDERS)
def test_gradients_in_bf16_are_close_to_those_in_float32(name, kind, storage, checkpointing, folder_of):
    tuning = Tuning(kind, 2, storage=storage, checkpointing=checkpointing)
    recipe = Recipe(output="", tuning=tuning, precision="bf16", objective={"guidance": 2.5})
    half = gradients(str(folder_of(name)), recipe, GPU)
    assert all(math.isfinite(float(gradient.abs().sum())) for gradient in half.values())
    assert all(gradient.dtype == torch.float32 for gradient in half.values())
    plain = Recipe(output="", tuning=Tuning(tuning.kind, tuning.rank), objective={"guidance": 2.5})
    whole = gradients(str(folder_of(name)), plain, GPU)
    ours, theirs = (torch.cat([found[name].flatten() for name in whole]) for found in (half, whole))
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.5


def gradients(model: str, recipe: Recipe, device: torch.device | str) -> dict[str, torch.Tensor]:
    """Gradients of one step of APEX by name, of weights, adapters and rows that do not depend on the device."""
    backbone = load_backbone(model, "cpu", loaded_dtype(recipe))
    torch.manual_seed(0)  # of fresh adapters
    objective = recipe.build_objective()
    with torch.no_grad():
        c = backbone.encode_prompts(PROMPTS * 2).to(torch.device(device))
        null = backbone.encode_prompts([""]).to(torch.device(device))
    place = storing(recipe.tuning.storage, frozen_dtype(recipe), torch.device(device))
    roles = make_roles(backbone, recipe, objective.needs, place)
    generator = torch.Generator().manual_seed(1)
    for parameter in roles.trained.values():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.1 * noise.to(parameter.device)  # a fresh adapter adds nothing
    x = torch.randn(4, *backbone.latent_shape((64, 64)), generator=generator).to(device)
    random, rows = RowRandom(0, 0, range(4), device), torch.arange(4, device=device)
    batch = Batch(x, c, random, rows, 4, 0.0, 0, None)
    with answering(recipe, torch.device(device)):
        losses = objective(roles.networks(null), batch, {})
    losses.everything.backward()
    return {name: p.grad for name, p in roles.trained.items() if p.grad is not None}
