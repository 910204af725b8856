"""LCM: its function and its grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closed_forms import EVERY_TRANSPORT, make_batch, make_roles

from apexflow.objectives.lcm import LCM
from apexflow.objectives.pcm import PCM
from apexflow.transport import Transport


@EVERY_TRANSPORT
def test_lcms_function_is_the_identity_on_data_and_the_endpoint_elsewhere(transport: Transport) -> None:
    F, x_t = torch.randn(2, 3), torch.randn(2, 3)
    clean, noisy = (LCM().consistency(F, x_t, torch.full((2,), time), transport) for time in (0.0, 0.5))
    assert torch.equal(clean, x_t)
    torch.testing.assert_close(noisy, transport.endpoint(F, x_t, torch.full((2,), 0.5)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [LCM, PCM])
def test_a_shift_moves_the_grid_towards_noise(method: Any) -> None:
    times = []
    for shift in (1.0, 3.0):
        roles = make_roles(method())
        method(shift=shift)(roles.networks(), make_batch(), {})
        times.append(roles.calls("student")[0].t)
    torch.testing.assert_close(times[1], 3 * times[0] / (1 + 2 * times[0]))
