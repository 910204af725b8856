"""SANA-Sprint (Chen et al., 2025): SANA distilled on TrigFlow, with the guidance scale as an input."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor, nn

from apexflow.backbones import Settings
from apexflow.backbones.precision import compute_dtype
from apexflow.backbones.sana import Sana
from apexflow.conditioning import Condition


class SanaSprint(Sana):
    """A `SanaSprintPipeline` folder. Time goes in as t in [0, 1] and the raw output is z - x on linear transport.

    The stock pipeline's TrigFlow is the same field in other coordinates. The network is fed
    `settings.embedded_guidance`, by default the stock 4.5.
    """

    family: ClassVar[str] = "sana-sprint"
    pipeline = "SanaSprintPipeline"
    defaults: ClassVar[Settings] = Settings(steps=2, embedded_guidance=4.5)
    flow_scheduler = False
    bfloat16 = True

    def __init__(self, parts: dict[str, Any], settings: Settings) -> None:
        super().__init__(parts, settings)
        # Sends the middle of an even two-step grid to the stock pipeline's intermediate angle of 1.3.
        self.time_shift = math.tan(1.3)

    def stock_options(self, settings: Settings) -> dict[str, Any]:
        """The scale goes into the network."""
        options, scale = super().stock_options(settings), settings.embedded_guidance
        del options["guidance_scale"]
        return options if scale is None else options | {"guidance_scale": scale}

    def stock_places(self, times: Tensor) -> dict[str, Any]:
        """The pipeline begins at pure noise by itself, and its middle of two steps is ours; another number wants it unset."""
        return {} if len(times) == 3 else {"intermediate_timesteps": None}

    def velocity(self, network: nn.Module, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        """F(x_t, t, c) with x_t (B, C, h, w), answered in the dtype of x_t."""
        dtype = compute_dtype(network)
        F = network(
            hidden_states=x_t.to(dtype),
            encoder_hidden_states=c.embeds.to(dtype),
            encoder_attention_mask=c.mask,
            timestep=t.float(),
            guidance=self.guidance_input(len(x_t), x_t.device),
            return_dict=False,
        )[0]
        return F.to(x_t.dtype)
