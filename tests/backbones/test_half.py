"""Models in bfloat16: when they are loaded so, and that every family draws what it draws in float32, but for rounding."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny import BUILDERS

from apexflow import generator
from apexflow.backbones import load_backbone, precision
from apexflow.evaluation.runner import evaluate
from apexflow.evaluation.suite import EvaluationSettings
from apexflow.generator import load, suited_dtype

PROMPTS = ["a red cube", "a cat"]


@pytest.mark.parametrize("name", BUILDERS)
def test_large_models_are_loaded_in_half_precision_on_a_gpu(name, folder_of, monkeypatch):
    folder = str(folder_of(name))
    assert {suited_dtype(folder, device) for device in ("cpu", "cuda", "cuda:1")} == {torch.float32}
    monkeypatch.setattr(generator, "LARGE", 1000)
    half = torch.float32 if name == "sana" else torch.bfloat16  # see test_published.py
    assert [suited_dtype(folder, device) for device in ("cpu", "cuda", "cuda:1")] == [torch.float32, half, half]


@pytest.mark.parametrize("name", BUILDERS)
def test_pictures_in_half_precision_are_those_in_whole_but_for_rounding(name, folder_of):
    """And with the matrices of the network in eight bits, but for more of it."""
    folder = str(folder_of(name))
    whole, half, eight, other = (
        np.asarray(load(folder, "cpu", *kind).generate(PROMPTS, 2, seed, 64, 3.0), np.float64)
        for seed, *kind in ((5, torch.float32), (5, torch.bfloat16), (5, torch.bfloat16, "fp8"), (6, torch.float32))
    )
    assert np.abs(whole - half).mean() < 0.2 * np.abs(whole - other).mean()
    assert np.abs(whole - eight).mean() < 0.5 * np.abs(whole - other).mean()


def test_an_evaluation_says_what_was_computed_in_and_not_what_is_stored(folder_of, tmp_path):
    model = load(str(folder_of("flux_dev")), "cpu", storage="fp8")
    assert next(model.backbone.transformer.parameters()).dtype == torch.float8_e4m3fn
    evaluate(model, EvaluationSettings(limit=1, per_prompt=1, steps=1, size=64), tmp_path, with_scores=False)
    drawn = json.loads((tmp_path / "generation.json").read_text())
    assert (drawn["storage"], drawn["dtype"]) == ("fp8", "float32")


def test_large_networks_in_float32_multiply_in_tf32_on_a_gpu(folder_of, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    whole, half = (
        load_backbone(str(folder_of("sana")), "cpu", dtype).transformer for dtype in (torch.float32, torch.bfloat16)
    )
    precision.multiply_in_tf32(whole, "cuda")  # small
    monkeypatch.setattr(precision, "LARGE", 1000)
    precision.multiply_in_tf32(whole, "cpu")
    precision.multiply_in_tf32(half, "cuda")
    assert asked == []
    precision.multiply_in_tf32(whole, torch.device("cuda", 1))
    assert asked == ["high"]
