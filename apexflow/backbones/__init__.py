"""Backbones: one file a family. Each hides its sign, time scale, packing, masks and guidance embeddings behind one contract."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from apexflow.conditioning import Condition
from apexflow.errors import UserError
from apexflow.transport import Transport


@dataclass(frozen=True)
class Settings:
    """What a model folder may say for apexflow in `apexflow.json`; a stock folder without the file gets the defaults.

    steps, guidance, times: how the model is meant to be sampled (`times`: an explicit descending grid, or None).
    instruction: whether the family's instruction text is put before the prompt (SANA).
    max_tokens: prompts longer than this are cut. card: recipe, seed, hardware, time and scores, for people.
    """

    steps: int = 20
    guidance: float = 1.0
    times: list[float] | None = None
    instruction: bool = True
    max_tokens: int = 300
    size: int | None = None
    card: dict = field(default_factory=dict)


class Backbone(Protocol):
    """A loaded text-to-image model. Pictures are (B, 3, H, W) in [-1, 1]; latents are normalised to about unit variance."""

    family: ClassVar[str]
    transport: Transport
    transformer: nn.Module
    text_encoder: nn.Module
    vae: nn.Module
    tokenizer: Any
    settings: Settings
    lora_targets: Sequence[str]
    time_shift: float

    def velocity(self, network: nn.Module, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        """`F(x_t, t, c)` of the paper, answered by `network`, a module of the transformer's class; t (B,) in [0, 1]."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """Text to condition, differentiable in the text encoder. The empty prompt is the null condition."""
        ...

    def unknown_words(self, prompts: Sequence[str]) -> list[str]:
        """Prompts of which the tokenizer knows no word at all."""
        ...

    def encode_images(self, images: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """(C, h, w) for a picture of `size` (height, width); UserError for a size that the model cannot take."""
        ...

    def round_time(self, t: Tensor) -> Tensor:
        """Times as the network really sees them."""
        ...

    def save(self, folder: Path, settings: Settings) -> None:
        """Write a diffusers folder that the stock pipeline loads, with `settings` beside it."""
        ...


def backbones() -> dict[str, Any]:
    """The table of families by the pipeline class that `model_index.json` names: one line each."""
    from apexflow.backbones.sana import Sana

    return {"SanaPipeline": Sana}


BUILT_IN = Path(__file__).parent.parent / "assets"


def resolve(path_or_id: str) -> Path:
    """The folder of a model: a built-in name ("mini-teacher", "mini-student"), a local folder, or a hub id.

    The network is touched only for a hub id, that is a name of the form owner/name which is no local path.
    """
    if (BUILT_IN / path_or_id / "model_index.json").is_file():
        return BUILT_IN / path_or_id
    folder = Path(path_or_id)
    if folder.exists():
        return folder
    if path_or_id.count("/") == 1 and not path_or_id.startswith((".", "/", "~")):
        return _download(path_or_id)
    names = ", ".join(sorted(p.parent.name for p in BUILT_IN.glob("*/model_index.json")))
    raise UserError(f"model {path_or_id!r} not found: give a diffusers folder, a hub id (owner/name) or one of: {names}")


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        allowed = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(hub_id, allow_patterns=allowed))
    except Exception as error:  # the hub raises many kinds: offline, gated, missing
        raise UserError(f"cannot fetch {hub_id!r} from the hub ({type(error).__name__}): check the name and the network") from error


def load_backbone(path_or_id: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Backbone:
    """Load a model folder by the family that its `model_index.json` names. Never unpickles, never runs code from the folder."""
    folder = resolve(path_or_id)
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"{folder} is no diffusers checkpoint: model_index.json is missing")
    try:
        pipeline = json.loads(index.read_text()).get("_class_name")
    except (json.JSONDecodeError, AttributeError) as error:
        raise UserError(f"{index} is not valid JSON: restore it from the original checkpoint") from error
    table = backbones()
    if pipeline not in table:
        raise UserError(f"{folder} is a {pipeline}; apexflow serves {', '.join(table)}")
    refuse_pickles(folder)
    return table[pipeline].load(folder, torch.device(device), dtype)


def refuse_pickles(folder: Path) -> None:
    """UserError if a component of the folder has weights in a pickle format and none in safetensors."""
    for part in sorted(p for p in folder.iterdir() if p.is_dir()):
        pickles = [p for p in part.iterdir() if p.suffix in (".bin", ".pt", ".ckpt", ".pth")]
        if pickles and not list(part.glob("*.safetensors")):
            raise UserError(f"{pickles[0]} is a pickle, which can run code: convert it to safetensors first")


def read_settings(folder: Path) -> Settings:
    """`apexflow.json` of a model folder, or the defaults."""
    path = folder / "apexflow.json"
    return Settings(**json.loads(path.read_text())) if path.is_file() else Settings()
