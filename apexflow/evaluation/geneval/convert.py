"""The official mmdet detector checkpoint, renamed for transformers.

The architectures are the same; only names, the fused attention projections and one channel order differ. The rules
are data (apexflow/evaluation/data/mmdet_to_mask2former.json): pattern at the start of the mmdet key, its replacement,
and what happens to the tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from apexflow.errors import UserError
from apexflow.files import new_folder

OFFICIAL_CHECKPOINT = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth"
# In transformers' model, absent from mmdet, without effect on the output: the norm of Swin's pooled feature, which the
# segmentation model never asks for, and the class weights of the training loss.
UNUSED = ("encoder.swin.layernorm.weight", "encoder.swin.layernorm.bias", "criterion.empty_weight")


def convert_mmdet_state_dict(state_dict: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """mmdet 2.x Mask2Former (Swin, instance) tensors, or some of them, under the names of transformers 5.

    Fused q, k, v are split in three (the decoder's cross attention stays fused), PatchMerging channels are
    reordered, relative_position_index is dropped. Raises UserError on a name that no rule knows.
    """
    converted: dict[str, torch.Tensor] = {}
    for key, tensor in state_dict.items():
        if not key.endswith("relative_position_index"):  # a constant, which transformers computes itself
            converted.update(_convert(key, tensor))
    return converted


def save_detector(state_dict: Mapping[str, Any], folder: str | Path) -> None:
    """Writes a complete mmdet checkpoint as a transformers folder (config.json, model.safetensors) at `folder`.

    Raises UserError when a weight is missing or has another shape than Swin-S with 80 classes asks for.
    """
    from transformers import Mask2FormerForUniversalSegmentation

    model = Mask2FormerForUniversalSegmentation(detector_config())
    converted = convert_mmdet_state_dict(state_dict)
    live = {name: value.shape for name, value in model.state_dict().items() if not name.endswith(UNUSED)}
    wrong = [name for name in live.keys() | converted.keys() if live.get(name) != _shape(converted.get(name))]
    if wrong:
        raise UserError(
            f"{len(wrong)} weights do not fit Mask2Former Swin-S with 80 classes (such as {min(wrong)}): "
            f"give the state dict of {OFFICIAL_CHECKPOINT}"
        )
    model.load_state_dict(converted, strict=False)  # strict but for UNUSED, by the check above
    model.config.apexflow_source = "mmdet"
    with new_folder(Path(folder)) as partial:
        model.save_pretrained(partial)


def detector_config() -> Any:
    """The transformers config of the official detector: Swin-S, window 7, 100 queries, 80 classes, 9 decoder layers."""
    import transformers

    kinds: Any = transformers  # its configuration classes take more than their annotations say
    backbone = kinds.SwinConfig(
        image_size=224,
        embed_dim=96,
        depths=[2, 2, 18, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    # transformers counts the prediction before the first layer too, hence 10 for mmdet's 9.
    return kinds.Mask2FormerConfig(backbone_config=backbone, num_labels=80, num_queries=100, decoder_layers=10)


def _shape(tensor: torch.Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape


def _convert(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    for pattern, target, action in _rules():
        match = pattern.match(key)
        if match:
            return _apply(match.expand(target) + key[match.end() :], tensor, action)
    raise UserError(f"{key} is not a weight of mmdet's Mask2Former Swin: give the state dict of {OFFICIAL_CHECKPOINT}")


def _apply(name: str, tensor: torch.Tensor, action: str) -> dict[str, torch.Tensor]:
    if action == "split3":
        parts = tensor.chunk(3, dim=0)
        return {name.replace("{q,k,v}", part): value.clone() for part, value in zip("qkv", parts, strict=True)}
    if action in ("unfold_reduction", "unfold_norm"):
        return {name: _reorder_patches(tensor)}
    return {name: tensor}


def _reorder_patches(tensor: torch.Tensor) -> torch.Tensor:
    """PatchMerging's last axis from nn.Unfold's order (channel, row, column) to Swin's (column, row, channel).

    Both orders have the same shape, so nothing but the detections would show that this step was left out.
    """
    *front, merged = tensor.shape
    patches = tensor.reshape(*front, merged // 4, 4)[..., [0, 2, 1, 3]]
    return patches.transpose(-1, -2).reshape(*front, merged)


@cache
def _rules() -> tuple[tuple[re.Pattern[str], str, str], ...]:
    text = files("apexflow.evaluation").joinpath("data", "mmdet_to_mask2former.json").read_text("utf-8")
    return tuple((re.compile(rule["pattern"]), rule["target"], rule["action"]) for rule in json.loads(text)["rules"])
