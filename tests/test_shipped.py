"""The models in the package: small, loadable by stock diffusers, and as good as the README's table says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import apexflow
from apexflow.backbones import BUILT_IN, load_backbone
from apexflow.evaluation.runner import EvaluationSettings, evaluate

NAMES = ("mini-teacher", "mini-student")
SCORES = Path(__file__).parent.parent / "results" / "scores.json"


def test_the_package_carries_at_most_25_megabytes_of_safetensors() -> None:
    files = [p for p in BUILT_IN.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 25e6
    assert {p.suffix for p in files if p.stat().st_size > 100_000} == {".safetensors"}


@pytest.mark.parametrize("name", NAMES)
def test_the_card_holds_recipe_seed_and_time(name: str) -> None:
    settings = load_backbone(name).settings
    assert settings.card["recipe"]["seed"] >= 0 and settings.card["steps"] > 0 and settings.card["seconds"] > 0
    assert "seed:" in (BUILT_IN / name / "README.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_stock_diffusers_loads_it(name: str) -> None:
    from diffusers import SanaPipeline

    pipeline = SanaPipeline.from_pretrained(BUILT_IN / name, torch_dtype=torch.float32)
    ours = load_backbone(name)
    for key, tensor in pipeline.transformer.state_dict().items():
        assert torch.equal(tensor, ours.transformer.state_dict()[key])


def test_the_student_scores_in_one_step_what_the_table_says() -> None:
    claimed = json.loads(SCORES.read_text())["scores"]["student, one step"]["overall"]
    student = apexflow.load("mini-student")
    report = evaluate(student, EvaluationSettings(steps=1, per_prompt=1, limit=240))
    assert student.evaluations == 1
    # 240 pictures scatter by about .03; five times that would be a broken model, not bad luck.
    assert report["overall"] > claimed - 0.15


def test_the_same_seed_gives_the_same_picture_whatever_the_batch() -> None:
    student = apexflow.load("mini-student")
    prompt = "a photo of a red star left of a blue ring"
    alone = student.generate(prompt, seed=5)[0]
    together = student.generate([prompt, "a photo of three green hearts"], seed=5)[0]
    different = (torch.frombuffer(bytearray(alone.tobytes()), dtype=torch.uint8).int()
                 - torch.frombuffer(bytearray(together.tobytes()), dtype=torch.uint8).int()).abs()  # fmt: skip
    assert different.max() <= 1  # padding and batch move the last bit at most


def test_deeper_answers_as_before_and_learns_in_its_new_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BUILT_IN.parent.parent / "recipes")
    from deepen import AFTER, deepen

    backbone = load_backbone("mini-teacher")
    x_t, t, c = (
        torch.randn(2, 8, 8, 8),
        torch.tensor([1.0, 0.3]),
        backbone.encode_prompts(["a red star", "a blue ring"]),
    )
    deeper = deepen(backbone.transformer)
    F = backbone.velocity(deeper, x_t, t, c)
    torch.testing.assert_close(F, backbone.velocity(backbone.transformer, x_t, t, c), rtol=0, atol=0)
    F.square().sum().backward()
    assert len(deeper.transformer_blocks) == len(backbone.transformer.transformer_blocks) + len(AFTER)
    for place, index in enumerate(AFTER):
        new = deeper.transformer_blocks[index + 1 + place]
        assert all(
            last.weight.grad.norm() > 0 for last in (new.attn1.to_out[0], new.attn2.to_out[0], new.ff.conv_point)
        )
