"""Times as networks see them, epsilon tables, time shifts, LoRA sizes, and what a condition shift can do."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers.models.embeddings import Timesteps
from tiny import BUILDERS

from apexflow.backbones import check_shift, load_backbone
from apexflow.backbones.discrete_vp import DiscreteVP
from apexflow.backbones.scheduler import scheduler_shift
from apexflow.errors import UserError
from apexflow.objectives import Batch, Networks, apex
from apexflow.randomness import RowRandom
from apexflow.sampler import shift_times
from apexflow.transport import LINEAR

ROUNDING = ("qwen_image", "flux_schnell", "flux_dev", "flux2")
NORMALIZING = ("qwen_image", "z_image", "lumina2")


def answers(backbone, *times, c=None):
    """F at one point and several times (or conditions), by a network without gradients."""
    c = backbone.encode_prompts(["a red cube"]) if c is None else c
    x_t = torch.randn(1, *backbone.latent_shape((32, 64)), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return [backbone.velocity(backbone.transformer, x_t, torch.tensor([t]), c) for t in times]


# -- Rounded times -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDERS)
def test_which_families_round_time_in_bf16(name, folder_of):
    backbone = load_backbone(str(folder_of(name)), dtype=torch.bfloat16)
    near, same_bin = answers(backbone, 0.901, 0.9035)
    assert torch.equal(near, same_bin) == (name in ROUNDING)
    t = torch.linspace(0, 1, 4001)
    rounded = backbone.round_time(t)
    assert rounded.dtype == t.dtype and torch.equal(backbone.round_time(rounded), rounded)
    assert torch.equal(rounded, t) == (name not in ROUNDING)
    assert float((rounded - t).abs().max()) < 2**-7.9
    assert float(backbone.round_time(torch.ones(1))) == 1


@pytest.mark.parametrize("name", ROUNDING)
def test_a_float32_network_rounds_nothing(name, backbone_of):
    t = torch.rand(100)
    assert torch.equal(backbone_of(name).round_time(t), t)
    near, other = answers(backbone_of(name), 0.901, 0.9035)
    assert not torch.equal(near, other)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["qwen_image", "flux_schnell", "flux2"])
def test_the_secant_is_taken_at_the_times_that_the_network_saw(name, autocast, folder_of, monkeypatch):
    backbone = load_backbone(str(folder_of(name)), dtype=torch.float32 if autocast else torch.bfloat16)
    seen, given = [], []

    def look(module, inputs):
        seen.append(inputs[0].float() / (1000 if name.startswith("flux") else 1))

    def remember(F_t, F_lt, x_t, x_lt, t, lt, *rest):
        given.extend([t, lt])
        return target(F_t, F_lt, x_t, x_lt, t, lt, *rest)

    (time_proj,) = (part for part in backbone.transformer.modules() if isinstance(part, Timesteps))
    time_proj.register_forward_pre_hook(look)
    target = apex.secant_target
    monkeypatch.setattr(apex, "secant_target", remember)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        run_objective(backbone, backbone.round_time)
        assert given and all(any(same(t, other) for other in seen) for t in given)
        assert not torch.equal(given[0], given[1])
        seen.clear(), given.clear()
        run_objective(backbone, lambda t: t)  # without rounding, the secant divides by a step that was never taken
        unrounded = autocast and name == "flux2"  # which takes the dtype of the latents before its first layer
        assert any(same(given[0], other) for other in seen) == unrounded


def same(times, others):
    """But for the last bit of float32."""
    return torch.allclose(times, others, rtol=1e-6, atol=0)


def run_objective(backbone, round_time):
    """The path objective on four rows, every role played by the one network."""

    def field(x_t, t, c):
        return backbone.velocity(backbone.transformer, x_t, t, c)

    networks = Networks(field, field, field, round_time=round_time)
    x = torch.randn(4, *backbone.latent_shape((32, 64)))
    rows = torch.arange(4)
    c = backbone.encode_prompts(["a red cube"] * 4)
    apex.APEX(endpoint_weight=0.0, guidance=1.0)(networks, Batch(x, c, RowRandom(0, 0, rows.tolist()), rows, 4), {})


# -- Epsilon models ----------------------------------------------------------------------------------------------------

TABLES = {
    "sdxl": ({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}, 0.9360, 14.6),
    "pixart": ({"beta_start": 0.0001, "beta_end": 0.02}, 0.9937, 156.0),
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("index", [999, 998, 500, 3, 0])
def test_data_predicted_from_epsilon_equal_ddim_s(table, index):
    settings, t_max, gain = TABLES[table]
    ddim = diffusers.DDIMScheduler(**settings, clip_sample=False)
    ddim.set_timesteps(1000)
    schedule = DiscreteVP.of(ddim)
    x_vp, e = torch.randn(2, 2, 4, 6, 6, dtype=torch.float64)
    expected = ddim.step(e, index, x_vp).pred_original_sample
    t = schedule.log_ratio[index].sigmoid()  # log(alpha / gamma) is the logit of alpha / (alpha + gamma)
    x_lin = x_vp * (t.square() + (1 - t).square()).sqrt()
    asked = []

    def epsilon(x, at):
        asked.append((x, at))
        return e

    times = t.expand(2)
    found = LINEAR.endpoint(schedule.velocity(epsilon, x_lin, times), x_lin, times)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-6  # DDIM's table is in float32
    assert float((asked[0][1] - index).abs().max()) < 1e-6 and torch.allclose(asked[0][0], x_vp)
    assert schedule.t_max == pytest.approx(t_max, abs=5e-5)
    assert 1 / math.sqrt(ddim.alphas_cumprod[-1]) == pytest.approx(gain, rel=0.01)


@pytest.mark.parametrize("table", TABLES)
def test_velocity_of_a_perfect_epsilon_and_above_the_table(table):
    schedule = DiscreteVP.of(diffusers.DDIMScheduler(**TABLES[table][0]))
    x, z = torch.randn(2, 3, 4, 6, 6, dtype=torch.float64)
    t = torch.tensor([0.2, 0.6, 0.9], dtype=torch.float64)
    F = schedule.velocity(lambda x_vp, at: z, LINEAR.interpolate(x, z, t), t)
    assert torch.allclose(F, z - x)
    edge = torch.tensor([schedule.t_max - 1e-9, schedule.t_max + 1e-9, 1.0], dtype=torch.float64)
    x_t = z[:1].expand(3, -1, -1, -1)
    F = schedule.velocity(lambda x_vp, at: x_vp * 0.5, x_t, edge)
    assert torch.allclose(F[0], F[1], atol=1e-5) and bool(F.isfinite().all())
    gamma = (1 + schedule.log_ratio[-1].mul(2).exp()).rsqrt()
    alpha = (1 - gamma.square()).sqrt()
    assert torch.allclose(x_t[2] - F[2], (z[0] - alpha * 0.5 * z[0]) / gamma)  # DDIM from pure noise at the last index
    assert bool((schedule.index(torch.tensor([0.0, 1.0])) == torch.tensor([0.0, 999.0])).all())


def test_schedulers_that_cannot_serve():
    with pytest.raises(UserError, match="predicts 'v_prediction'"):
        DiscreteVP.of(diffusers.DDIMScheduler(prediction_type="v_prediction"))
    with pytest.raises(UserError, match="no DDPM table"):
        DiscreteVP.of(diffusers.FlowMatchEulerDiscreteScheduler())


# -- Time shifts -------------------------------------------------------------------------------------------------------


def test_time_shifts(backbone_of):
    published = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192}
    assert scheduler_shift(published, 1024) == pytest.approx(1.71, abs=0.005)  # Qwen-Image at 512 pixels
    assert scheduler_shift(published, 4096) == pytest.approx(2.00, abs=0.005)
    lightning = published | {"base_shift": math.log(3), "max_shift": math.log(3)}
    assert scheduler_shift(lightning, 4096) == pytest.approx(3)
    assert scheduler_shift({"flow_shift": 3.0}, 1) == 3.0 and scheduler_shift({}, 1) == 1.0
    assert backbone_of("z_image").time_shift == 6.0 and backbone_of("sd3").time_shift == 3.0
    half = torch.tensor([0.5])
    middle = shift_times(half, backbone_of("sana_sprint").time_shift)
    assert float(torch.atan(middle / (1 - middle))) == pytest.approx(1.3)  # the stock pipeline's middle angle
    sdxl = backbone_of("sdxl")
    assert float(sdxl.schedule.index(shift_times(half.double(), sdxl.time_shift))) == pytest.approx(500)


# -- Condition shift ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDERS)
def test_what_scaling_the_text_does(name, backbone_of):
    backbone = backbone_of(name)
    c = backbone.encode_prompts(["a red cube"])
    # Random tiny encoders answer near 0, where the epsilon of the norm still counts; real ones do not.
    c = replace(c, embeds=c.embeds / c.embeds.square().mean().sqrt())
    F, half, minus, minus_half, biased = (
        answers(backbone, 0.9, c=c.shift(a, b))[0] for a, b in ((1, 0), (0.5, 0), (-1, 0), (-0.5, 0), (0.5, 10.0))
    )

    def differ(one, other):
        return float((one - other).abs().max() / F.abs().max())

    assert backbone.normalizes_text == (name in NORMALIZING)
    if backbone.normalizes_text:
        assert differ(half, F) < 1e-4 and differ(minus_half, minus) < 1e-4
    else:
        assert differ(half, F) > 1e-4
    assert differ(minus, F) > 1e-4 and differ(biased, F) > 1e-4


@pytest.mark.parametrize("name", BUILDERS)
def test_shifts_without_contrast_are_refused(name, backbone_of):
    backbone = backbone_of(name)
    check_shift(backbone, *backbone.shift_defaults)
    for a, b in ((-0.5, 0.0), (0.5, 0.1), (0.0, 0.0), (-1.0, 1.0)):
        check_shift(backbone, a, b)
    if name not in NORMALIZING:
        check_shift(backbone, 0.5, 0.0)
        return
    for a in (0.5, 1.0):
        with pytest.raises(UserError, match="gives no contrast"):
            check_shift(backbone, a, 0.0)
