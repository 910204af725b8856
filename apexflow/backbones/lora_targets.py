"""Which modules of a denoiser a LoRA lies on, and the rank that they have room for."""

from __future__ import annotations

import math
from typing import Any

# Of a block in which picture and text are attended together; the second half are the text's.
JOINT_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def target_modules(backbone: Any) -> dict[str, tuple[int, ...]]:
    """The modules of a denoiser that a LoRA lies on, as peft finds them by its targets, and the shapes of their weights."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    config = LoraConfig(target_modules=list(backbone.lora_targets))
    named = backbone.transformer.named_modules()
    return {name: tuple(part.weight.shape) for name, part in named if check_target_module_exists(config, name)}


def most_rank(backbone: Any) -> int:
    """The highest rank that a LoRA can make use of on some module of a denoiser: its matrix's shorter side. 0 without any."""
    shapes = target_modules(backbone).values()
    return max((min(shape[0], math.prod(shape[1:])) for shape in shapes), default=0)
