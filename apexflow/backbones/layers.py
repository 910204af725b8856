"""What layers within a network answer, beside the answer of the whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn


def layer_answers(layers: Sequence[nn.Module], ask: Callable[[], Any]) -> tuple[list[Any], Any]:
    """What each of some layers answers while a network is asked, and the network's own answer.

    By hooks, since a sharded network hands over none of its hidden states.
    """
    seen: dict[nn.Module, Any] = {}

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        seen[module] = output

    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        answer = ask()
    finally:
        for hook in hooks:
            hook.remove()
    return [seen[layer] for layer in layers], answer
