"""APEX: a path objective and an endpoint objective with the network as its own adversary (paper, section 3, Algorithm 1).

Where the paper leaves a choice, the choice is a field of `APEX`; `docs/paper.md` says what each default rests on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate as resize

from apexflow.conditioning import Condition
from apexflow.objectives import Batch, Field, Losses, Networks, Objective, share_of
from apexflow.objectives.teacher import teach
from apexflow.objectives.times import TimeLaw
from apexflow.transport import LINEAR, Transport, expand


def secant_target(
    F_t: Tensor,
    F_lt: Tensor,
    x_t: Tensor,
    x_lt: Tensor,
    t: Tensor,
    lt: Tensor,
    transport: Transport = LINEAR,
    clip: float | None = 1.0,
) -> Tensor:
    """Eq. (12): `F_t - 2 clip(delta f^x / delta a, -clip, clip)`, elementwise, in the shape of `F_t` (B, ...).

    F_t, F_lt: reference predictions at the points `x_t`, `x_lt` of one path at times `t`, `lt` (B,); clip None: no clip.
    """
    secant = endpoint_difference(F_t, F_lt, x_t, x_lt, t, lt, transport) / coefficient_difference(t, lt, x_t, transport)
    return F_t - 2 * (secant if clip is None else secant.clamp(-clip, clip))


def endpoint_difference(
    F_t: Tensor, F_lt: Tensor, x_t: Tensor, x_lt: Tensor, t: Tensor, lt: Tensor, transport: Transport = LINEAR
) -> Tensor:
    """Eq. (10): how far apart the data lie that the two predictions imply."""
    return transport.endpoint(F_t, x_t, t) - transport.endpoint(F_lt, x_lt, lt)


def coefficient_difference(t: Tensor, lt: Tensor, like: Tensor, transport: Transport = LINEAR) -> Tensor:
    """Eq. (11): `a(t) - a(lambda t)`, broadcast against `like`; -(t - lambda t) for linear transport."""
    return expand(transport.a(t) - transport.a(lt), like)


def multi_scale_l2(error: Tensor, p: float = 0.5, c: float = 1e-3, reduction: str = "sum") -> Tensor:
    """Eq. (14): mean of the adaptive loss at full, half and quarter resolution, (B,) from an error (B, C, H, W).

    `reduction` says whether the squared norm inside sums over C, H, W (as printed) or averages ("mean"). Packed or
    odd-shaped errors (B, ...) that cannot be downsampled by 2 or 4 use the scales that they have.
    """
    scales = [error]
    for factor in (2, 4):
        if error.ndim == 4 and min(error.shape[-2:]) >= factor:
            # "area" interpolation is average pooling whenever the factor divides the side.
            scales.append(resize(error, size=[side // factor for side in error.shape[-2:]], mode="area"))
    return torch.stack([adaptive_loss(scale, p, c, reduction) for scale in scales]).mean(0)


def adaptive_loss(error: Tensor, p: float, c: float, reduction: str) -> Tensor:
    """Below Eq. (14): `||E||^2 / (||E||^2 + c)^p` for each row, in float32."""
    squared = error.float().flatten(1).square()
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be sum or mean, got {reduction!r}")
    norm = squared.sum(1) if reduction == "sum" else squared.mean(1)
    return norm / (norm + c) ** p


def primal_loss(
    F_t: Tensor, F_lt: Tensor, x_t: Tensor, x_lt: Tensor, t: Tensor, lt: Tensor, transport: Transport = LINEAR
) -> Tensor:
    """Eq. (7) with unit weight, (B,): the reference form that the target of Eq. (12) replaces. `F_lt` is the reference's."""
    return endpoint_difference(F_t, F_lt.detach(), x_t, x_lt, t, lt, transport).flatten(1).square().sum(1)


def dual_loss(F_t: Tensor, F_lt: Tensor, velocity: Tensor, lam: Tensor) -> Tensor:
    """Eq. (8) with omega = 1, (B,): flow matching and self alignment mixed by `lam` (B,). Gradient of Eq. (7) over t^2."""
    matching = (F_t - velocity).flatten(1).square().sum(1)
    alignment = (F_t - F_lt.detach()).flatten(1).square().sum(1)
    return (1 - lam) * matching + lam * alignment


