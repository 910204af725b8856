"""An exported student in the stock pipelines: its latents are those that apexflow makes of the same noise."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import pytest
import torch
from stock import largest_difference, load_stock
from stock_runs import PROMPTS, call_of, noise, our_latents, stock_latents, student

from apexflow.backbones import Settings, load_backbone, read_settings, second_time, without_second_time
from apexflow.export import AnyStepScheduler, export
from apexflow.generator import Generator
from apexflow.objectives import objectives
from apexflow.sampler import sample, time_grid


@pytest.mark.parametrize("scheduler", ["stock", "any-step"])
@pytest.mark.parametrize("name", ["sana", "qwen_image", "flux2"])
def test_a_student_s_folder_samples_as_ours_in_the_stock_pipeline(name, scheduler, folder_of, tmp_path):
    source, output = student(folder_of, name, tmp_path, steps=2, size=32), tmp_path / "out"
    result = export(str(source), output, scheduler)
    assert result["kind"] == "model" and result["scheduler"] == scheduler
    assert result["call"]["height"] == result["call"]["width"] == 32
    backbone, pipeline = load_backbone(str(source)), load_stock(output)
    kind = AnyStepScheduler if scheduler == "any-step" else diffusers.FlowMatchEulerDiscreteScheduler
    assert isinstance(pipeline.scheduler, kind)
    z, times = noise(backbone), Generator(backbone).times(2)
    assert (
        largest_difference(stock_latents(name, pipeline, z, 2, **call_of(result)), our_latents(backbone, z, times))
        < 1e-5
    )
    again = load_backbone(str(output))  # and comes back as it went
    assert again.settings == backbone.settings and again.time_shift == pytest.approx(backbone.time_shift)
    if (name, scheduler) == ("sana", "any-step"):
        again.save(tmp_path / "again", again.settings)
        assert isinstance(load_stock(tmp_path / "again").scheduler, kind)


@pytest.mark.parametrize("name", ["qwen_image", "flux2", "lumina2"])
def test_a_guided_model_is_guided_in_the_stock_pipeline(name, folder_of, tmp_path):
    backbone = load_backbone(str(folder_of(name)))
    source = tmp_path / "guided"
    backbone.save(source, replace(backbone.settings, steps=2, guidance=4.0))
    result = export(str(source), tmp_path / "out")
    z, times = noise(backbone), Generator(backbone).times(2)
    null = backbone.encode_prompts([""]).expand(len(PROMPTS))
    c = backbone.encode_prompts(PROMPTS)

    @torch.no_grad()
    def velocity(x_t, t):
        return backbone.guide(*(backbone.velocity(backbone.transformer, x_t, t, one) for one in (c, null)), 4.0)

    options = call_of(result) | ({"negative_prompt": [" "] * len(PROMPTS)} if name == "qwen_image" else {})
    latents = stock_latents(name, load_stock(tmp_path / "out"), z, 2, **options)
    assert result["call"].get("negative_prompt") == (" " if name == "qwen_image" else None)
    assert largest_difference(latents, sample(velocity, z, times)) < 1e-4


def test_an_explicit_grid_goes_along(folder_of, tmp_path):
    source = student(folder_of, "qwen_image", tmp_path, steps=2, times=[1.0, 0.7, 0.0])
    backbone = load_backbone(str(source))
    z = noise(backbone)
    for scheduler in ("stock", "any-step"):
        result = export(str(source), tmp_path / scheduler, scheduler)
        latents = stock_latents("qwen_image", load_stock(tmp_path / scheduler), z, 2, **call_of(result))
        expected = our_latents(backbone, z, torch.tensor([1.0, 0.7, 0.0], dtype=torch.float64))
        assert largest_difference(latents, expected) < 1e-5


@pytest.mark.parametrize(
    ("own", "asked", "chosen", "same"),
    [
        ({"rho": 1.0}, None, "stock", True),
        ({"rho": 1.0}, "any-step", "any-step", True),
        ({"rho": 0.5}, None, "any-step", True),
        ({"kappa": 0.3}, None, "any-step", True),
        ({"rho": 0.5}, "stock", "stock", False),
        ({"order": 2}, None, "stock", False),
        ({"rho": 0.5, "steps": 1}, None, "stock", True),
    ],
    ids=str,
)
def test_a_sampler_goes_along_or_the_readme_says_that_it_does_not(own, asked, chosen, same, folder_of, tmp_path):
    source = student(folder_of, "sana", tmp_path, **{"steps": 3} | own)
    result = export(str(source), tmp_path / "out", asked)
    assert result["scheduler"] == chosen
    assert ("so its pictures may differ" in (tmp_path / "out" / "README.md").read_text()) is not same
    if not same:
        return
    backbone, z = load_backbone(str(source)), noise(load_backbone(str(source)))
    ratios = {key: own.get(key, 0.0) for key in ("kappa", "rho")}
    steps, pipeline = backbone.settings.steps, load_stock(tmp_path / "out")
    torch.manual_seed(0)  # as of the any-step scheduler's own seed
    latents = stock_latents("sana", pipeline, z, steps, **call_of(result))
    torch.manual_seed(0)
    assert largest_difference(latents, our_latents(backbone, z, Generator(backbone).times(steps), **ratios)) < 1e-5


@pytest.mark.parametrize("steps", [1, 4, 8])
@pytest.mark.parametrize("method", [name for name, one in objectives().items() if "second_time" in one().needs])
def test_whoever_asks_for_data_alone_draws_what_a_student_with_a_second_time_does(method, steps):
    others = {1: objectives()[method].sampler, **objectives()[method].longer}
    settings = without_second_time(Settings(steps=steps, **objectives()[method].sampling(steps), samplers=others))
    assert settings.sampler(settings.steps)["rho"] == settings.rho

    def velocity(x_t, t, s):
        return torch.sin(3 * x_t) + (t + 2 * s).reshape(-1, 1)

    def told_of_none(x_t, t):
        return velocity(x_t, t, 0 * t)

    z, times = torch.randn(2, 8, generator=torch.Generator().manual_seed(1)), time_grid(settings.steps)
    drawn = [
        sample(ask, z, times, rho=settings.rho, generator=torch.Generator().manual_seed(0), jumps=jumps)
        for ask, jumps in ((velocity, True), (told_of_none, False))
    ]
    assert torch.equal(*drawn) and settings.steps == (steps if settings.rho else 1)


@pytest.mark.parametrize("rho", [0.0, 1.0])
def test_a_student_with_a_second_time_draws_the_same_in_the_stock_pipeline(rho, folder_of, tmp_path):
    source = student(folder_of, "sana", tmp_path, steps=4, rho=rho)
    network = load_backbone(str(source)).transformer
    torch.nn.init.normal_(second_time.attach(network).embedders["default"][-1].weight)
    second_time.save(second_time.second_time_of(network), source)
    backbone, result = load_backbone(str(source)), export(str(source), tmp_path / "out")
    steps = result["call"]["num_inference_steps"]
    assert steps == (4 if rho else 1)
    assert ("Use one step" in (tmp_path / "out" / "README.md").read_text()) == (rho == 0)
    assert read_settings(tmp_path / "out") == backbone.settings  # apexflow takes all four still
    z, c, network = noise(backbone), backbone.encode_prompts(PROMPTS), backbone.transformer

    @torch.no_grad()
    def velocity(x_t, t, s):
        with second_time.going_to(network, s):
            return backbone.velocity(network, x_t, t, c)

    pipeline = load_stock(tmp_path / "out")
    torch.manual_seed(0)
    latents = stock_latents("sana", pipeline, z, steps, **call_of(result))
    torch.manual_seed(0)
    ours = sample(velocity, z, Generator(backbone).times(steps), rho=rho, jumps=True)
    assert largest_difference(latents, ours) < 1e-5
