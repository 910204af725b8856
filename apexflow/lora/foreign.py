"""LoRA files in other programs' names (kohya, ComfyUI, Lightning), brought into diffusers' by the converters that it has.

Those pass over what they do not know, and some do not hear an alpha. So every tensor is accounted for before and after, and each
alpha is multiplied in beforehand.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apexflow.backbones import Backbone
from apexflow.errors import UserError

PREFIXES = ("transformer", "unet")
# One side of a pair in any program's names.
SIDE = re.compile(r"(?P<pair>(?P<module>.+)[._]lora\d?)[._](?P<side>A|B|down|up)(\.default)?\.weight")
LETTERS = {"A": "A", "down": "A", "B": "B", "up": "B"}
OF_TEXT = re.compile(r"lora_te\d?_|text_encoder")
OTHER_KINDS = {
    r"dora_scale|lora_magnitude_vector": "part of a DoRA",
    r"hada_": "part of a LoHa",
    r"lokr_": "part of a LoKr",
    r"\.diff(_b)?$": "the difference of a whole weight",  # at the end: ComfyUI's names say diffusion_model
}


def is_foreign(names: Iterable[str]) -> bool:
    """Whether the names of a LoRA file are other than diffusers' own: transformer.MODULE.lora_A.weight and lora_B, or unet."""
    given = set(names)
    modules = {name.rpartition(".lora_")[0] for name in given}
    whole = {f"{module}.lora_{side}.weight" for module in modules for side in "AB"} == given
    return not whole or not any(all(name.startswith(f"{prefix}.") for name in given) for prefix in PREFIXES)


def in_diffusers_names(path: Path, tensors: Mapping[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """The pairs of a file in diffusers' names, with alphas multiplied in; UserError says what of it cannot be understood."""
    scaled, alphas = _scaled(path, tensors)
    own = {name for name, _ in backbone.transformer.named_modules()}
    found = _renamed(scaled, backbone.network_part)
    if any(_module(name) not in own for name in found):
        found = _renamed(_converted(path, scaled | alphas, backbone), backbone.network_part)
    if unknown := [name for name in found if _module(name) not in own]:
        raise UserError(f"{path} is a LoRA for another model: {backbone.family} has no weight for {unknown[0]}")
    if _rows(found) != _rows(scaled):
        raise UserError(f"{path}: diffusers' {backbone.pipeline} reads only part of it: it is for another model")
    return found


def _scaled(path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The pairs of a file with alpha / rank multiplied in, and the alphas that say so: the ranks.

    UserError for what belongs to no pair of a denoiser.
    """
    pairs = _pairs(path, tensors)
    names = [name for sides in pairs.values() for name in sides.values()]
    if whole := [name for name in names if not tensors[name].is_floating_point()]:
        raise UserError(
            f"{path} is damaged: {whole[0]} holds {tensors[whole[0]].dtype}, not real numbers; restore the LoRA file"
        )
    # In eight bits nothing can be multiplied.
    scaled = {name: tensors[name].float() if tensors[name].itemsize == 1 else tensors[name] for name in names}
    alphas = {}
    for (module, _), sides in pairs.items():
        if (name := f"{module}.alpha") in tensors:
            rank = max(len(torch.atleast_1d(tensors[sides["A"]])), 1)
            scaled[sides["B"]] = tensors[sides["B"]].float() * (_number(path, name, tensors[name]) / rank)
            alphas[name] = torch.tensor(float(rank))
    if beside := sorted(tensors.keys() - scaled.keys() - alphas.keys()):
        raise UserError(
            f"{path} is not a LoRA that apexflow reads: {beside[0]} is not part of a lora_down and lora_up pair"
        )
    return scaled, alphas


def _pairs(path: Path, tensors: Mapping[str, Tensor]) -> dict[tuple[str, str], dict[str, str]]:
    """The names of both sides of each pair, "A" and "B", by its module and its own name."""
    pairs: dict[tuple[str, str], dict[str, str]] = {}
    for name in tensors:
        kind = next((told for said, told in OTHER_KINDS.items() if re.search(said, name)), None)
        kind = "of a text encoder" if OF_TEXT.match(name) else kind
        if kind is not None:
            raise UserError(
                f"{path} holds more than a LoRA of the denoiser, and nothing else can be used: {name} is {kind}"
            )
        if match := SIDE.fullmatch(name):
            sides = pairs.setdefault((match["module"], match["pair"]), {})
            if (letter := LETTERS[match["side"]]) in sides:
                raise UserError(f"{path} is damaged: it holds both {sides[letter]} and {name}; restore the LoRA file")
            sides[letter] = name
    for (_, pair), sides in pairs.items():
        if len(sides) < 2:
            raise UserError(f"{path} is damaged: {pair} has only one side; restore the LoRA file")
    return pairs


def _number(path: Path, name: str, alpha: Tensor) -> float:
    if alpha.numel() == 1 and math.isfinite(number := float(alpha)) and number > 0:
        return number
    raise UserError(f"{path} does not give its scale: {name} is not a positive number; restore the LoRA file")


def _converted(path: Path, tensors: dict[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """The answer of the pipeline's own converter, which reads no file and asks no hub: it is given the tensors."""
    import diffusers
    from diffusers.utils import convert_unet_state_dict_to_peft

    pipeline: Any = getattr(diffusers, backbone.pipeline)
    if not hasattr(pipeline, "lora_state_dict"):
        raise UserError(f"{path} does not use diffusers' names, and {backbone.pipeline} cannot convert them")
    try:
        answer = pipeline.lora_state_dict(tensors, unet_config=backbone.transformer.config)
        named = answer[0] if isinstance(answer, tuple) else answer  # alphas beside it: all are ranks
        named = {name: tensor for name, tensor in named.items() if not name.endswith(".alpha")}
        return convert_unet_state_dict_to_peft(named)
    except Exception as error:  # assertions and missing keys too: converters expect the models that were published
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"{path}: diffusers' {backbone.pipeline} does not understand its names ({reason})") from error


def _renamed(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """With lora_A for lora_down, and so on, and the part's name in front."""
    found = {}
    for name, tensor in tensors.items():
        match = SIDE.fullmatch(name)
        new = f"{match['module']}.lora_{LETTERS[match['side']]}.weight" if match else name
        found[f"{part}.{new.removeprefix(f'{part}.')}"] = tensor
    return found


def _module(name: str) -> str:
    """The module of the network that a name of `_renamed` names."""
    return name.partition(".")[2].rpartition(".lora_")[0]


def _rows(tensors: Mapping[str, Tensor]) -> int:
    """How many rows the upper sides have together: as many after fused projections are split as before."""
    matches = ((SIDE.fullmatch(name), tensor) for name, tensor in tensors.items())
    return sum(len(torch.atleast_1d(tensor)) for match, tensor in matches if match and LETTERS[match["side"]] == "B")