def adversarial_error(
    F_fake: Tensor, x_fake: Tensor, z_fake: Tensor, t: Tensor, transport: Transport = LINEAR
) -> Tensor:
    """Eq. (17): error of the shifted branch against the velocity `z_fake - x_fake` of the student's own pictures."""
    return F_fake - transport.target(x_fake, z_fake, t)


def residual(F_fake: Tensor, F_real: Tensor) -> Tensor:
    """Eq. (18): `delta d`, the shifted branch's prediction less the real one's, at the same noisy fake."""
    return F_fake - F_real.detach()


def shifting_error(F: Tensor, delta: Tensor) -> Tensor:
    """Eq. (19): `F_anchor - sg(F_anchor + delta d)` with `F_anchor = -F`; descending on it moves F along -delta d.

    For linear transport the one-step picture `z - F` then moves along `F_fake - F_real`, which is
    `(E_real[x] - E_fake[x]) / t` for the exact fields at time t.
    """
    anchor = -F
    return anchor - (anchor + delta).detach()


@dataclass(frozen=True)
class Asked:
    """Rows that the student was asked at `x_t`, between data `x` and noise `z`, and its answer `F` (B, ...)."""

    x: Tensor
    z: Tensor
    x_t: Tensor
    t: Tensor
    c: Condition
    F: Tensor

    def __getitem__(self, rows: Tensor) -> Asked:
        """Those that a boolean (B,) marks."""
        return Asked(self.x[rows], self.z[rows], self.x_t[rows], self.t[rows], self.c[rows], self.F[rows])


