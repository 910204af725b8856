"""A second time for any backbone: where a jump leads to, beside the time where it starts.

The embedding of s is added to that of t, which every family computes in one module. It is zero at first, so an untouched
model answers as before, to the bit. It is zero at s = 0 for good: the model without it *is* the jump to data, so a one-step
student runs in stock diffusers, which knows nothing of a second time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from apexflow.errors import UserError

NAME = "second_time"
FILE = f"{NAME}.safetensors"
# What the families call the module from the sinusoid of t to its embedding.
TIME_MODULES = ("timestep_embedder", "time_embedding", "t_embedder")
FREQUENCIES = 16


class SecondTime(nn.Module):
    """Embeds s in [-1, 1], (B,), and adds that to the output (B, width) of the module that embeds t.

    `adapters` names the states that it keeps, as a LoRA does, and `active` the one that answers (None: no second time).
    """

    def __init__(self, width: int, adapters: Sequence[str]) -> None:
        super().__init__()
        self.embedders = nn.ModuleDict({name: _embedder(width) for name in adapters})
        self.active: str | None = "default"
        self.s: Tensor | None = None

    def forward(self, s: Tensor) -> Tensor:
        """(B, width), in float32."""
        # Slow waves: methods differentiate by the time. Both features vanish at s = 0, and no layer has a bias.
        waves = 2 * math.pi * s.float()[:, None] * torch.logspace(-2, 4, FREQUENCIES, base=2, device=s.device)
        return self.embedders[self.active or "default"](torch.cat([waves.sin(), 1 - waves.cos()], 1))

    def add(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        """The forward hook of the time's module."""
        if self.s is None or self.active is None:
            return None
        return output + self(self.s).to(output)


def _embedder(width: int) -> nn.Sequential:
    last = nn.Linear(width, width, bias=False)
    nn.init.zeros_(last.weight)
    return nn.Sequential(nn.Linear(2 * FREQUENCIES, width, bias=False), nn.SiLU(), last)


def attach(network: nn.Module, adapters: Sequence[str] = ("default",)) -> SecondTime:
    """Give a network a second time, or find the one it has; UserError for a network whose time module is not known."""
    present = second_time_of(network)
    if present is not None and set(present.embedders) == set(adapters):
        return present
    module = time_module(network)
    width = [part for part in module.modules() if isinstance(part, nn.Linear)][-1].out_features
    second = SecondTime(width, adapters)
    if not (first := next(network.parameters())).is_meta:  # beside weights that are still to be read it has its own
        second.to(first.device)
    if present is not None:  # a further adapter over a model that has a second time goes on from there
        for embedder in second.embedders.values():
            embedder.load_state_dict(present.embedders["default"].state_dict())
        detach(network)
    network.add_module(NAME, second)
    module.register_forward_hook(second.add)  # a bound method: a deep copy of the network binds its own
    return second


def detach(network: nn.Module) -> None:
    """Take the second time away again."""
    second = second_time_of(network)
    if second is not None:
        hooks = time_module(network)._forward_hooks
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is second]:
            del hooks[key]
        delattr(network, NAME)


def time_module(network: nn.Module) -> nn.Module:
    """The module whose output (B, width) is the embedding of t."""
    found = [part for name, part in network.named_modules() if name.rpartition(".")[2] in TIME_MODULES]
    if len(found) != 1:
        raise UserError(
            f"{type(network).__name__} cannot take a second time: it has {len(found)} modules named "
            f"{', '.join(TIME_MODULES)}, and needs exactly one; choose a method without a second time, such as scm or apex"
        )
    return found[0]


def second_time_of(network: nn.Module) -> SecondTime | None:
    """The second time of a network, wrapped (DDP) or not; None where it has none."""
    return getattr(getattr(network, "module", network), NAME, None)


@contextmanager
def going_to(network: nn.Module, s: Tensor | None) -> Iterator[None]:
    """Within, the network answers for jumps that end at `s` (B,); None: it hears no second time. ValueError if it cannot."""
    second = second_time_of(network)
    if s is None:
        yield
    elif second is None:
        raise ValueError("this network has no second time: attach one first")
    else:
        second.s = s
        try:
            yield
        finally:
            second.s = None


@contextmanager
def without(network: nn.Module) -> Iterator[SecondTime | None]:
    """Within, the network is the stock one, as it is saved for others; the second time is handed out."""
    second = second_time_of(network)
    if second is None:
        yield None
        return
    detach(network)
    try:
        yield second
    finally:
        network.add_module(NAME, second)
        time_module(network).register_forward_hook(second.add)


def save(second: SecondTime, folder: Path, adapter: str = "default") -> None:
    """Write one state of a second time into a model folder, beside the parts that stock diffusers knows."""
    state = {name: value.detach().cpu().contiguous() for name, value in second.embedders[adapter].state_dict().items()}
    save_file(state, folder / FILE)


def load(network: nn.Module, folder: Path) -> None:
    """Attach the second time that a model folder holds, if it holds one; UserError if that does not fit."""
    path = folder / FILE
    if not path.is_file():
        return
    try:
        attach(network).embedders["default"].load_state_dict(load_file(path))
    except (RuntimeError, SafetensorError, OSError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{path} does not fit this model ({reason}): restore it from the original") from error
    network.requires_grad_(False)
