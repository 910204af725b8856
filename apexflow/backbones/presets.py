"""Configs of published checkpoints, so that their sizes are known with nothing downloaded: one JSON file each in presets/.

The values are those of the checkpoints' own config.json files: shapes and settings, no text and no weights.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from apexflow.backbones import BUILT_IN, Backbone, load_backbone
from apexflow.backbones.folder import write_index
from apexflow.errors import UserError

FOLDER = Path(__file__).parent / "presets"


def presets() -> dict[str, Path]:
    """The file of each checkpoint by its hub id."""
    found: dict[str, Path] = {}
    for path in sorted(FOLDER.glob("*.json")):
        found |= dict.fromkeys(json.loads(path.read_text())["checkpoint_ids"], path)
    return found


def load_shapes(model: str, dtype: torch.dtype = torch.float32) -> Backbone:
    """A backbone on the meta device, from configs alone: a model folder, a built-in name, or the hub id of a preset.

    Nothing is downloaded and no weights are read. UserError for a hub id without a preset.
    """
    if Path(model).exists() or (BUILT_IN / model).is_dir() or model.count("/") != 1:
        return load_backbone(model, "meta", dtype)
    known = presets()
    if model not in known:
        raise UserError(
            f"the configs of {model!r} are not known here: give the folder of the checkpoint, or one of {', '.join(known)}"
        )
    with tempfile.TemporaryDirectory() as folder:
        write_configs(json.loads(known[model].read_text()), Path(folder))
        backbone = load_backbone(folder, "meta", dtype)
        _ = backbone.text_encoder  # read when it is first called for, and by then the folder is gone
    return backbone


def write_configs(preset: dict[str, Any], folder: Path) -> None:
    """A diffusers folder of configs without weights."""
    parts: dict[str, Any] = {name: preset[name] for name in ("transformer", "unet", "vae") if name in preset}
    for number, encoder in enumerate(preset["text_encoders"], 1):
        parts["text_encoder" if number == 1 else f"text_encoder_{number}"] = encoder
    for name, config in parts.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(preset["scheduler"]))
    index = {"_class_name": preset["pipeline_class"], **preset.get("index", {})}
    write_index(folder, index)
