"""Whether one model can teach another: the same words must be the same condition to both, pooled vectors included."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_text import clip

from apexflow.backbones import load_backbone
from apexflow.errors import UserError
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
