"""Whether one model can teach another: the same words must be the same condition to both, pooled vectors included."""

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
from apexflow.training.config import Recipe
from apexflow.training.prepare import check_teaches


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
    with pytest.raises(UserError, match="other has another text encoder than model"):
        check(other)


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
