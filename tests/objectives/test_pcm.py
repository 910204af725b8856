"""PCM: phases and their edges."""

from __future__ import annotations

import pytest
import torch
from closed_forms import make_batch, make_roles
from exact_fields import (
    EVERY_TRANSPORT,
)

from apexflow.objectives.apex import move
from apexflow.objectives.lcm import LCM
from apexflow.objectives.pcm import PCM
from apexflow.transport import Transport


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@EVERY_TRANSPORT
def test_pcm_with_one_phase_is_latent_consistency(transport: Transport, guidance: float) -> None:
    pcm, lcm = make_roles(), make_roles()
    one = PCM(phases=1, guidance=guidance)(pcm.networks(transport=transport), make_batch(), {}).total
    other = LCM(guidance=guidance)(lcm.networks(transport=transport), make_batch(), {}).total
    one.backward()
    other.backward()
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(pcm.gradients("student"), lcm.gradients("student"), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("phases", [1, 3, 4])
def test_pcm_stays_within_the_phase(phases: int) -> None:
    roles, objective = make_roles(), PCM(phases=phases, skip=300, points=1000)
    objective(roles.networks(), make_batch(64), {})
    t, s = roles.calls("student")[0].t, roles.calls("reference")[0].t
    edges = [phase * 1000 // phases / 1000 for phase in range(phases + 1)]
    for later, earlier in zip(t.tolist(), s.tolist(), strict=True):
        phase = next(i for i in range(phases) if edges[i] < later - 1e-6 <= edges[i + 1])
        assert earlier == pytest.approx(max(edges[phase], later - 0.3), abs=1e-6)
    assert phases == 1 or (s > 0).any()


def test_pcms_edges_belong_to_the_phase_above() -> None:
    index = torch.tensor([1, 250, 251, 500, 999, 1000])
    assert PCM(phases=4).edge(index).tolist() == [0, 0, 250, 250, 750, 750]


@EVERY_TRANSPORT
def test_moving_to_where_one_stands_changes_nothing(transport: Transport) -> None:
    """PCM's boundary condition, Eq. (3) at s_m."""
    F, x_t, t = torch.randn(3, 2), torch.randn(3, 2), torch.tensor([0.0, 0.25, 0.9])
    torch.testing.assert_close(move(F, x_t, t, t, transport), x_t, rtol=1e-3, atol=1e-3)
