"""Student and reference (EMA) as LoRA adapters on one frozen base, which alone is the teacher."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from apexflow.backbones import Backbone, second_time
from apexflow.backbones.parts import without_weights
from apexflow.backbones.storage import plain_weights
from apexflow.conditioning import Condition
from apexflow.errors import UserError
from apexflow.lora.merge import Pair
from apexflow.objectives import Field, Networks
from apexflow.training.config import Tuning
from apexflow.training.distributed import leads
from apexflow.training.fields import field_of, held, networks_of, not_recomputed
from apexflow.training.sharding import Place, gathered, leave, original_class


class LoraRoles:
    """Adapters "default" (student) and "ema" (reference) on one frozen base; the base alone is the teacher.

    Both start as the LoRA `start` where one is given, which has a pair for each module, else as nothing; further ones as nothing.

    Switching sets the active adapter of every layer directly: peft's own `set_adapter` also flips `requires_grad`, and
    with gradient checkpointing a student recomputed under another adapter silently loses its gradients.
    """

    def __init__(
        self,
        backbone: Backbone,
        tuning: Tuning,
        frozen: torch.dtype = torch.float32,
        place: Place = leave,
        further: Sequence[str] = (),
        seed: int = 0,
        start: Mapping[str, Pair] | None = None,
    ) -> None:
        self.backbone = backbone
        with second_time.without(backbone.transformer):  # it is trained, and a trained one is to be taken up as it is
            transformer = backbone.transformer.requires_grad_(False).to(frozen)
        self._layers = inject_adapters(transformer, tuning, backbone.lora_targets, ("default", "ema", *further), seed)
        for name, parameter in transformer.named_parameters():
            if ".lora_" in name or second_time.NAME in name:
                parameter.data = parameter.data.float()  # adapters stay in float32 on a base of any precision
                parameter.requires_grad_(".default." in name)
        tensors = dict(transformer.named_parameters())
        for module, pair in (start or {}).items():  # at the scale of the adapters, whatever that of the file is
            scale = pair.scale * tuning.rank / (tuning.alpha or tuning.rank)
            tensors[f"{module}.lora_A.default.weight"].data.copy_(pair.down)
            tensors[f"{module}.lora_B.default.weight"].data.copy_(scale * pair.up.float())
        for name, parameter in tensors.items():
            if ".ema." in name:
                parameter.data.copy_(tensors[name.replace(".ema.", ".default.")].data)
        place(transformer)
        named = dict(transformer.named_parameters())
        self.trained = {name.replace(".default.", "."): p for name, p in named.items() if ".default." in name}
        self.average = {name.replace(".ema.", "."): p.data for name, p in named.items() if ".ema." in name}
        self._activate("default")

    def _activate(self, name: str | None) -> None:
        for layer in self._layers:
            layer.__dict__["_disable_adapters"] = name is None
            layer.__dict__["_active_adapter"] = [name or "default"]
        if (second := second_time.second_time_of(self.backbone.transformer)) is not None:
            second.active = name if name is not None and name in second.embedders else None

    @contextmanager
    def _active(self, name: str | None) -> Iterator[None]:
        """Within, an adapter other than the student's answers; None: the base alone."""
        self._activate(name)
        try:
            yield
        finally:
            self._activate("default")

    @property
    def modules(self) -> list[nn.Module]:
        """The module that holds the trained adapter."""
        return [self.backbone.transformer]

    def networks(self, null: Condition | None) -> Networks:
        field = field_of(self.backbone, self.backbone.transformer)
        others = {"reference": self._as("ema", field), "teacher": self._as(None, field)}
        frozen = {"student": held(field, self.trained.values, self.backbone.transformer)} | others
        return networks_of(self.backbone, self.backbone, {"student": field} | others, frozen, null)

    def _as(self, name: str | None, field: Field) -> Field:
        def answer(x_t: Tensor, t: Tensor, c: Condition, s: Tensor | None = None) -> Tensor:
            with self._active(name), not_recomputed(self.backbone.transformer):
                return field(x_t, t, c, s)

        return answer

    @property
    def everything(self) -> list[nn.Module]:
        """Every module that is held: one."""
        return [self.backbone.transformer]

    def network(self, name: str) -> nn.Module:
        """The module that answers for every role."""
        return self.backbone.transformer

    def further(self, name: str) -> tuple[Field, dict[str, nn.Parameter]]:
        """A further role that is trained, and starts as the base: how it is asked, and its weights."""
        transformer = self.backbone.transformer
        parts = (f".lora_A.{name}.", f".lora_B.{name}.")
        found = {key: p for key, p in transformer.named_parameters() if any(part in key for part in parts)}
        for parameter in found.values():
            parameter.requires_grad_(True)
        trained = {key.replace(f".{name}.", "."): p for key, p in found.items()}
        return self._as(name, field_of(self.backbone, transformer)), trained

    def gather_average(self) -> None:
        """Put the whole averaged adapter on the CPU of the first process; `average` is its alone then. All take part."""
        self.average = gathered(self.average.items())

    @torch.no_grad()
    def final(self) -> nn.Module:
        """In the first process a plain transformer on the CPU, the averaged adapter added into its weights one by one. All take
        part."""
        transformer = self.backbone.transformer
        self.gather_average()
        layers = {id(layer) for layer in self._layers}
        scales = {n: module.scaling["ema"] for n, module in transformer.named_modules() if id(module) in layers}

        def merged(name: str, weight: Tensor) -> Tensor:
            module, _, last = name.rpartition(".")
            if last != "weight" or module not in scales:
                return weight
            down, up = (self.average[f"{module}.lora_{letter}.weight"].to(weight.device) for letter in "AB")
            return (weight.float() + Pair(down, up, scales[module]).delta(tuple(weight.shape))).to(weight)

        with second_time.without(transformer) as second:
            tensors = gathered(plain_weights(transformer), merged)
        if not leads():
            return transformer
        plain = without_weights(original_class(transformer), transformer.config)
        plain.load_state_dict(tensors, assign=True)
        if second is not None:
            prefix = f"{second_time.NAME}.embedders."
            averaged = {n.removeprefix(prefix): t for n, t in self.average.items() if n.startswith(prefix)}
            second_time.attach(plain).embedders["default"].load_state_dict(averaged)
        return plain.eval().requires_grad_(False)

    def shipped(self) -> AbstractContextManager[None]:
        """Within, the backbone answers with the averaged adapter."""
        return self._active("ema")


def inject_adapters(
    transformer: nn.Module, tuning: Tuning, targets: Sequence[str], names: Sequence[str], seed: int
) -> list[Any]:
    """Put LoRA adapters on a network; the layers that have them. Their first weights belong to `seed` alone, so that all
    processes draw the same.

    They are made where new tensors are made, on a network without weights too.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    config = LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha or tuning.rank,
        target_modules=list(targets),
        init_lora_weights="gaussian",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.simplefilter("ignore")  # peft warns of the second adapter, which is the point here
        for name in names:
            inject_adapter_in_model(config, transformer, name)
        layers: list[Any] = [part for part in transformer.modules() if isinstance(part, BaseTunerLayer)]
        if not layers:
            raise UserError(f"LoRA found none of its targets {list(targets)} in this model")
        for layer in layers:
            for table in (layer.lora_A, layer.lora_B):
                if next(table.parameters()).is_meta:
                    table.to_empty(device=torch.get_default_device())
                table.float()
            for name in names:
                layer.reset_lora_parameters(name, "gaussian")
    return layers