@dataclass(frozen=True)
class APEX(Objective):
    """Algorithm 1. The fields up to `c` are the paper's; the rest are readings of what it leaves open.

    path_weight: lambda_p, the weight of the path objective (Eq. 13); 0: there is none.
    endpoint_weight: lambda_e, the weight of the endpoint objective (Eq. 17 and 19); 0: there is none.
    a: the shift of the condition is A c + b with A = a I (Eq. 16). A run takes that of the model's family, if the recipe says
        nothing.
    b: the same number added to all of it. A run takes that of the model's family likewise.
    clip: of the secant in Eq. (12), elementwise; null: no clip.
    p: the power of the adaptive loss below Eq. (14), in [0, 1]; 0: plain squares.
    c: the constant of the adaptive loss, above 0.
    pairing: "rows" re-noises the student's fresh one-step picture of the same row, and moves that row's prediction at t = 1;
        "printed" takes pictures from a buffer of recent generations, unrelated to the rows, as Algorithm 1 prints it.
    real: who answers for real data in Eq. (18): "teacher" (frozen), "reference" (EMA, Algorithm 1) or "student" (Eq. 18).
    path_velocity: what leads from x_t to x_lambda-t: "sample" (z - x, the paper) or "teacher" (the frozen field).
    path_rows: the path objective sees "all" rows (Algorithm 1) or the "others" only, those that nothing is generated from.
    reference: theta-minus of Eq. (10): "reference" (EMA, the paper) or "student" (itself, one forward pass cheaper).
    guidance: scale of classifier-free guidance in the teacher's answers (1: none, the paper). A run takes the one at which
        its teacher is drawn, if the recipe says nothing.
    guided_above: guidance from this time on alone (Kynkaanniemi et al. 2024, in a limited interval); below, the teacher is asked
        once. 0: everywhere. A step costs less by as much, and the student is about the same (`docs/log.md`). A LoRA's run
        takes 0.5, if the recipe says nothing.
    lambda_law: lambda is "uniform" in [0, lambda_max], "ramp" (uniform up to a bound that grows over the run) or "constant".
    lambda_max: the bound of lambda, in [0, 1], or what it is where it is constant.
    reduction: whether the squared norm inside of Eq. (14) is a "sum" over the elements (as printed) or their "mean".
    beta: the weight beta(t) of Eq. (13): 1, or "cosine", which fades out the clean end.
    exact_below: below this noise level of Eq. (18) the fake's own velocity z_fake - x_fake stands in for the shifted branch,
        which is its mean over all fakes and so does not see what is wrong with just this one. In [0, 1]; 0: never (the paper).
        Above 0 it seeks modes: in long runs better pictures, less diverse.
    share: part of the rows that stand at t = 1 and are generated from; the others draw t from `times`.
    times: the law of the times of those others. fake_times: the law of the times at which the student's own pictures are
        noised (Eq. 15).
    buffer_size: how many recent pictures the buffer of the printed pairing keeps.
    """

    path_weight: float = 1.0
    endpoint_weight: float = 1.0
    a: float = -0.5
    b: float = 1.0
    clip: float | None = 1.0
    p: float = 0.5
    c: float = 1e-3

    pairing: Literal["rows", "printed"] = "rows"
    real: Literal["teacher", "reference", "student"] = "teacher"
    path_velocity: Literal["sample", "teacher"] = "teacher"
    path_rows: Literal["all", "others"] = "others"
    reference: Literal["reference", "student"] = "student"
    guidance: float = 2.5
    guided_above: float = 0.0
    lambda_law: Literal["uniform", "ramp", "constant"] = "uniform"
    lambda_max: float = 0.9
    reduction: Literal["sum", "mean"] = "sum"
    beta: Literal["constant", "cosine"] = "constant"
    share: float = 0.5
    times: TimeLaw = field(default_factory=TimeLaw)
    fake_times: TimeLaw = field(default_factory=lambda: TimeLaw(kind="uniform"))
    exact_below: float = 0.0
    buffer_size: int = 256

    citation: ClassVar[str] = "APEX: One-Step High-Resolution Text-to-Image Synthesis"
    sampler: ClassVar[dict[str, float]] = {"kappa": 0.0, "rho": 0.0, "order": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lambda_max", "exact_below", "guided_above", "share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if (self.clip is not None and self.clip <= 0) or self.c <= 0 or not 0 <= self.p <= 1:
            raise ValueError(f"clip and c must be above 0 and p in [0, 1], got {self.clip}, {self.c} and {self.p}")
        if self.buffer_size < 1 or not math.isfinite(self.guidance):
            raise ValueError(
                f"buffer_size must be at least 1 and guidance a number, got {self.buffer_size}, {self.guidance}"
            )
        if self.path_weight > 0 and self.path_rows == "others" and self.share == 1:
            raise ValueError("share 1 leaves no row for the path objective: lower it, or set path_rows: all")
        if self.endpoint_weight > 0 and self.share == 0:
            raise ValueError("share 0 leaves no row for the endpoint objective: raise it, or set endpoint_weight: 0")
        if min(self.path_weight, self.endpoint_weight) < 0 or self.path_weight + self.endpoint_weight == 0:
            raise ValueError("path_weight and endpoint_weight must not be negative, nor both be 0")

    @property
    def needs(self) -> tuple[str, ...]:
        """Roles that this reading calls, beside the student."""
        path = (self.path_velocity, self.reference) if self.path_weight > 0 else ()
        asked = (*path, self.real) if self.endpoint_weight > 0 else path
        return tuple(role for role in ("teacher", "reference") if role in asked)

    @property
    def needs_pictures(self) -> bool:
        """Whether any row starts from a picture x; not where all that are used stand at t = 1, which is z alone."""
        from_noise = self.pairing == "rows" and self.endpoint_weight > 0 and (self.share == 1 or self.path_weight == 0)
        return not from_noise or (self.path_velocity == "sample" and self.path_weight > 0)

    @property
    def scheduled(self) -> bool:
        """Only the ramp of lambda follows the run's progress."""
        return self.lambda_law == "ramp" and self.path_weight > 0

    @property
    def condition_shift(self) -> tuple[float, float] | None:
        """(a, b) of Eq. (16), where the endpoint objective uses them."""
        return (self.a, self.b) if self.endpoint_weight > 0 else None

    def check_rows(self, total: int) -> None:
        if self.path_weight > 0 and self._walked_of(total) == 0:
            raise ValueError(
                f"share {self.share:g} of it is every row, rounded, which leaves none for the path objective: give more "
                "rows" + ", lower objective.share" * (total > 1) + ", or set objective.path_rows=all"
            )

    def for_model(self, shift: tuple[float, float], scale: float, lora: bool, given: Mapping[str, Any]) -> APEX:
        """The same with the model's (a, b), and guided as its teacher is drawn, where a recipe has not `given` them.

        For a `lora` in the noisier half alone: it learns as much, and a step stays below 2.2 of flow matching's.
        """
        suited: dict[str, Any] = {"a": shift[0], "b": shift[1], "guidance": scale, "guided_above": 0.5 if lora else 0.0}
        return replace(self, **{name: value for name, value in suited.items() if name not in given})

    def __call__(self, networks: Networks, batch: Batch, memory: MutableMapping[str, Tensor]) -> Losses:
        """Algorithm 1, lines 2-22, for one micro-batch."""
        chosen = batch.chosen(self.share)
        walked = self._walked(chosen)
        used = walked | chosen if self.endpoint_weight > 0 else walked
        if not bool(used.any()):
            used = batch.rows == batch.rows[0]  # nothing to learn here, but no family takes a batch of no rows
        asked = self._ask(networks, batch, chosen, used)

        total, terms = asked.F.sum() * 0, {}
        if bool(walked.any()):
            on = asked[walked[used]]
            target = self._path_target(networks, batch, walked, on)
            path = (self._beta(on.t) * self._norm(on.F - target)).sum() / self._walked_of(batch.total)
            total, terms["path"] = total + self.path_weight * path, path.detach()
        if self.endpoint_weight > 0 and bool(chosen.any()):
            adversarial, shift = self._endpoint(networks, batch, chosen, asked[chosen[used]], memory)
            count = share_of(batch.total, self.share)
            total = total + self.endpoint_weight * (adversarial + shift) / count
            terms |= {"adv": adversarial.detach() / count, "shift": shift.detach() / count}
        return Losses(total, terms | {"loss": total.detach()})

    def _ask(self, networks: Networks, batch: Batch, chosen: Tensor, used: Tensor) -> Asked:
        """Algorithm 1, lines 2-3, and the one pass of the student, over the rows that anything is learnt from."""
        t = networks.round_time(self._times(batch, chosen))[used]
        x, c = batch.x[used], batch.c[used]
        z = batch.random.normal(batch.x.shape[1:])[used].to(x)
        x_t = networks.transport.interpolate(x, z, t)
        return Asked(x, z, x_t, t, c, networks.student(x_t, t, c))

    # -- Path integrability, section 3.1 ---------------------------------------------------------------------------

    def _walked(self, chosen: Tensor) -> Tensor:
        """Boolean (B,): the rows of the path objective."""
        if self.path_weight == 0:
            return torch.zeros_like(chosen)
        return torch.ones_like(chosen) if self.path_rows == "all" else ~chosen

    def _walked_of(self, total: int) -> int:
        return total if self.path_rows == "all" else total - share_of(total, self.share)

    def _times(self, batch: Batch, chosen: Tensor) -> Tensor:
        """t of every row; with paired rows, the rows to generate from stand at t = 1."""
        t = self.times.draw(batch.random)
        return torch.where(chosen, torch.ones_like(t), t) if self.pairing == "rows" else t

    def _path_target(self, networks: Networks, batch: Batch, walked: Tensor, asked: Asked) -> Tensor:
        """Algorithm 1, lines 6-8: the target of Eq. (12) for the `walked` rows, without gradient."""
        x_t, t, c = asked.x_t, asked.t, asked.c
        lt = networks.round_time(self._lambda(batch, walked).to(t) * t)
        with torch.no_grad():
            if self.path_velocity == "sample":
                x_lt = networks.transport.interpolate(asked.x, asked.z, lt)
            else:
                x_lt = networks.transport.move(self._teach(networks, x_t, t, c), x_t, t, lt)
            itself = self.reference == "student"
            network = networks.student if itself else networks.reference
            F_t = asked.F.detach() if itself else network(x_t, t, c)
            # At time 0 every prediction implies the point itself, and the network need not be asked.
            F_lt = network(x_lt, lt, c) if self.lambda_max > 0 else F_t
            return secant_target(F_t, F_lt, x_t, x_lt, t, lt, networks.transport, self.clip)

    def _lambda(self, batch: Batch, walked: Tensor) -> Tensor:
        """lambda of each marked row. Never quite 1: the secant divides by t - lambda t."""
        bound = self.lambda_max * (batch.progress if self.lambda_law == "ramp" else 1.0)
        drawn = batch.random.uniform(walked)
        return (bound * (torch.ones_like(drawn) if self.lambda_law == "constant" else drawn)).clamp_max(0.99)

    def _beta(self, t: Tensor) -> Tensor:
        """beta(t) of Eq. (13): 1, or the cosine law that fades out the clean end, where little is left to move."""
        return torch.ones_like(t) if self.beta == "constant" else 1 - torch.cos(torch.pi / 2 * t)

    # -- Endpoint fidelity, section 3.2 ----------------------------------------------------------------------------

    def _endpoint(
        self, networks: Networks, batch: Batch, chosen: Tensor, asked: Asked, memory: MutableMapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Algorithm 1, lines 12-19: sums over the chosen rows of L_adv (Eq. 17) and L_shift (Eq. 19)."""
        transport, c = networks.transport, asked.c
        x_fake = self._fakes(networks, batch, chosen, asked, memory)
        z_fake = batch.random.normal(x_fake.shape[1:], chosen).to(x_fake)
        t_fake = networks.round_time(self.fake_times.draw(batch.random, chosen))
        x_adv = transport.interpolate(x_fake, z_fake, t_fake)  # Eq. (15)
        F_fake = networks.student(x_adv, t_fake, c.shift(self.a, self.b))
        with torch.no_grad():
            F_real = self._real(networks)(x_adv, t_fake, c)
        error = adversarial_error(F_fake, x_fake, z_fake, t_fake, transport)
        exact = expand((t_fake < self.exact_below).to(F_fake), F_fake)
        delta = residual(F_fake - exact * error, F_real).detach()
        adversarial, shift = self._norm(error), self._norm(shifting_error(asked.F, delta))
        return adversarial.sum(), shift.sum()

    def _fakes(
        self, networks: Networks, batch: Batch, chosen: Tensor, asked: Asked, memory: MutableMapping[str, Tensor]
    ) -> Tensor:
        """Pseudo-targets x_fake: the rows' own one-step pictures, or draws from the buffer of recent generations."""
        if self.pairing == "rows":
            return networks.transport.endpoint(asked.F.detach(), asked.x_t, asked.t)
        z = batch.random.normal(asked.x_t.shape[1:], chosen).to(asked.x_t)
        one = torch.ones_like(asked.t)
        with torch.no_grad():
            fresh = networks.transport.endpoint(networks.student(z, one, asked.c), z, one)
        buffer = torch.cat([memory["buffer"].to(fresh), fresh]) if "buffer" in memory else fresh
        memory["buffer"] = buffer[-self.buffer_size :].detach()
        index = (batch.random.uniform(chosen) * len(memory["buffer"])).long()
        return memory["buffer"][index.to(fresh.device)]

    def _real(self, networks: Networks) -> Field:
        """The branch that answers for real data in Eq. (18)."""
        if self.real == "teacher":
            return partial(self._teach, networks)
        return networks.student if self.real == "student" else networks.reference

    def _teach(self, networks: Networks, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        return teach(networks, x_t, t, c, self.guidance, self.guided_above)

    def _norm(self, error: Tensor) -> Tensor:
        return multi_scale_l2(error, self.p, self.c, self.reduction)
