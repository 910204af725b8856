"""The condition c of F(x_t, t, c), its shift A c + b (Eq. 16), and guidance between a condition and the null condition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """What a prompt becomes: `embeds` (B, L, D), `mask` (B, L) with 1 for a real token or None, `pooled` (B, P) or None."""

    embeds: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None

    def __post_init__(self) -> None:
        if self.embeds.ndim != 3:
            raise ValueError(f"embeds must be (B, L, D), got {tuple(self.embeds.shape)}")
        if self.mask is not None and self.mask.shape != self.embeds.shape[:2]:
            raise ValueError(f"mask must be {tuple(self.embeds.shape[:2])}, got {tuple(self.mask.shape)}")
        if self.pooled is not None and (self.pooled.ndim != 2 or self.pooled.shape[0] != self.embeds.shape[0]):
            raise ValueError(f"pooled must be ({self.embeds.shape[0]}, P), got {tuple(self.pooled.shape)}")

    def __len__(self) -> int:
        return self.embeds.shape[0]

    def __getitem__(self, rows: Tensor | slice | Sequence[int]) -> Condition:
        """The same condition for some rows of the batch (a slice, a list of indices, or a boolean or index tensor)."""
        if not isinstance(rows, slice):
            rows = torch.as_tensor(rows, device=self.embeds.device)
        return self._map(lambda tensor: tensor[rows])

    def shift(self, a: float | Tensor, b: float | Tensor) -> Condition:
        """Eq. (16): `c_pert = A c + b` on text and pooled embeddings; the mask stays.

        `a` is a float (A = a I), a (D,) vector (A = diag a) or a (D, D) matrix; `b` a float (uniform bias) or a (D,) vector.
        Vectors and matrices have the width of `embeds`; a pooled embedding of another width is left as it is by them, and is
        shifted like the text by floats.
        """
        embeds = _affine(self.embeds, a, b)
        pooled = self.pooled
        if pooled is not None and _fits(pooled, a) and _fits(pooled, b):
            pooled = _affine(pooled, a, b)
        return replace(self, embeds=embeds, pooled=pooled)

    def to(self, device: torch.device | str) -> Condition:
        """A copy on another device. On its way to a GPU nothing waits for it."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=tensor.device.type == "cpu"))

    def expand(self, rows: int) -> Condition:
        """A condition of one row (the null condition, say), repeated for `rows` rows."""
        return self._map(lambda tensor: tensor.expand(rows, *tensor.shape[1:]))

    def detach(self) -> Condition:
        """The same condition out of the graph."""
        return self._map(Tensor.detach)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Condition:
        mask = None if self.mask is None else function(self.mask)
        return Condition(function(self.embeds), mask, None if self.pooled is None else function(self.pooled))


def _affine(c: Tensor, a: float | Tensor, b: float | Tensor) -> Tensor:
    scaled = c @ a.to(c).T if isinstance(a, Tensor) and a.ndim == 2 else c * (a.to(c) if isinstance(a, Tensor) else a)
    return scaled + (b.to(c) if isinstance(b, Tensor) else b)


def _fits(c: Tensor, value: float | Tensor) -> bool:
    return not isinstance(value, Tensor) or value.ndim == 0 or value.shape[-1] == c.shape[-1]


def replace_rows(c: Condition, where: Tensor, other: Condition) -> Condition:
    """`c` with the rows that the boolean `where` (B,) marks replaced by the one-row condition `other`, mask and pooled too.

    `where` best lies on the CPU, where it is looked at.
    """
    if not bool(where.any()):
        return c
    where = where.to(c.embeds.device, non_blocking=True)
    length = max(c.embeds.shape[1], other.embeds.shape[1])
    embeds, mask = pad_tokens(c.embeds, length), pad_tokens(mask_of(c), length)
    embeds = torch.where(where[:, None, None], pad_tokens(other.embeds, length).to(embeds), embeds)
    mask = torch.where(where[:, None], pad_tokens(mask_of(other), length).to(mask), mask)
    pooled = c.pooled
    if pooled is not None and other.pooled is not None:
        pooled = torch.where(where[:, None], other.pooled.to(pooled), pooled)
    return Condition(embeds, mask, pooled)


def join(c: Condition, other: Condition) -> Condition:
    """The rows of `c`, then those of `other`, padded to the longer; without a mask where neither has one and none is padded."""
    length = max(c.embeds.shape[1], other.embeds.shape[1])
    embeds = torch.cat([pad_tokens(c.embeds, length), pad_tokens(other.embeds, length).to(c.embeds)])
    mask = pooled = None
    if c.mask is not None or other.mask is not None or c.embeds.shape[1] != other.embeds.shape[1]:
        mask = torch.cat([pad_tokens(mask_of(c), length), pad_tokens(mask_of(other), length).to(mask_of(c))])
    if c.pooled is not None and other.pooled is not None:
        pooled = torch.cat([c.pooled, other.pooled.to(c.pooled)])
    return Condition(embeds, mask, pooled)


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: `F(null) + scale (F(c) - F(null))`, so scale 1 is no guidance."""
    return unconditional + scale * (conditional - unconditional)


def guide_at_length(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """`guide` with each vector (..., D) cut or stretched to the length of the conditional answer's, as some pipelines do."""
    guided = guide(conditional, unconditional, scale)
    return guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


def guided_answer(
    ask: Callable[[Tensor, Tensor, Condition], Tensor],
    x_t: Tensor,
    t: Tensor,
    c: Condition,
    null: Condition,
    scale: float,
    rule: Callable[[Tensor, Tensor, float], Tensor] = guide,
    at_once: bool = False,
    above: float = 0.0,
) -> Tensor:
    """What `ask(x_t, t, c)` answers, guided by `rule`: asked for both conditions in one pass, or in two.

    Rows at a time below `above` are not guided, and not asked for the null condition. Where that is all of them, the first is
    asked for it all the same: processes that share one sharded network must ask it equally often.
    """
    high = t >= above if above > 0 else None  # None: all, without a look at the times, for which a GPU is waited for
    asked = slice(None) if high is None else high if bool(high.any()) else slice(1)
    if at_once:
        both = ask(torch.cat([x_t, x_t[asked]]), torch.cat([t, t[asked]]), join(c, null[asked]))
        F, F_null = both[: len(t)], both[len(t) :]
    else:
        F, F_null = ask(x_t, t, c), ask(x_t[asked], t[asked], null[asked])
    if high is None:
        return rule(F, F_null, scale)
    guided = F.clone()
    guided[high] = rule(F[high], F_null[high[asked]], scale)
    return guided


def pad_tokens(tensor: Tensor, length: int) -> Tensor:
    """Append zeros to (B, L, ...) along the token axis until it is `length` long."""
    missing = length - tensor.shape[1]
    if missing <= 0:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(tensor.shape[0], missing, *tensor.shape[2:])], 1)


def mask_of(condition: Condition) -> Tensor:
    """Its mask (B, L), all ones where it has none."""
    return condition.embeds.new_ones(condition.embeds.shape[:2]) if condition.mask is None else condition.mask
