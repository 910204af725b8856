"""How a library's user calls `apexflow.load(...).generate(...)`: natural forms are taken, the rest is told in one line."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import apexflow
from apexflow.backbones import second_time
from apexflow.backbones.settings import Sampler, Settings
from apexflow.errors import UserError
from apexflow.generator import Generator

PROMPT = "a photo of a red star"


@pytest.fixture(scope="module")
def model() -> Generator:
    return apexflow.load("mini-teacher", device=torch.device("cpu"))


def drawn(model: Generator, **options: Any) -> bytes:
    return model.generate([PROMPT], **{"guidance": 1.0} | options)[0].tobytes()


def test_a_notebook_completes_what_there_is() -> None:
    assert dir(apexflow) == ["__version__", "load"]


def test_one_step_unless_asked_otherwise_and_none_is_the_models_own(model: Generator) -> None:
    model.generate(PROMPT)
    assert model.evaluations == 2  # one step, guided as the teacher is by itself
    model.generate(PROMPT, None, guidance=1.0)
    assert model.evaluations == model.backbone.settings.steps == 50


def test_numpy_numbers_and_lists_are_numbers_and_pairs(model: Generator) -> None:
    plain = drawn(model, steps=2, seed=3)
    assert drawn(model, steps=np.int64(2), seed=np.int64(3), guidance=np.float32(1), size=np.int64(64)) == plain
    assert drawn(model, steps=2, seed=3, size=[64, 64]) == drawn(model, steps=2, seed=3, size=(64, 64)) == plain


@pytest.mark.parametrize("own", [{"rho": 1.0}, {"kappa": 0.5}, {"order": 2}], ids=str)
def test_a_model_brings_its_sampler_and_a_call_may_say_otherwise(
    model: Generator, monkeypatch: pytest.MonkeyPatch, own: dict[str, Any]
) -> None:
    plain, other = drawn(model, steps=3), drawn(model, steps=3, **own)
    monkeypatch.setattr(model.backbone, "settings", replace(model.backbone.settings, **own))
    assert drawn(model, steps=3) == other != plain
    assert model.generate_seeded([PROMPT], [(0, 0)], 3, guidance=1.0)[0].tobytes() == other
    assert drawn(model, steps=3, kappa=0.0, rho=0.0, order=1) == plain
    assert model.sampler(3, 1.0) == {"guidance": 1.0, "kappa": 0.0, "rho": 0.0, "order": 1} | own


def test_a_model_may_bring_another_sampler_for_more_steps(model: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh, plain = (Sampler(kappa=0.0, rho=rho, order=1) for rho in (1.0, 0.0))
    expected = [drawn(model, steps=2, **fresh), drawn(model, steps=3, **plain), drawn(model, steps=3, **fresh)]
    own = replace(model.backbone.settings, **fresh, samplers={1: fresh, 3: plain})
    monkeypatch.setattr(model.backbone, "settings", own)
    assert [drawn(model, steps=2), drawn(model, steps=3), drawn(model, steps=3, rho=1.0)] == expected


def test_in_its_own_number_of_steps_a_model_is_drawn_as_it_is_exported() -> None:
    fresh, plain, edited = (Sampler(kappa=0.0, rho=rho, order=1) for rho in (1.0, 0.0, 0.5))
    settings = Settings(steps=4, **edited, samplers={1: fresh, 8: plain})
    assert [settings.sampler(steps) for steps in (1, 3, 4, 5, 8, 20)] == [fresh, fresh, edited, fresh, plain, plain]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 2.0}, "steps is 2.0: give a whole number"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 10**20}, "at most 10000, got 1"),
        ({"seed": None}, "seed is None: give a whole number"),
        ({"seed": [1, 2]}, "seed is"),
        ({"size": "64"}, "size is '64'"),
        ({"size": (64, 64, 3)}, "one side, or height and width"),
        ({"guidance": "2"}, "guidance is '2': give a number"),
        ({"rho": "1"}, "rho is '1': give a number"),
        ({"order": "1"}, "order is '1': use 1, or 2"),
    ],
    ids=str,
)
def test_what_is_no_number_is_told(model: Generator, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words.replace("[", r"\[")):
        drawn(model, **options)


def test_what_is_no_prompt_is_told_and_an_empty_one_is_warned_of(model: Generator) -> None:
    with pytest.raises(UserError, match="prompt 3 is not text"):
        model.generate([3])  # type: ignore[list-item]
    with pytest.raises(UserError, match="prompt None is not text"):
        model.generate(None)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="the prompt is empty"):
        model.generate([PROMPT, " "])


@pytest.mark.filterwarnings("error")  # the mistake alone is told, not the odd prompt beside it
def test_settings_are_checked_before_words(model: Generator) -> None:
    with pytest.raises(UserError, match="steps must be"):
        model.generate("xyzzy", 0)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_dtype_may_be_named(dtype: Any) -> None:
    assert next(apexflow.load("mini-student", "cpu", dtype).backbone.transformer.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["half-ish", "int64", torch.int32, 16])
def test_a_dtype_that_is_none_is_refused(dtype: Any) -> None:
    with pytest.raises(UserError, match=r"dtype is .*: use float32"):
        apexflow.load("mini-student", dtype=dtype)


def test_a_long_prompt_is_shown_by_its_beginning() -> None:
    generator = apexflow.load("mini-student", "cpu")
    with pytest.warns(UserWarning, match="knows no word of 'xyzzy xyzzy .*…': the picture will not follow it") as told:
        generator.generate("xyzzy " * 20_000)
    with pytest.raises(UserError, match="bytes that are not text") as refused:
        generator.generate("\udcff" + "x" * 100_000)
    assert all(len(str(message)) < 300 for message in (refused.value, *(one.message for one in told)))


def test_a_size_far_above_the_models_own_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = apexflow.load("mini-student", "cpu")
    monkeypatch.setattr(generator, "_draw", lambda *asked: [])
    with pytest.warns(UserWarning, match="generates at 64: 512x512 is slow"):
        generator.generate("a red star", size=512)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generator.generate("a red star", size=256)


def test_settings_may_be_why_an_answer_is_not_finite() -> None:
    told = "not finite: the weights are .*, or guidance, kappa or the strength of a LoRA is too large"
    with pytest.warns(UserWarning, match=told):
        apexflow.load("mini-student", "cpu").generate("a red star", 1, guidance=-1e300)


@pytest.mark.parametrize("with_second_time", [False, True])
@pytest.mark.parametrize("prompts", [[PROMPT], [PROMPT, "a photo of three green hearts"]], ids=len)
def test_guidance_asks_once_a_step_where_the_family_allows_and_draws_the_same(
    prompts: list[str], with_second_time: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = apexflow.load("mini-teacher", "cpu")
    network, kind = model.backbone.transformer, type(model.backbone)
    if with_second_time:
        torch.manual_seed(0)
        for parameter in second_time.attach(network).parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape)  # a fresh one adds nothing
    rows: list[int] = []
    plain = kind.velocity

    def counted(self: Any, network: Any, x_t: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(len(x_t))
        return plain(self, network, x_t, *rest)

    monkeypatch.setattr(kind, "velocity", counted)
    drawn, asked = [], []
    for at_once in (True, False):
        monkeypatch.setattr(kind, "guided_at_once", at_once)
        rows.clear()
        drawn.append([np.asarray(picture, int) for picture in model.generate(prompts, 2, guidance=2.5)])
        asked.append(list(rows))
        assert model.evaluations == 4
    assert asked == [[2 * len(prompts)] * 2, [len(prompts)] * 4]
    assert np.abs(np.subtract(*drawn)).max() <= 1


@pytest.mark.parametrize(("rho", "alike"), [(0.0, 1.0), (1.0, 0.0)])
def test_fresh_noise_is_none_that_the_picture_began_with(
    model: Generator, monkeypatch: pytest.MonkeyPatch, rho: float, alike: float
) -> None:
    seen: list[torch.Tensor] = []

    def noise_alone(self: Any, network: Any, x_t: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(x_t.flatten())
        return x_t  # at t = 1 this leads to data of zeros, so the next point is noise alone

    monkeypatch.setattr(type(model.backbone), "velocity", noise_alone)
    drawn(model, steps=2, rho=rho)
    assert torch.corrcoef(torch.stack(seen))[0, 1].item() == pytest.approx(alike, abs=0.2)
