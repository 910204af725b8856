"""Student, reference (EMA) and teacher: modules when all weights are tuned, adapter states on one base with LoRA."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from apexflow.backbones import Backbone
from apexflow.conditioning import Condition
from apexflow.errors import UserError
from apexflow.objectives import Field, Networks
from apexflow.training.config import Tuning


class FullRoles:
    """Every weight is trained: the EMA and the teacher are further modules, made only when something calls them."""

    def __init__(self, backbone: Backbone, needs: tuple[str, ...], text_encoder: bool) -> None:
        self.backbone = backbone
        self._modules = {"transformer": backbone.transformer}
        if text_encoder:
            self._modules["text_encoder"] = backbone.text_encoder
        self.teacher = frozen_copy(backbone.transformer) if "teacher" in needs else None
        self._averages = {name: frozen_copy(module) for name, module in self._modules.items()}
        for module in self._modules.values():
            module.requires_grad_(True)
        self.trained = _named(self._modules)
        self.average = {name: p.data for name, p in _named(self._averages).items()}

    def networks(self, null: Condition | None) -> Networks:
        """The fields that an objective may call."""
        teacher = self.teacher if self.teacher is not None else self.backbone.transformer
        return Networks(
            student=_field(self.backbone, self.backbone.transformer),
            reference=_field(self.backbone, self._averages["transformer"]),
            teacher=_field(self.backbone, teacher),
            null=null,
            transport=self.backbone.transport,
            round_time=self.backbone.round_time,
        )

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


class LoraRoles:
    """Adapters "default" (student) and "ema" (reference) on one frozen base; the base alone is the teacher.

    Switching sets the active adapter of every layer directly: peft's own `set_adapter` also flips `requires_grad`, and
    with gradient checkpointing a student recomputed under another adapter silently loses its gradients.
    """

    def __init__(self, backbone: Backbone, tuning: Tuning) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.backbone = backbone
        transformer = backbone.transformer.requires_grad_(False)
        alpha = tuning.alpha or tuning.rank
        config = LoraConfig(
            r=tuning.rank, lora_alpha=alpha, target_modules=list(backbone.lora_targets), init_lora_weights="gaussian"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns of the second adapter, which is the point here
            for name in ("default", "ema"):
                inject_adapter_in_model(config, transformer, adapter_name=name)
        self._layers = [m for m in transformer.modules() if isinstance(m, BaseTunerLayer)]
        if not self._layers:
            raise UserError(f"LoRA found none of its targets {list(backbone.lora_targets)} in this model")
        self.trained: dict[str, nn.Parameter] = {}
        self.average: dict[str, Tensor] = {}
        parameter: nn.Parameter
        for name, parameter in transformer.named_parameters():
            if ".default." in name:
                parameter.data = parameter.data.float()  # adapters stay in float32 on a base of any precision
                parameter.requires_grad_(True)
                self.trained[name.replace(".default.", ".")] = parameter
            elif ".ema." in name:
                parameter.data = parameter.data.float()
                self.average[name.replace(".ema.", ".")] = parameter.requires_grad_(False).data
        for name, average in self.average.items():
            average.copy_(self.trained[name].data)
        self._activate("default")

    def _activate(self, name: str | None) -> None:
        for layer in self._layers:
            layer.__dict__["_disable_adapters"] = name is None
            layer.__dict__["_active_adapter"] = [name or "default"]

    def networks(self, null: Condition | None) -> Networks:
        field = _field(self.backbone, self.backbone.transformer)
        return Networks(
            student=field,
            reference=self._as("ema", field),
            teacher=self._as(None, field),
            null=null,
            transport=self.backbone.transport,
            round_time=self.backbone.round_time,
        )

    def _as(self, name: str | None, field: Field) -> Field:
        def answer(x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
            self._activate(name)
            try:
                return field(x_t, t, c)
            finally:
                self._activate("default")

        return answer

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """A plain transformer with the averaged adapter added into its weights."""
        transformer = self.backbone.transformer
        tensors = {k.replace(".base_layer.", "."): v for k, v in transformer.state_dict().items() if ".lora_" not in k}
        layers = {id(layer) for layer in self._layers}
        for name, module in transformer.named_modules():
            if id(module) in layers:
                weight = tensors[f"{name}.weight"]
                tensors[f"{name}.weight"] = (weight.float() + module.get_delta_weight("ema").float()).to(weight)
        kind: Any = type(transformer)
        plain = kind.from_config(transformer.config).to(next(transformer.parameters()))
        plain.load_state_dict(tensors)
        return plain.eval().requires_grad_(False)

    @contextmanager
    def shipped(self) -> Iterator[None]:
        """Within, the backbone answers with the averaged adapter."""
        self._activate("ema")
        try:
            yield
        finally:
            self._activate("default")


def make_roles(backbone: Backbone, tuning: Tuning, needs: tuple[str, ...]) -> FullRoles | LoraRoles:
    """The roles for a way of tuning; UserError for a combination that does not exist."""
    if tuning.kind == "lora":
        if tuning.text_encoder:
            raise UserError("tuning.text_encoder goes with tuning.kind=full only")
        return LoraRoles(backbone, tuning)
    return FullRoles(backbone, needs, tuning.text_encoder)


@torch.no_grad()
def update_average(roles: FullRoles | LoraRoles, decay: float, step: int) -> None:
    """Algorithm 1, line 24: theta-minus follows theta; the decay warms up so that early averages do not lag."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    names = list(roles.average)
    torch._foreach_lerp_([roles.average[n] for n in names], [roles.trained[n].data for n in names], weight)


def frozen_copy(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).requires_grad_(False).eval()


def _named(modules: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    return {f"{part}.{name}": p for part, module in modules.items() for name, p in module.named_parameters()}


def _field(backbone: Backbone, network: nn.Module) -> Field:
    return lambda x_t, t, c: backbone.velocity(network, x_t, t, c)
