"""LoRAs that are added to a model as it is loaded, each by its strength: to draw with, without writing a whole model first."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from apexflow.backbones import Backbone, Settings, load_backbone, read_settings, resolve
from apexflow.errors import UserError, quoted
from apexflow.lora.merge import FILE, Pair, add_pairs, check_lora, file_of, read_lora

MEND = "give a LoRA file, the lora/ folder of a run, or the folder of an export"


@dataclass(frozen=True)
class Lora:
    """A LoRA file, and what its sum is multiplied by."""

    file: Path
    strength: float = 1.0

    @classmethod
    def named(cls, given: str) -> Lora:
        """What FILE[:STRENGTH] names; FILE may be the folder of one, and a path that exists as a whole is one, colons and all.

        UserError for a file that is not there, and for a strength that is no finite number.
        """
        if not given:
            raise UserError(f"the name of a LoRA is empty: {MEND}")
        path, strength = Path(given), 1.0
        before, _, said = given.rpartition(":")
        if before and not path.exists() and Path(before).exists():
            path, strength = Path(before), _strength(said, before)
        file = file_of(path)
        if not file.is_file():
            raise UserError(f"LoRA {path} {f'holds no {FILE}' if path.is_dir() else 'does not exist'}: {MEND}")
        return cls(file, strength)

    def told(self) -> dict[str, Any]:
        """The same as a report says it."""
        return {"file": str(self.file.resolve()), "strength": self.strength}


@dataclass(frozen=True)
class Additions:
    """What LoRAs add to a model: `pairs` of each, its strength in their scales, and how the model draws with them."""

    loras: list[Lora]
    pairs: list[dict[str, Pair]]
    settings: Settings

    def add_to(self, backbone: Backbone) -> None:
        """Add them to the weights of a loaded model, which are not stored narrower yet, one LoRA after another."""
        weights = backbone.transformer.state_dict()
        for pairs in self.pairs:
            add_pairs(weights, pairs)
        backbone.follow(self.settings)


def read_loras(given: str | Path | Sequence[str | Path], model: str) -> Additions:
    """What one or several FILE[:STRENGTH] add to a model, of which no weights are read: that takes minutes, mistakes come first.

    Settings are those that the merge of one has: where an apexflow.json lies beside it, what that says. The last one counts.
    UserError for what is no LoRA, or one for another model.
    """
    several = given if isinstance(given, list | tuple) else [given]
    loras = [Lora.named(str(one)) for one in several]
    backbone = load_backbone(model, "meta")
    every, settings = [], backbone.settings
    for lora in loras:
        pairs = read_lora(lora.file, backbone)
        check_lora(lora.file, pairs, resolve(model) / backbone.network_part)
        every.append({name: replace(pair, scale=lora.strength * pair.scale) for name, pair in pairs.items()})
        warn_of_own(lora.file, backbone.settings, model)
        settings = read_settings(lora.file.parent, settings)
    return Additions(loras, every, settings)


def warn_of_own(file: Path, settings: Settings, model: str) -> None:
    """Warn of the LoRA of a run, or out of one, where the run's model of these settings is named, which has it in its weights."""
    recipe = read_settings(file.parent, Settings()).card.get("recipe")
    if isinstance(recipe, dict) and recipe == settings.card.get("recipe"):
        told = f"{model} already has the LoRA of {file}'s run merged in, and it is added again"
        warnings.warn(f"{told}: leave it out, or use the model that the run started from", stacklevel=2)


def _strength(said: str, file: str) -> float:
    try:
        strength = float(said)
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise UserError(f"the strength of the LoRA {file} is {quoted(said)}: give a number, such as {file}:0.8")
    return strength
