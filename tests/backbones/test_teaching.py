"""One model teaches another: the same words must be the same condition to both, and it is guided as its family is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import BUILDERS
from tiny_text import clip

from apexflow.backbones import Backbone, load_backbone
from apexflow.conditioning import Condition
from apexflow.errors import UserError
from apexflow.objectives import Networks
from apexflow.objectives.teacher import teach
from apexflow.training.config import Recipe, Tuning
from apexflow.training.prepare import check_teaches
from apexflow.training.roles import make_roles
from apexflow.transport import TRIGONOMETRIC


def test_a_teacher_with_another_clip_is_refused_and_one_with_a_rounded_one_is_not(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """FLUX takes nothing but the pooled vector from CLIP."""
    student = folder_of("flux_schnell")
    rounded, other = (Path(shutil.copytree(student, tmp_path / name)) for name in ("rounded", "other"))
    (file,) = (rounded / "text_encoder").glob("*.safetensors")
    save_file({name: tensor.bfloat16().to(tensor) for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    clip().save_pretrained(other / "text_encoder")

    def check(teacher: Path) -> None:
        pair = [load_backbone(str(folder)) for folder in (student, teacher)]
        check_teaches(Recipe(output="", teacher=str(teacher)), pair, (student, teacher))

    check(rounded)
    with pytest.raises(UserError, match="other has a different text encoder than model"):
        check(other)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", ["qwen_image", "sana"])
@torch.no_grad()
def test_a_teacher_is_guided_as_its_pipeline_guides(name: str, kind: str, folder_of: Callable[[str], Path]) -> None:
    backbone = load_backbone(str(folder_of(name)))
    null, c = backbone.encode_prompts([""]), backbone.encode_prompts(["a cat", "two dogs"])
    roles = make_roles(backbone, Recipe(output="", tuning=Tuning(kind, 2)), ("teacher",))
    x_t, t = torch.randn(2, *backbone.latent_shape((32, 64))), torch.tensor([0.9, 0.4])
    with_caption, without = (backbone.velocity(backbone.transformer, x_t, t, one) for one in (c, null.expand(2)))
    found = teach(roles.networks(null), x_t, t, c, 3.0)
    assert torch.allclose(found, backbone.guide(with_caption, without, 3.0), atol=1e-5)
    assert torch.allclose(found, without + 3 * (with_caption - without), atol=1e-3) == (name == "sana")


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", ["z_image", "sana"])
def test_objectives_are_told_what_a_model_says_of_itself(
    name: str, kind: str, folder_of: Callable[[str], Path]
) -> None:
    backbone = load_backbone(str(folder_of(name)))
    backbone.transport, backbone.round_time = TRIGONOMETRIC, torch.Tensor.round
    assert backbone.time_shift != 1 and backbone.guided_at_once == (name == "sana")
    networks = make_roles(backbone, Recipe(output="", tuning=Tuning(kind, 2)), ("teacher",)).networks(None)
    for said in ("transport", "round_time", "time_shift", "guide", "guided_at_once"):
        assert getattr(networks, said) == getattr(backbone, said), said


@pytest.mark.parametrize("prompts", [["a red cube", "two balls on a table"], ["a cat", "a cat"]])
@pytest.mark.parametrize("name", BUILDERS)
@torch.no_grad()
def test_a_guided_teacher_answers_both_conditions_at_once(
    name: str, prompts: list[str], backbone_of: Callable[[str], Backbone]
) -> None:
    backbone, asked = backbone_of(name), []

    def field(x_t: torch.Tensor, t: torch.Tensor, c: Condition) -> torch.Tensor:
        asked.append(len(x_t))
        return backbone.velocity(backbone.transformer, x_t, t, c)

    torch.manual_seed(0)
    x, t, c = (
        torch.randn(2, *backbone.latent_shape((32, 64))),
        torch.tensor([0.8, 0.4]),
        backbone.encode_prompts(prompts),
    )
    separate, joint = (
        teach(Networks(field, field, field, backbone.encode_prompts([""]), guided_at_once=once), x, t, c, 3.0)
        for once in (False, True)
    )
    assert asked == [2, 2, 4]
    assert (joint - separate).abs().max() <= 1e-5 * separate.abs().max().clamp_min(1)
    # Elsewhere the null would be as long as the captions, in the attention that the picture has a part in.
    assert backbone.guided_at_once == (name not in ("qwen_image", "z_image", "lumina2"))
