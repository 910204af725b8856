"""How networks are asked: as they are, with their weights held, and with nothing computed again in backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from apexflow.backbones import Backbone, second_time
from apexflow.conditioning import Condition
from apexflow.objectives import Field, Networks


@contextmanager
def not_recomputed(network: nn.Module) -> Iterator[None]:
    """Within, no activation is left to be computed again in backward, when the network stands differently."""
    if not torch.is_grad_enabled():  # nothing is then, and looking through a deep network takes time
        yield
        return
    parts: list[Any] = [part for part in network.modules() if getattr(part, "gradient_checkpointing", False)]
    for part in parts:
        part.gradient_checkpointing = False
    try:
        yield
    finally:
        for part in parts:
            part.gradient_checkpointing = True


def held(field: Field, parameters: Callable[[], Iterable[nn.Parameter]], network: nn.Module | None = None) -> Field:
    """The same field with its weights, `parameters()`, out of the graph: gradients pass through it to what it is asked.

    `network` is the module behind it, of which nothing may be computed again in backward, when the weights are back.
    """

    def answer(*asked: Tensor | Condition) -> Tensor:
        watched = [parameter for parameter in parameters() if parameter.requires_grad]
        for parameter in watched:
            parameter.requires_grad_(False)
        try:
            with nullcontext() if network is None else not_recomputed(network):
                return field(*asked)
        finally:
            for parameter in watched:
                parameter.requires_grad_(True)

    return answer


def networks_of(
    backbone: Backbone, like: Backbone, fields: Mapping[str, Field], frozen: Mapping[str, Field], null: Condition | None
) -> Networks:
    """What an objective calls: `fields` of student, reference and teacher, and asked with their weights held (`frozen`).

    like: whose network the teacher is, and so who guides it.
    """
    return Networks(
        student=fields["student"],
        reference=fields["reference"],
        teacher=fields["teacher"],
        null=null,
        guide=like.guide,
        transport=backbone.transport,
        round_time=backbone.round_time,
        time_shift=backbone.time_shift,
        guided_at_once=like.guided_at_once,
        frozen=frozen,
    )


def field_of(backbone: Backbone, network: nn.Module) -> Field:
    """How a network of the backbone's class is asked."""

    def answer(x_t: Tensor, t: Tensor, c: Condition, s: Tensor | None = None) -> Tensor:
        with second_time.going_to(network, s):
            return backbone.velocity(network, x_t, t, c)

    return answer
