"""What every method says of itself: sampler, ranges, roles needed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal, get_origin, get_type_hints

import pytest
import torch
from closed_forms import gaussian_velocity, make_batch, make_roles
from exact_fields import MEAN, STD

from apexflow.objectives import objectives
from apexflow.objectives.apex import APEX
from apexflow.objectives.cm import CM
from apexflow.objectives.ctm import CTM
from apexflow.objectives.dmd2 import DMD2
from apexflow.objectives.lcm import LCM
from apexflow.objectives.meanflow import MeanFlow
from apexflow.objectives.pcm import PCM
from apexflow.objectives.rcgm import RCGM
from apexflow.objectives.sana_sprint import SanaSprint
from apexflow.objectives.scm import SCM
from apexflow.objectives.times import TimeLaw
from apexflow.objectives.twinflow import TwinFlow
from apexflow.objectives.ucgm import UCGM
from apexflow.sampler import sample, time_grid

LN2 = math.log(2)  # laws of noise levels for data of deviation 0.5, shifted to ours


@pytest.mark.parametrize("method", objectives().values(), ids=objectives().keys())
def test_every_method_recommends_sampler_settings(method: Any) -> None:
    for steps in (1, 3, 20):
        settings: Any = method.sampling(steps)
        assert set(settings) == {"kappa", "rho", "order"}
        ends = sample(gaussian_velocity(MEAN, STD), torch.zeros(2, 1), time_grid(steps).float(), **settings)
        assert ends.isfinite().all()


def test_a_method_may_be_sampled_otherwise_from_a_number_of_steps_on() -> None:
    """RCGM and TwinFlow: fresh noise up to the four steps of the released few-step settings, jumps along the path after."""
    for method in (RCGM, TwinFlow):
        assert [method.sampling(steps)["rho"] for steps in (1, 2, 4, 8, 20)] == [1, 1, 1, 0, 0]
    assert SCM.sampling(20) == SCM.sampler


@pytest.mark.parametrize(
    ("method", "options", "named"),
    [
        (APEX, {"lambda_max": 1.1}, "lambda_max"),
        (APEX, {"lambda_max": -0.1}, "lambda_max"),
        (APEX, {"share": 1.0}, "path_rows"),
        (APEX, {"share": 0.0}, "endpoint_weight"),
        (APEX, {"share": 1.5}, "share"),
        (APEX, {"share": -0.5}, "share"),
        (APEX, {"guided_above": 1.5}, "guided_above"),
        (APEX, {"path_weight": -1.0}, "path_weight"),
        (APEX, {"path_weight": 0.0, "endpoint_weight": 0.0}, "path_weight"),
        (APEX, {"clip": -1.0}, "clip"),
        (APEX, {"c": 0.0}, "c must"),
        (APEX, {"p": -0.1}, "p in"),
        (APEX, {"p": 1.1}, "p in"),
        (APEX, {"buffer_size": 0}, "buffer_size"),
        (APEX, {"guidance": float("nan")}, "guidance"),
        (CM, {"intervals": (20, 10)}, "intervals"),
        (CM, {"intervals": (0, 10)}, "intervals"),
        (CM, {"rho": 0.0}, "rho"),
        (CM, {"huber": 0.0}, "huber"),
        (CM, {"order": 3}, "order"),
        (SCM, {"epsilon": 0.0}, "epsilon"),
        (SCM, {"warmup": 1.5}, "warmup"),
        (SCM, {"c": 0.0}, "c must"),
        (UCGM, {"lam": 1.1}, "lam"),
        (UCGM, {"threshold": -0.1}, "threshold"),
        (UCGM, {"zeta": -1.0}, "zeta"),
        (UCGM, {"zeta": 1.0, "enhance": "self"}, "zeta"),
        (UCGM, {"theta": (0.0, 1.0)}, "theta"),
        (UCGM, {"epsilon": 0.5}, "epsilon"),
        (UCGM, {"clip": 0.0}, "clip"),
        (LCM, {"skip": 0}, "skip"),
        (LCM, {"skip": 1001}, "skip"),
        (LCM, {"huber": 0.0}, "huber"),
        (PCM, {"phases": 0}, "phases"),
        (PCM, {"phases": 1001}, "phases"),
        (PCM, {"skip": 0}, "skip"),
        (PCM, {"shift": 0.0}, "shift"),
        (PCM, {"adversarial": -0.1}, "adversarial"),
        (PCM, {"depths": ()}, "depths"),
        (CTM, {"intervals": 0}, "intervals"),
        (CTM, {"huber": 0.0}, "huber"),
        (MeanFlow, {"share": 1.5}, "share"),
        (MeanFlow, {"epsilon": 0.0}, "epsilon"),
        (MeanFlow, {"kappa": 1.0}, "kappa"),
        (MeanFlow, {"drop": 1.0}, "drop"),
        (MeanFlow, {"c": 0.0}, "c above"),
        (RCGM, {"order": 0}, "order"),
        (RCGM, {"stride": 0.0}, "stride"),
        (RCGM, {"clip": 0.0}, "clip"),
        (RCGM, {"guidance": 0.0}, "guidance"),
        (RCGM, {"short": 0.0}, "short"),
        (TwinFlow, {"rectify": -0.1}, "rectify"),
        (TwinFlow, {"clip": 0.0}, "clip"),
        (DMD2, {"steps": 0}, "steps"),
        (DMD2, {"student_every": 0}, "student_every"),
        (DMD2, {"gan": -1.0}, "gan"),
        (SanaSprint, {"weight": -1.0}, "weight"),
        (SanaSprint, {"share": 2.0}, "share"),
        (SanaSprint, {"depths": (1.5,)}, "depths"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(method: Any, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        method(**options)


NAMED = [
    (method, name)
    for method in objectives().values()
    for name, kind in get_type_hints(method).items()
    if get_origin(kind) is Literal
]


@pytest.mark.parametrize(("method", "reading"), NAMED, ids=str)
def test_a_reading_of_no_known_name_is_refused(method: Any, reading: str) -> None:
    with pytest.raises(ValueError, match=f"{reading} must be one of .*, got 'rowz'"):
        method(**{reading: "rowz"})


@pytest.mark.parametrize(
    ("objective", "needs"),
    [
        (CM(), ("teacher",)),
        (CM(mode="training"), ()),
        (CM(mode="training", target="reference"), ("reference",)),
        (SCM(mode="training"), ()),
        (UCGM(zeta=0), ()),
        (UCGM(zeta=0.5, enhance="self"), ("reference",)),
        (LCM(target="student"), ("teacher",)),
        (PCM(target="student", adversarial=0), ("teacher",)),
    ],
    ids=repr,
)
def test_needs_follow_the_options(objective: Any, needs: tuple[str, ...]) -> None:
    roles = make_roles()
    objective(roles.networks(), make_batch(), {}).total.backward()
    assert objective.needs == needs
    assert tuple(name for name in ("teacher", "reference") if roles.calls(name)) == needs
    assert all(part is not None and part.any() for part in roles.gradients("student"))


@pytest.mark.parametrize(
    "objective",
    [APEX(path_weight=0, share=1), CM(guidance=3), SCM(guidance=3), UCGM(guidance=3), LCM(), PCM(adversarial=0)],
    ids=repr,
)
def test_a_guided_teacher_needs_a_null_condition(objective: Any) -> None:
    roles = make_roles()
    objective(roles.networks(), make_batch(), {})
    asked = {call.c.embeds.sum().item() for call in roles.calls("teacher")}
    assert len(asked) == 2
    with pytest.raises(ValueError, match="null"):
        objective(replace(roles.networks(), null=None), make_batch(), {})


@pytest.mark.parametrize(
    ("method", "published"),
    [
        (CM, {"intervals": (10, 1280), "rho": 7.0, "huber": 0.00054, "times": TimeLaw(mean=-1.1 + LN2, spread=2.0)}),
        (SCM, {"c": 0.1, "warmup": 0.1, "times": TimeLaw(mean=-1.0 + LN2, spread=1.4)}),
        (CTM, {"intervals": 18, "target": "reference"}),
        (MeanFlow, {"share": 0.25, "p": 1.0, "drop": 0.1, "derivative": "jvp", "times": TimeLaw(mean=-0.4)}),
        (UCGM, {"lam": 1.0, "zeta": 2.0, "theta": (0.8, 1.0)}),
        (RCGM, {"order": 2, "stride": 0.01, "guidance": 5.0, "clip": 1.0}),
        (TwinFlow, {"rectify": 0.5}),
        (LCM, {"guidance": 9.0, "skip": 20, "points": 1000, "huber": 1e-3, "sigma_data": 0.5, "scaling": 10.0}),
        (PCM, {"phases": 4, "guidance": 5.5, "skip": 20, "adversarial": 0.1}),
        (DMD2, {"student_every": 5, "guidance": 8.0, "gan": 5e-3, "judge_gan": 1e-2}),
        (SanaSprint, {"weight": 0.5, "share": 0.5, "judge_times": TimeLaw(mean=-0.6 + LN2), "mismatched": True}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_defaults_are_the_published_ones(method: Any, published: dict[str, Any]) -> None:
    """As each file's docstring says of its paper or its released training; a comparison stands on them."""
    assert method() == replace(method(), **published)


def test_sana_sprints_scm_has_the_released_law_and_guidance() -> None:
    assert SanaSprint().scm == SCM(times=TimeLaw(mean=0.2 + LN2, spread=1.6), guidance=4.5)
