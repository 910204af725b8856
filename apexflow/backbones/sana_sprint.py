"""SANA-Sprint (Chen et al., 2025): SANA distilled on TrigFlow, with the guidance scale as an input."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor

from apexflow.backbones import Settings
from apexflow.backbones.sana import Sana


class SanaSprint(Sana):
    """A `SanaSprintPipeline` folder. Time goes in as t in [0, 1] and the raw output is z - x on linear transport.

    The stock pipeline's TrigFlow is the same field in other coordinates. The network is fed
    `settings.embedded_guidance`, by default the stock 4.5.
    """

    family: ClassVar[str] = "sana-sprint"
    pipeline = "SanaSprintPipeline"
    defaults: ClassVar[Settings] = Settings(steps=2, embedded_guidance=4.5)
    flow_scheduler = False
    embeds_guidance = True
    bfloat16 = True

    def __init__(self, parts: dict[str, Any], settings: Settings) -> None:
        super().__init__(parts, settings)
        # Sends the middle of an even two-step grid to the stock pipeline's intermediate angle of 1.3.
        self.time_shift = math.tan(1.3)

    def stock_places(self, times: Tensor) -> dict[str, Any]:
        """The pipeline begins at pure noise by itself, and its middle of two steps is ours; another number wants it unset."""
        return {} if len(times) == 3 else {"intermediate_timesteps": None}

    def inputs(self, t: Tensor) -> dict[str, Tensor | None]:
        return {"timestep": t.float(), "guidance": self.guidance_input(len(t), t.device)}
