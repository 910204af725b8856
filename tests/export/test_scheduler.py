"""`AnyStepScheduler` in the stock pipelines against our own sampler, and the stock scheduler that equals it."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from stock import BY_TOKENS, largest_difference, load_stock
from stock_runs import FAMILIES, noise, our_latents, stock_latents

from apexflow.backbones import Settings, load_backbone
from apexflow.export import AnyStepScheduler, stock_scheduler_config
from apexflow.generator import Generator
from apexflow.sampler import sample, shift_times, time_grid
from apexflow.transport import LINEAR

families = pytest.mark.parametrize("name", FAMILIES)


@families
def test_a_stock_pipeline_equals_our_sampler(name, folder_of):
    backbone, pipeline = load_backbone(str(folder_of(name))), load_stock(folder_of(name))
    z = noise(backbone)
    for steps in (1, 2, 4):
        pipeline.scheduler = AnyStepScheduler()
        latents = stock_latents(name, pipeline, z, steps)
        assert largest_difference(latents, our_latents(backbone, z, time_grid(steps))) < 1e-5, steps
    pipeline.scheduler = AnyStepScheduler(shift=backbone.time_shift)
    assert torch.equal(pipeline.scheduler.grid(2), Generator(backbone).times(2))
    served = our_latents(backbone, z, Generator(backbone).times(2))
    assert largest_difference(stock_latents(name, pipeline, z, 2), served) < 1e-5
    assert float((served - z).abs().max()) > 1e-2  # the network did something


@families
def test_extrapolation_and_fresh_noise(name, folder_of):
    backbone, pipeline = load_backbone(str(folder_of(name))), load_stock(folder_of(name))
    z, ratios = noise(backbone), {"kappa": 0.3, "rho": 0.4}
    pipeline.scheduler = AnyStepScheduler(**ratios, seed=5)
    latents = stock_latents(name, pipeline, z, 4)
    assert bool(latents.isfinite().all())
    assert torch.equal(stock_latents(name, pipeline, z, 4), latents)
    if name not in BY_TOKENS:  # there, fresh noise is drawn in another order of the same numbers
        ours = our_latents(backbone, z, time_grid(4), **ratios, generator=torch.Generator().manual_seed(5))
        assert largest_difference(latents, ours) < 1e-5
    pipeline.scheduler = AnyStepScheduler(kappa=0.3)
    alone = stock_latents(name, pipeline, z, 4)
    assert largest_difference(alone, our_latents(backbone, z, time_grid(4), kappa=0.3)) < 1e-5
    assert float((alone - latents).abs().max()) > 1e-3


@families
def test_a_stock_scheduler_equals_it_without_extrapolation_and_noise(name, folder_of):
    backbone, pipeline = load_backbone(str(folder_of(name))), load_stock(folder_of(name))
    z = noise(backbone)
    for times in ([1.0, 0.0], [1.0, 0.6, 0.0], [0.999, 0.8, 0.5, 0.1, 0.0]):
        steps = len(times) - 1
        pipeline.scheduler = AnyStepScheduler(times=times)
        expected = stock_latents(name, pipeline, z, steps)
        answer = stock_scheduler_config(times)
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(answer["scheduler"])
        assert largest_difference(stock_latents(name, pipeline, z, steps, sigmas=answer["sigmas"]), expected) < 1e-5
        ours = our_latents(backbone, z, torch.tensor(times, dtype=torch.float64))
        assert largest_difference(expected, ours) < 1e-5


@families
def test_a_stock_scheduler_equals_it_with_fresh_noise_alone(name, folder_of):
    backbone, pipeline = load_backbone(str(folder_of(name))), load_stock(folder_of(name))
    settings, z = Settings(steps=3, times=[1.0, 0.6, 0.2, 0.0], rho=1.0), noise(backbone)
    answer = stock_scheduler_config(settings, backbone.time_shift)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(answer["scheduler"])
    torch.manual_seed(5)
    latents = stock_latents(name, pipeline, z, 3, sigmas=answer["sigmas"])
    if name in BY_TOKENS:  # there, fresh noise is drawn in another order of the same numbers
        assert bool(latents.isfinite().all())
        return
    torch.manual_seed(5)
    ours = our_latents(backbone, z, torch.tensor(settings.times, dtype=torch.float64), rho=1.0)
    assert largest_difference(latents, ours) < 1e-5


def test_a_pipeline_s_generator_draws_the_fresh_noise(folder_of):
    backbone, pipeline = load_backbone(str(folder_of("sana"))), load_stock(folder_of("sana"))
    pipeline.scheduler, z = AnyStepScheduler(rho=0.5), noise(backbone)
    latents = stock_latents("sana", pipeline, z, 2, generator=torch.Generator().manual_seed(7))
    ours = our_latents(backbone, z, time_grid(2), rho=0.5, generator=torch.Generator().manual_seed(7))
    assert largest_difference(latents, ours) < 1e-5


def test_saved_pipelines_find_the_scheduler(tmp_path, folder_of):
    pipeline = load_stock(folder_of("sana"))
    pipeline.scheduler = AnyStepScheduler(gaps=(0.001, 0.6), kappa=0.25)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["apexflow.export.scheduler", "AnyStepScheduler"]
    again = load_stock(tmp_path).scheduler
    assert isinstance(again, AnyStepScheduler) and again.config.kappa == 0.25
    assert again.grid(2).tolist() == pytest.approx([0.999, 0.6, 0.0])


# -- Without a pipeline ------------------------------------------------------------------------------------------------


def velocity(x_t, t):
    return torch.sin(3 * x_t) + t.to(x_t).reshape(-1, 1)


def run(scheduler, z, steps, generator=None, **more):
    scheduler.set_timesteps(steps, **more)
    for timestep in scheduler.timesteps:
        F = velocity(z, (timestep / 1000).expand(len(z)))
        z = scheduler.step(F, timestep, z, generator=generator, return_dict=False)[0]
    return z


def points(rows=3):
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(0))


SETTINGS = (
    {},
    {"gaps": (0.001, 0.6)},
    {"gaps": (0.01, 0.0), "warp": (1.2, 0.9, 1.1), "shift": 3.0},
    {"times": [1.0, 0.7, 0.0], "kappa": 0.5},
    {"shift": 2.0, "kappa": 0.2, "rho": 0.3},
    {"rho": 1.0},
)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_every_setting_is_the_sampler_s(settings, steps):
    scheduler = AnyStepScheduler(**settings)
    if "times" in settings and steps == 2:
        times = torch.tensor(settings["times"], dtype=torch.float64)
    else:
        grid = time_grid(steps, settings.get("gaps", (0, 0)), settings.get("warp", (1, 1, 1)))
        times = shift_times(grid, settings.get("shift", 1.0))
    ratios = {key: settings.get(key, 0.0) for key in ("kappa", "rho")}
    expected = sample(velocity, points(), times, **ratios, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(run(scheduler, points(), steps), expected, atol=1e-5)
    assert len(scheduler.timesteps) == steps and len(scheduler.sigmas) == steps + 1


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_stock_scheduler_with_fresh_noise_is_the_sampler_s(steps, shift, tmp_path):
    answer = stock_scheduler_config(Settings(steps=steps, rho=1.0), shift)
    FlowMatchEulerDiscreteScheduler.from_config(answer["scheduler"]).save_pretrained(tmp_path)
    stock = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    times = shift_times(time_grid(steps), shift)
    expected = sample(velocity, points(), times, rho=1.0, generator=torch.Generator().manual_seed(0))
    stock.set_timesteps(sigmas=answer["sigmas"])
    z, generator = points(), torch.Generator().manual_seed(0)
    for timestep in stock.timesteps:
        F = velocity(z, (timestep / 1000).expand(len(z)))
        z = stock.step(F, timestep, z, generator=generator).prev_sample
    assert torch.allclose(z, expected, atol=1e-5)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_config_survives_its_file(settings, tmp_path):
    scheduler = AnyStepScheduler(**settings, seed=9)
    scheduler.save_pretrained(tmp_path)
    again = AnyStepScheduler.from_pretrained(tmp_path)
    keys = ("num_train_timesteps", "gaps", "warp", "shift", "times", "kappa", "rho", "seed")
    assert {key: again.config[key] for key in keys} == {key: scheduler.config[key] for key in keys}
    assert torch.equal(run(again, points(), 2), run(scheduler, points(), 2))


def test_what_pipelines_pass_counts_for_its_number_alone():
    scheduler = AnyStepScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    expected = scheduler.timesteps
    for given in ({"sigmas": [1.0, 0.75, 0.5, 0.25]}, {"timesteps": [900, 500, 100, 1]}):
        scheduler.set_timesteps(**given, mu=1.3)
        assert torch.equal(scheduler.timesteps, expected)
    with pytest.raises(ValueError, match="number of steps"):
        scheduler.set_timesteps(mu=1.0)


def test_a_run_forgets_the_one_before():
    scheduler = AnyStepScheduler(kappa=0.5, rho=0.5)
    first = run(scheduler, points(), 4)
    scheduler.set_timesteps(4)
    scheduler.step(torch.ones(3, 8), scheduler.timesteps[0], points())  # a run that was broken off
    assert torch.equal(run(scheduler, points(), 4), first)
    scheduler.set_timesteps(4)
    assert scheduler.step_index is None and scheduler.begin_index is None


def test_a_list_of_generators_serves_one_row_each():
    scheduler = AnyStepScheduler(rho=0.5)
    together = run(scheduler, points(2), 2, [torch.Generator().manual_seed(seed) for seed in (1, 2)])
    for row, seed in enumerate((1, 2)):
        alone = run(scheduler, points(2)[row : row + 1], 2, torch.Generator().manual_seed(seed))
        assert torch.allclose(together[row : row + 1], alone, atol=1e-6)


def test_half_precision_is_left_only_at_the_end():
    scheduler = AnyStepScheduler()
    scheduler.set_timesteps(3)
    F, x_t = points().bfloat16(), (points() + 2).bfloat16()
    output = scheduler.step(F, scheduler.timesteps[0], x_t)
    exact = x_t.float() - (1 - 2 / 3) * F.float()
    assert output.prev_sample.dtype == torch.bfloat16
    assert torch.equal(output.prev_sample, exact.bfloat16()) or largest_difference(output.prev_sample, exact) < 4e-3
    assert largest_difference(output.pred_original_sample.float(), x_t.float() - F.float()) < 4e-3


def test_a_run_may_start_midway():
    scheduler = AnyStepScheduler()
    scheduler.set_timesteps(4)
    x, z = points(), points().flip(0)
    t = scheduler.timesteps[2:3]
    x_t = scheduler.scale_noise(x, t, z)
    assert torch.allclose(x_t, LINEAR.interpolate(x, z, torch.tensor([0.5])))
    assert scheduler.index_for_timestep(t[0]) == 2
    scheduler.set_begin_index(2)
    state = scheduler.step(z - x, t[0], x_t).prev_sample
    assert scheduler.step_index == 3
    assert torch.allclose(state, LINEAR.interpolate(x, z, torch.tensor([0.25])), atol=1e-6)
    assert torch.allclose(scheduler.step(z - x, scheduler.timesteps[3], state).prev_sample, x, atol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rho": 1.5},
        {"kappa": -1.0},
        {"shift": 0.0},
        {"kappa": float("nan")},
        {"shift": float("nan")},
        {"gaps": (1.0, 0.0)},
        {"gaps": (0.1,)},
        {"warp": (0.0, 1.0, 1.0)},
        {"times": [1.0, 0.5]},
        {"times": [0.5, 1.0, 0.0]},
        {"times": [1.2, 0.0]},
        {"times": [0.0]},
    ],
    ids=str,
)
def test_settings_out_of_range(wrong):
    with pytest.raises(ValueError):
        AnyStepScheduler(**wrong)
    if "times" in wrong:
        with pytest.raises(ValueError, match="descend"):
            stock_scheduler_config(wrong["times"])


def test_the_stock_config_of_a_model_s_settings():
    assert stock_scheduler_config(Settings(steps=2, times=[1.0, 0.6, 0.0]))["sigmas"] == [1.0, 0.6]
    assert stock_scheduler_config(Settings(steps=1, times=[1.0, 0.6, 0.0]))["sigmas"] == [1.0]
    shifted = stock_scheduler_config(Settings(steps=2), time_shift=3.0)
    assert shifted["sigmas"] == pytest.approx([1.0, 0.5])  # before the scheduler's own shift
    config = json.loads(json.dumps(shifted["scheduler"]))
    assert config["shift"] == 3.0 and not config["use_dynamic_shifting"] and config["shift_terminal"] is None
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(sigmas=shifted["sigmas"], mu=0.7)
    assert scheduler.sigmas.tolist() == pytest.approx([1.0, 0.75, 0.0])
