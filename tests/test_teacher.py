"""`teacher`: a student that starts from one model and learns from another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Run, refused
from interrupted import train_in_parts
from safetensors.torch import load_file, save_file

from apexflow.backbones import load_backbone, second_time
from apexflow.backbones.miniature import build_miniature
from apexflow.data.scenes import vocabulary
from apexflow.errors import UserError
from apexflow.training.checkpoint import checkpoints, load_checkpoint
from apexflow.training.config import load_recipe
from apexflow.training.loop import start, train
from apexflow.training.prepare import check_teaches
from apexflow.transport import TRIGONOMETRIC


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


def test_a_larger_teacher_teaches_a_smaller_student(recipe_file: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Its critic starts as it, answers like it, and is computed again in backward like the student; all of it resumes."""
    larger = like(tiny_model, tmp_path / "larger", width=64, depth=2)
    config = larger / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"timestep_scale": 0.5}))  # it answers by its own
    common = [f"teacher={larger}", "method=dmd2", "objective.student_every=2", "tuning.checkpointing=true"]
    common += ["steps=4", "checkpoint_every=100", "preview.every=100"]
    first = start(load_recipe(recipe_file, [*common, f"output={tmp_path / 'first'}"]), resume=False)
    x, t, c = first.data.latents([0, 1]), torch.tensor([0.3, 1.0]), first.data.condition([0, 1])
    alone, networks = load_backbone(str(larger)), first.networks
    expected = alone.velocity(alone.transformer, x, t, c)
    assert torch.equal(networks.teacher(x, t, c), expected) and torch.equal(
        networks.further["critic"](x, t, c), expected
    )
    assert all(network.is_gradient_checkpointing for network in first.roles.everything)
    train(load_recipe(recipe_file, [*common, f"output={tmp_path / 'whole'}"]))
    train_in_parts(load_recipe(recipe_file, [*common, f"output={tmp_path / 'parts'}"]))
    one, two = (load_checkpoint(checkpoints(tmp_path / n / "checkpoints")[-1]).tensors for n in ("whole", "parts"))
    for part in ("trained", "average", "optimizer"):
        assert one[part].keys() == two[part].keys()
        assert all(torch.equal(one[part][name], two[part][name]) for name in one[part])
    assert (
        one["trained"]["critic.proj_out.weight"].shape[1] == 2 * one["trained"]["transformer.proj_out.weight"].shape[1]
    )


def test_a_student_with_a_second_time_learns_from_a_teacher_without(
    recipe_file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    student, teacher = like(tiny_model, tmp_path / "student"), like(tiny_model, tmp_path / "teacher")
    second_time.save(second_time.attach(load_backbone(str(student)).transformer), student)
    for model, other in ((student, teacher), (teacher, student)):
        options = [f"model={model}", f"teacher={other}", f"output={tmp_path / model.name}-run"]
        roles = start(load_recipe(recipe_file, options), resume=False).roles
        assert all(second_time.second_time_of(network) is None for network in roles.everything)


def test_encoders_are_read_where_their_files_differ_and_let_go(
    recipe_file: Path, tiny_model: Path, tmp_path: Path, reads: list[str]
) -> None:
    cache = tmp_path / "cache"
    start(load_recipe(recipe_file, [f"data.cache={cache}"]), resume=False)
    reads.clear()
    same, rounded = (like(tiny_model, tmp_path / name) for name in ("same", "rounded"))
    for part in ("text_encoder", "vae"):
        (file,) = (rounded / part).glob("*.safetensors")
        save_file({n: t.bfloat16().to(t) for n, t in load_file(file).items()}, file, {"format": "pt"})
    for teacher, times in ((same, 0), (rounded, 2)):
        options = [f"data.source={cache}", f"teacher={teacher}", f"output={tmp_path / teacher.name}-run"]
        run = start(load_recipe(recipe_file, options), resume=False)
        assert sorted(reads) == ["text_encoder"] * times + ["vae"] * times
        assert "text_encoder" not in vars(run.backbone)


def test_a_teacher_on_another_path_is_refused(recipe_file: Path, tiny_model: Path) -> None:
    student, teacher = (load_backbone(str(tiny_model)) for _ in range(2))
    teacher.transport = TRIGONOMETRIC
    with pytest.raises(UserError, match="a different transport than model"):
        check_teaches(load_recipe(recipe_file, ["teacher=other"]), (student, teacher), (tiny_model, tiny_model))


@pytest.mark.parametrize(
    ("shape", "overrides", "said"),
    [
        ({"encoders": False}, [], "a different autoencoder than model"),
        ({}, ["tuning.kind=lora"], "a LoRA learns from its own base"),
        ({}, ["method=flow_matching"], "uses no teacher"),
        ({}, ["model=miniature"], "use a finished model"),
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
