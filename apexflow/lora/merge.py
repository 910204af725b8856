"""A LoRA file: read, checked against a model, added into its weights."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from apexflow.backbones import Backbone
from apexflow.backbones.folder import PICKLES
from apexflow.backbones.single_file import OF_LORA, made_a_model
from apexflow.backbones.weights import weight_shapes
from apexflow.errors import UserError
from apexflow.lora.foreign import in_diffusers_names, is_foreign
from apexflow.progress import Progress

FILE = "pytorch_lora_weights.safetensors"  # in the folder of an exported one


@dataclass(frozen=True)
class Pair:
    """What a LoRA adds to one weight: `scale * up @ down`; down (rank, in, ...), up (out, rank, ...)."""

    down: Tensor
    up: Tensor
    scale: float

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        """The summand in the shape of the weight, float32; 1 x 1 and other ungrouped convolutions included."""
        return self.scale * (self.up.float().flatten(1) @ self.down.float().flatten(1)).reshape(shape)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it can be added to a weight of this shape."""
        inner, outer = tuple(self.down.shape), tuple(self.up.shape)
        points = math.prod(outer[2:]) == 1  # a kernel on either side would be no product of two matrices
        fits = len(outer) >= 2 and outer[1] == inner[0] and outer[0] == shape[0] and inner[1:] == tuple(shape[1:])
        return fits and points


def file_of(named: Path) -> Path:
    """The file of a LoRA, which is named itself or by the folder that holds it under the name that exports give it."""
    return named / FILE if named.is_dir() else named


def read_lora(path: Path, backbone: Backbone) -> dict[str, Pair]:
    """The pairs of a LoRA file for such a model by the name of the module, in whatever program's names.

    UserError for a pickle, a damaged file, and what of it cannot be understood.
    """
    if path.suffix.lower() in PICKLES:
        raise UserError(f"{path} is a pickle, which can run code: convert it to safetensors first")
    try:
        metadata = _config(path)
        tensors = load_file(path)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(f"cannot read {path} ({error}): restore the LoRA file") from error
    if not tensors:
        raise UserError(f"{path} holds no LoRA: it has no tensors")
    if not any(OF_LORA.search(name) for name in tensors):
        raise UserError(f"{path} is a whole network, not a LoRA: {made_a_model(path)}")
    if is_foreign(tensors):
        if metadata and any(name.endswith(".alpha") for name in tensors):
            raise UserError(f"{path} gives its scale twice, by alphas and in lora_adapter_metadata: remove the latter")
        tensors = in_diffusers_names(path, tensors, backbone)
    prefix = next(iter(tensors)).partition(".")[0]
    modules = {key.rpartition(".lora_")[0] for key in tensors}
    try:
        said = {key.removeprefix(f"{prefix}."): value for key, value in metadata.items()}
        scales = {module: _scale(said, module.removeprefix(f"{prefix}.")) for module in sorted(modules)}
    except (AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"{path} does not give a readable scale (lora_adapter_metadata: {error}): export the LoRA again, or "
            "merge it with diffusers"
        ) from error
    pairs = {
        module.removeprefix(f"{prefix}."): Pair(
            tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"], scale
        )
        for module, scale in scales.items()
    }
    for module, pair in pairs.items():
        if fault := _fault(pair):
            raise UserError(f"{path} is damaged: {module}: {fault}; restore the LoRA file")
    return pairs


def _config(path: Path) -> Any:
    """The LoraConfig that a file keeps, as JSON has it, each key with the part's name in front; {} where it keeps none."""
    with safe_open(path, "pt") as opened:
        return json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))


