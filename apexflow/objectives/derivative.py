"""The total derivative of a prediction along a path: exact by forward-mode differentiation, or a central difference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from apexflow.errors import UserError
from apexflow.transport import Transport, expand

Kind = Literal["jvp", "difference"]


def derivative(
    answer: Callable[[Tensor], Tensor], t: Tensor, kind: Kind, epsilon: float, round_time: Callable[[Tensor], Tensor]
) -> Tensor:
    """`d answer(t) / d t`, in the shape of the answer (B, ...), for times t (B,).

    "jvp" is exact, and UserError where an operator of the network has no forward-mode derivative. "difference" asks twice,
    `epsilon` to either side and within [0, 1], at times as the network sees them; its error is of second order.
    """
    if kind == "jvp":
        try:
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward-mode derivative
                tangent: Any = torch.func.jvp(answer, (t,), (torch.ones_like(t),))[1]
        except RuntimeError as error:  # what torch raises for it derives from this
            raise UserError(
                f"derivative jvp is not possible on this model ({str(error).splitlines()[0][:120]}): set "
                "objective.derivative=difference"
            ) from error
        return tangent
    later, earlier = round_time((t + epsilon).clamp_max(1)), round_time((t - epsilon).clamp_min(0))
    above, below = answer(later), answer(earlier)
    # Two times that a coarse backbone rounds to one give a difference of 0, whatever it is divided by.
    return (above - below) / expand((later - earlier).clamp_min(1e-6), above)


def speed(t: Tensor, transport: Transport) -> Tensor:
    """(B,): how fast `x_t` moves with t for a unit of the prediction F at fixed x_t; 1 for linear transport."""
    alpha, gamma = transport.alpha(t), transport.gamma(t)
    d_alpha, d_gamma = (rate_of(schedule, t) for schedule in (transport.alpha, transport.gamma))
    return (d_gamma * alpha - d_alpha * gamma) / transport.determinant(t)


def rate_of(schedule: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """(B,): how fast a function of the time alone changes at times t (B,)."""
    tangent: Any = torch.func.jvp(schedule, (t,), (torch.ones_like(t),))[1]
    return tangent
