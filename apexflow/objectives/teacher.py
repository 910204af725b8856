"""The frozen teacher as the methods ask it: its answer, guided or not, and its ODE from one time to another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from apexflow.conditioning import Condition, guided_answer
from apexflow.objectives import Networks
from apexflow.transport import expand


def teach(
    networks: Networks, x_t: Tensor, t: Tensor, c: Condition, guidance: float = 1.0, above: float = 0.0
) -> Tensor:
    """The frozen teacher's answer without gradient; a `guidance` other than 1 asks it for the null condition as well, at times
    from `above` on."""
    with torch.no_grad():
        if guidance == 1:
            return networks.teacher(x_t, t, c)
        null = null_rows(networks, len(c), guidance)
        rule, at_once = networks.guide, networks.guided_at_once
        return guided_answer(networks.teacher, x_t, t, c, null, guidance, rule, at_once, above)


def null_rows(networks: Networks, rows: int, guidance: float) -> Condition:
    """The null condition that `guidance` asks for, once a row; ValueError where there is none."""
    if networks.null is None:
        raise ValueError(f"guidance {guidance} needs a null condition: give one, or guidance 1")
    return networks.null.expand(rows)


def direction(
    networks: Networks,
    ends: tuple[Tensor, Tensor],
    t: Tensor,
    c: Condition,
    velocity: Literal["sample", "teacher"],
    guidance: float,
    guided: Callable[[Tensor, Tensor, Condition], Tensor],
) -> Tensor:
    """Where the path from data to noise (`ends`) leads at times `t`, as a prediction: the teacher's answer, or the sample's own.

    With a `guidance` other than 1 the teacher is guided, and the sample's own is what `guided(v, x_t, null condition)` says.
    """
    x_t = networks.transport.interpolate(*ends, t)
    if velocity == "teacher":
        return teach(networks, x_t, t, c, guidance)
    v = networks.transport.target(*ends, t)
    return v if guidance == 1 else guided(v, x_t, null_rows(networks, len(c), guidance))


def solve(
    networks: Networks, x_t: Tensor, t: Tensor, s: Tensor, c: Condition, guidance: float = 1.0, order: int = 1
) -> Tensor:
    """CM, Eq. (6): the teacher's ODE from `t` to `s`, by DDIM (order 1) or Heun (order 2; DDIM where s is 0)."""
    transport = networks.transport
    candidate = transport.move(teach(networks, x_t, t, c, guidance), x_t, t, s)
    if order == 1:
        return candidate
    F = teach(networks, candidate, s, c, guidance)
    z_hat, x_hat = transport.noise(F, candidate, s), transport.endpoint(F, candidate, s)
    slope = expand(transport.alpha(s) - transport.alpha(t), x_t) * z_hat
    slope = slope + expand(transport.gamma(s) - transport.gamma(t), x_t) * x_hat
    return torch.where(expand(s, x_t) > 0, (candidate + x_t + slope) / 2, candidate)