def _scale(said: Mapping[str, Any], module: str) -> float:
    """What peft multiplies a module's product by, as the LoraConfig says that the file keeps."""

    def setting(name: str, pattern: str) -> Any:
        special = (said.get(pattern) or {}).items()
        return next((value for key, value in special if _names(key, module)), said.get(name, 1))

    alpha, rank = setting("lora_alpha", "alpha_pattern"), setting("r", "rank_pattern")
    if isinstance(alpha, bool) or isinstance(rank, bool) or not (alpha > 0 and rank > 0):
        raise ValueError(f"alpha {alpha}, rank {rank}")
    scale = alpha / (math.sqrt(rank) if said.get("use_rslora") else rank)
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"alpha {alpha}, rank {rank}")
    return scale


def _names(key: str, module: str) -> bool:
    """Whether the key of a pattern of peft's names a module: by its whole name after "^", else by that or its last parts.

    Keys are regular expressions to peft, but names as it and diffusers write them; ValueError for any other, since one from a
    file may run for ever.
    """
    name = key.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"{key!r} is not a module name")
    return module == name or (not key.startswith("^") and module.endswith(f".{name}"))


def _fault(pair: Pair) -> str | None:
    """What is wrong with a pair of any model."""
    for side in (pair.down, pair.up):
        if not side.is_floating_point():
            return f"it holds {str(side.dtype).removeprefix('torch.')}, not real numbers"
        if side.ndim < 2 or not side.numel():
            return f"a tensor of shape {tuple(side.shape)} cannot be a side of a LoRA"
        if not bool(side.float().isfinite().all()):
            return "it holds a value that is not finite"
    return None


def check_lora(path: Path, pairs: dict[str, Pair], part: Path) -> None:
    """UserError unless every pair has a weight of its shape among those in the folder `part`; warns of a smaller model's."""
    shapes = weight_shapes(part)
    for module, pair in pairs.items():
        shape = shapes.get(f"{module}.weight")
        if shape is None or not pair.fits(shape):
            why = "it has no such weight" if shape is None else f"its weight has the shape {shape}"
            raise UserError(f"{path} is a LoRA for another model than {part.parent}: {module}: {why}")
    if bare := _left_out(path, pairs, part.name, shapes):
        warnings.warn(
            f"{path} seems to be a LoRA for a smaller model than {part.parent}: its metadata says that it covers all "
            f"modules of a kind, and it lacks {bare[0]} (the first of {len(bare)}); use the model that it was trained on",
            stacklevel=2,
        )


def _left_out(path: Path, pairs: Mapping[str, Pair], part: str, shapes: Mapping[str, Any]) -> list[str]:
    """The modules of a network that the targets in a file's LoraConfig name, and that it has no pair for: peft leaves out none.

    [] where it keeps no targets, or further settings of it choose among them.
    """
    config = _config(path)
    targets = config.get(f"{part}.target_modules")
    choosing = ("exclude_modules", "layers_to_transform", "layers_pattern", "layer_replication")
    if not isinstance(targets, list) or any(config.get(f"{part}.{key}") for key in choosing):
        return []
    ends = tuple(f".{target}.weight" for target in targets)
    found = [name.removesuffix(".weight") for name in shapes if f".{name}".endswith(ends)]
    return [module for module in found if module not in pairs]


@torch.no_grad()
def add_pairs(weights: Mapping[str, Tensor], pairs: Mapping[str, Pair]) -> None:
    """Add a LoRA to those of its weights that are given, in place: summed in float32, kept in their own precision."""
    for module, pair in pairs.items():
        if (weight := weights.get(f"{module}.weight")) is not None:
            weight.copy_(weight.float() + pair.delta(tuple(weight.shape)))


def merge_into(part: Path, pairs: dict[str, Pair]) -> None:
    """Rewrite the safetensors in the folder `part` with the LoRA added, one file at a time, each in its own precision."""
    files = sorted(part.glob("*.safetensors"))
    with Progress("merging", len(files)) as progress:
        for file in files:
            tensors = load_file(file)
            add_pairs(tensors, pairs)
            save_file(tensors, file.with_suffix(".partial"), {"format": "pt"})
            file.with_suffix(".partial").replace(file)
            progress.advance()
