"""The further networks that a method declares (a critic, a judge), made from the pretrained model; no method is named here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from apexflow.backbones import Backbone
from apexflow.backbones.layers import layer_answers
from apexflow.conditioning import Condition
from apexflow.errors import UserError
from apexflow.objectives import Field, Further, Networks
from apexflow.training.fields import held
from apexflow.training.roles import Roles

HIDDEN = 64  # width of a judge's heads


@dataclass
class Furthers:
    """The further networks by name: how they are asked, asked with their weights held, and what is trained of each."""

    fields: dict[str, Field] = field(default_factory=dict)
    frozen: dict[str, Field] = field(default_factory=dict)
    trained: dict[str, dict[str, nn.Parameter]] = field(default_factory=dict)

    def join(self, networks: Networks) -> Networks:
        """The networks of a run with these among them."""
        return replace(networks, further=self.fields, frozen={**networks.frozen, **self.frozen})

    def add(
        self,
        name: str,
        asked: Field,
        trained: dict[str, nn.Parameter],
        network: nn.Module,
        below: str = "",
    ) -> None:
        """`network` answers for it; `below`: a further role that it passes through, whose weights are held with its own."""
        self.fields[name], self.trained[name] = asked, {f"{name}.{key}": p for key, p in trained.items()}
        names = [role for role in (name, below) if role in self.trained]
        self.frozen[name] = held(asked, lambda: chain(*(self.trained[role].values() for role in names)), network)


def copies(declared: Sequence[Further]) -> list[str]:
    """The networks among them that are like the student: roles are made with them."""
    return [one.name for one in declared if one.kind == "field"]


def make_furthers(
    declared: Sequence[Further], backbone: Backbone, roles: Roles, networks: Networks, null: Condition, seed: int
) -> Furthers:
    """What a method declares, in its order; UserError for a backbone without blocks that a judge could look at."""
    made = Furthers()
    for one in declared:
        with torch.random.fork_rng():  # the same weights whatever was drawn before, so in every process
            torch.manual_seed(seed)
            if one.kind == "field":
                made.add(one.name, *roles.further(one.name), roles.network(one.name))
            else:
                _add_judge(made, one, backbone, roles, networks, null)
    return made


def _add_judge(
    made: Furthers, one: Further, backbone: Backbone, roles: Roles, networks: Networks, null: Condition
) -> None:
    below: Field = made.fields[one.on] if one.on in made.fields else getattr(networks, one.on)
    network = roles.network(one.on)
    look = Look(below, network, blocks_at(network, one.depths))
    x = torch.zeros(1, *backbone.latent_shape((backbone.default_size,) * 2), device=null.embeds.device)
    with torch.no_grad():
        seen = look(x, torch.ones(1, device=x.device), null)
    judge = Judge(look, [part.shape[-1] for part in seen]).to(x.device)
    made.add(one.name, judge, dict(judge.named_parameters()), network, one.on)


class Judge(nn.Module):
    """Small heads on what some blocks say: logits (B, N), one for each head and token."""

    def __init__(self, look: Look, widths: Sequence[int]) -> None:
        super().__init__()
        self.look = look
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, 1))
            for width in widths
        )

    def forward(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        seen = self.look(x_t, t, c)
        return torch.cat([head(part.float())[..., 0] for head, part in zip(self.heads, seen, strict=True)], 1)


class Look:
    """What blocks of a network answer while the field that it stands behind is asked: tokens (B, L, D) each."""

    def __init__(self, below: Field, network: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self.below, self.network, self.blocks = below, network, list(blocks)

    def __call__(self, x_t: Tensor, t: Tensor, c: Condition) -> list[Tensor]:
        seen, _ = layer_answers(self.blocks, lambda: self.below(x_t, t, c))
        found = [tokens(answer) for answer in seen]
        if isinstance(self.network, FSDPModule):
            # Gradients come in by the blocks, past the answer that would call for the weights around them.
            for part in found:
                if part.requires_grad:
                    part.register_hook(lambda _: self.network.unshard())
        return found


def tokens(answer: Any) -> Tensor:
    """A block's last tensor (of text and picture, the picture's) as tokens (B, L, D); maps (B, C, h, w) are flattened."""
    if not isinstance(answer, Tensor):
        answer = [part for part in answer if isinstance(part, Tensor)][-1]
    return answer.flatten(2).transpose(1, 2) if answer.ndim == 4 else answer


def blocks_at(network: nn.Module, depths: Sequence[float]) -> list[nn.Module]:
    """The blocks at shares of the depth of a network's longest list of blocks; UserError for a network without one."""
    lists = [part for part in network.children() if isinstance(part, nn.ModuleList)]
    if not lists:
        raise UserError(
            f"{type(network).__name__} cannot be looked into by a judge: it has no list of blocks; choose a method "
            "without a judge, such as apex or dmd2 with objective.gan=0"
        )
    blocks = max(lists, key=len)
    return [blocks[min(int(depth * len(blocks)), len(blocks) - 1)] for depth in depths]
