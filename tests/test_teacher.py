"""`teacher`: a student that starts from one model and learns from another."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Run, refused

from apexflow.backbones import load_backbone
from apexflow.backbones.miniature import build_miniature
from apexflow.data.scenes import vocabulary
from apexflow.training.config import load_recipe
from apexflow.training.loop import start


def like(model: Path, folder: Path, encoders: bool = True, **shape: Any) -> Path:
    """A model of other weights, with the encoders of `model` unless told otherwise."""
    made = build_miniature(vocabulary(), seed=1, **{"width": 32, "depth": 1} | shape)
    folder.mkdir()
    made.save(folder, made.settings)
    for part in ("text_encoder", "vae") if encoders else ():
        shutil.rmtree(folder / part)
        shutil.copytree(model / part, folder / part)
    return folder


def test_a_student_starts_from_one_model_and_learns_from_another(
    recipe_file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    other = like(tiny_model, tmp_path / "other")
    roles = start(load_recipe(recipe_file, [f"teacher={other}"]), resume=False).roles
    for network, folder in ((roles.teacher, other), (roles.backbone.transformer, tiny_model)):
        expected = dict(load_backbone(str(folder)).transformer.named_parameters())
        assert all(torch.equal(p, expected[name]) for name, p in network.named_parameters())
    assert not any(p.requires_grad for p in roles.teacher.parameters())


@pytest.mark.parametrize(
    ("shape", "overrides", "said"),
    [
        ({"encoders": False}, [], "another autoencoder than model"),
        ({"depth": 2}, [], "another shape than model"),
        ({}, ["tuning.kind=lora"], "a LoRA learns from its own base"),
        ({}, ["method=flow_matching"], "asks no teacher"),
        ({}, ["model=miniature"], "name a finished model"),
    ],
)
def test_a_teacher_that_cannot_teach_is_one_line(
    recipe_file: Path,
    tiny_model: Path,
    tmp_path: Path,
    run: Run,
    shape: dict[str, Any],
    overrides: list[str],
    said: str,
) -> None:
    other = like(tiny_model, tmp_path / "other", **shape)
    few = ["autoencoder_steps=1", "text_encoder_steps=1"]
    refused(run("train", recipe_file, f"teacher={other}", *overrides, *few), said)
