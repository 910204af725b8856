"""Student, reference (EMA) and teacher as modules of their own, for full tuning; `make_roles` makes these or a LoRA's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from apexflow.backbones import Backbone, second_time
from apexflow.backbones.precision import is_large
from apexflow.backbones.storage import storing
from apexflow.conditioning import Condition
from apexflow.lora.merge import Pair
from apexflow.objectives import Field, Networks
from apexflow.training.adapters import LoraRoles
from apexflow.training.config import Recipe, Tuning
from apexflow.training.fields import field_of, held, networks_of
from apexflow.training.sharding import Place, fill, hollow, unsharded


class FullRoles:
    """Every weight is trained: the EMA and the teacher are further modules, made only when something calls them."""

    def __init__(
        self,
        backbone: Backbone,
        teacher: Backbone | None,
        text_encoder: bool,
        frozen: torch.dtype,
        place: Place,
        further: Sequence[str] = (),
        once: bool = False,
    ) -> None:
        """once: nothing will be trained, so student and average are one and the same."""
        self.backbone = backbone
        self._modules = {"transformer": backbone.transformer}
        if text_encoder:
            self._modules["text_encoder"] = backbone.text_encoder
        own, self._like = teacher is backbone, teacher or backbone  # who a teacher and further networks answer like
        self.teacher: nn.Module | None = None
        if teacher is not None:
            network = hollow(teacher.transformer) if own else teacher.transformer.eval().requires_grad_(False)
            self.teacher = network.to(frozen)
        pretrained = self.teacher if self.teacher is not None else backbone.transformer
        self._further = {name: hollow(pretrained).float() for name in further}
        self._averages = {name: module if once else hollow(module) for name, module in self._modules.items()}
        for name, module in self._modules.items():
            place(module.requires_grad_(True))
            if not once:
                fill(self._averages[name], module, place)
        if self.teacher is not None and own:
            fill(self.teacher, backbone.transformer, place)
        elif self.teacher is not None:
            place(self.teacher)
        for network in self._further.values():
            fill(network, pretrained, place)
            network.requires_grad_(True)
        self.trained = _named(self._modules)
        self.average = {name: p.data for name, p in _named(self._averages).items()}

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that hold what is trained."""
        return list(self._modules.values())

    def networks(self, null: Condition | None) -> Networks:
        """The fields that an objective may call."""
        teacher = self.teacher if self.teacher is not None else self.backbone.transformer
        networks = {
            "student": (self.backbone, self.backbone.transformer),
            "reference": (self.backbone, self._averages["transformer"]),
            "teacher": (self._like, teacher),
        }
        fields = {name: field_of(*asked) for name, asked in networks.items()}
        frozen = {name: held(fields[name], part.parameters, part) for name, (_, part) in networks.items()}
        return networks_of(self.backbone, self._like, fields, frozen, null)

    @property
    def everything(self) -> list[nn.Module]:
        """Every module that is held."""
        held_ones = [*self._modules.values(), *self._averages.values(), *self._further.values()]
        return held_ones if self.teacher is None else [*held_ones, self.teacher]

    def network(self, name: str) -> nn.Module:
        """The module that answers for the teacher or a further role."""
        found = self.teacher if name == "teacher" else self._further[name]
        assert found is not None
        return found

    def further(self, name: str) -> tuple[Field, dict[str, nn.Parameter]]:
        """A further network that is trained, and starts as the pretrained model: how it is asked, and its weights."""
        network = self._further[name]
        return field_of(self._like, network), dict(network.named_parameters())

    @contextmanager
    def shipped(self) -> Iterator[None]:
        """Within, the backbone answers with the averaged weights, as the saved model will."""
        for name, module in self._averages.items():
            setattr(self.backbone, name, module)
        try:
            yield
        finally:
            for name, module in self._modules.items():
                setattr(self.backbone, name, module)

    def final(self) -> nn.Module:
        """The averaged transformer with whole weights, in the first process. All take part."""
        self._averages = {name: unsharded(module) for name, module in self._averages.items()}
        return self._averages["transformer"]


Roles = FullRoles | LoraRoles


def make_roles(
    backbone: Backbone,
    recipe: Recipe,
    needs: tuple[str, ...],
    place: Place | None = None,
    teacher: Backbone | None = None,
    further: Sequence[str] = (),
    start: Mapping[str, Pair] | None = None,
    once: bool = False,
) -> Roles:
    """The roles for a recipe's way of tuning, `place` applied to each network once it is complete: by default it stays where
    it is, its matrices kept as `tuning.storage` says.

    The teacher of a method that needs one is `backbone`'s transformer as it stands now, unless a `teacher` is given, whose
    network may be of another size. `further` names the networks like the teacher's that are trained beside the student. `start`:
    the LoRA that the student's adapter starts as. `once`: nothing will be trained, so that weights which are tuned whole are
    held once, as student and average.

    With precision bf16 what is frozen is kept in bfloat16, what is trained in float32. UserError for a network that cannot
    be tuned so.
    """
    tuning = recipe.tuning
    frozen = frozen_dtype(recipe)
    place = place or storing(tuning.storage, frozen, backbone.device)
    if checkpointed(tuning, backbone.transformer):
        for one in (backbone, teacher or backbone):  # what is trained beside the student is like the teacher
            one.transformer.enable_gradient_checkpointing()  # type: ignore[operator]
    if "second_time" in needs:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)  # the same weights in every process, whatever was drawn before
            second_time.attach(backbone.transformer, ("default", "ema") if tuning.kind == "lora" else ("default",))
    else:
        second_time.detach(backbone.transformer)  # what it has left to say, this method never asks
    if tuning.kind == "lora":
        return LoraRoles(backbone, tuning, frozen, place, further, recipe.seed, start)
    if teacher is not None:
        second_time.detach(teacher.transformer)  # a teacher is asked for velocities alone
    teacher = (teacher or backbone) if "teacher" in needs else None
    return FullRoles(backbone, teacher, tuning.text_encoder, frozen, place, further, once)


def frozen_dtype(recipe: Recipe) -> torch.dtype:
    """The precision in which frozen weights are kept, unless `tuning.storage` says a narrower one."""
    return torch.bfloat16 if recipe.precision == "bf16" else torch.float32


def loaded_dtype(recipe: Recipe) -> torch.dtype:
    """The precision in which a model is read: what is trained whole stays in float32."""
    return frozen_dtype(recipe) if recipe.tuning.kind == "lora" else torch.float32


def checkpointed(tuning: Tuning, transformer: nn.Module) -> bool:
    """Whether activations are computed again in backward: as the recipe says, or from half a billion parameters on."""
    return is_large(transformer) if tuning.checkpointing is None else tuning.checkpointing


@torch.no_grad()
def update_average(roles: Roles, decay: float, step: int) -> None:
    """Algorithm 1, line 24: theta-minus follows theta; the decay warms up so that early averages do not lag."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    names = list(roles.average)
    torch._foreach_lerp_([roles.average[n] for n in names], [roles.trained[n].data for n in names], weight)


def _named(modules: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    return {f"{part}.{name}": p for part, module in modules.items() for name, p in module.named_parameters()}
