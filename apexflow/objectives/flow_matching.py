"""Flow matching (Lipman et al., 2022): velocity regression. Trains teachers, and is the measure of cost for the others."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from apexflow.objectives import Batch, Losses, Networks, Objective
from apexflow.objectives.distances import mean_square
from apexflow.objectives.times import TimeLaw


@dataclass(frozen=True)
class FlowMatching(Objective):
    """Eq. (2): mean squared error against `z - x` (or the target of another transport).

    times: the law of the times at which it is asked.
    """

    times: TimeLaw = field(default_factory=TimeLaw)

    keeps_sampling: ClassVar[bool] = True
    citation: ClassVar[str] = "Lipman et al., Flow Matching for Generative Modeling, 2022"
    sampler: ClassVar[dict[str, float]] = {"kappa": 0.0, "rho": 0.0, "order": 1}

    def __call__(self, networks: Networks, batch: Batch, memory: MutableMapping[str, Tensor]) -> Losses:
        """Mean over the elements of each row, averaged over the global batch."""
        t = networks.round_time(self.times.draw(batch.random))
        z = batch.random.normal(batch.x.shape[1:]).to(batch.x)
        F = networks.student(networks.transport.interpolate(batch.x, z, t), t, batch.c)
        error = F - networks.transport.target(batch.x, z, t)
        loss = mean_square(error).sum() / batch.total
        return Losses(loss, {"loss": loss.detach()})
