"""Backbones: one file a family, which hides sign, time scale, packing, masks and guidance inputs behind a contract."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

import torch
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from apexflow.backbones import hub, second_time
from apexflow.backbones.folder import INDEX, PICKLES, read_index
from apexflow.conditioning import Condition
from apexflow.errors import UserError, check_built_in
from apexflow.sampler import MOST_STEPS, check_times
from apexflow.transport import Transport


def _grid(times: list[float] | None) -> list[float] | None:
    if times is not None:
        check_times(torch.tensor(times, dtype=torch.float64))
    return times


Finite = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class Settings:
    """What a model folder may say for apexflow in `apexflow.json`; a stock folder without the file gets the defaults.

    steps, guidance, times: how the model is meant to be sampled (`times`: an explicit descending grid, or None).
    instruction: whether the family's instruction text is put before the prompt (SANA).
    max_tokens: prompts longer than this are cut. embedded_guidance: the scale fed to a network that takes one as an
    input (FLUX.1 dev, SANA-Sprint, LCM-SDXL); None is the family's own. card: recipe, seed, hardware, time and scores,
    for people.
    """

    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] = 20
    guidance: Finite = 1.0
    times: Annotated[list[float] | None, AfterValidator(_grid)] = None
    instruction: bool = True
    max_tokens: Annotated[int, Field(ge=1)] = 300
    size: Annotated[int | None, Field(ge=1)] = None
    embedded_guidance: Finite | None = None
    card: dict = field(default_factory=dict)


class Backbone(Protocol):
    """A loaded text-to-image model. Pictures are (B, 3, H, W) in [-1, 1]; latents have about unit variance.

    pipeline: the stock class; network_part: the folder of the denoiser. text_encoder: one module, or a ModuleDict of
    several. lora_targets: module names or their last parts, as peft takes them. without_gradient: first parts of the
    names of parameters that no loss can reach (their output is dropped), which DDP must be told of. shift_defaults: (a,
    b) of Eq. (16). normalizes_text: whether the network RMS-normalises the text first, so that scaling it by a positive
    factor changes nothing (see `check_shift`). time_shift: s of `t' = s t / (1 + (s - 1) t)` for pictures of
    `default_size` pixels a side. flow_scheduler: whether the stock pipeline hands its network's answer to the scheduler
    as z - x on linear transport. depth: the key of the transformer's config that counts its like blocks, if it has such.
    bfloat16: whether weights that are not stored in bfloat16 draw well in it. guided_at_once: whether a guided teacher is asked
    for caption and null in one pass; not where the null would be padded to a caption's length within the picture's attention.
    kinds: the parts of its folder by name, with the class of each network.
    """

    family: ClassVar[str]
    pipeline: str
    network_part: ClassVar[str]
    transport: Transport
    transformer: nn.Module
    text_encoder: nn.Module
    vae: nn.Module
    tokenizer: Any
    settings: Settings
    lora_targets: Sequence[str]
    without_gradient: Sequence[str]
    time_shift: float
    shift_defaults: tuple[float, float]
    normalizes_text: bool
    flow_scheduler: bool
    depth: str | None
    bfloat16: ClassVar[bool]
    guided_at_once: ClassVar[bool]
    kinds: Mapping[str, Any]

    @property
    def device(self) -> torch.device: ...

    @property
    def default_size(self) -> int: ...

    def draw_at(self, size: int) -> None:
        """Make `size` the `default_size`, with the time shift of such pictures."""
        ...

    def time_shift_at(self, size: tuple[int, int]) -> float:
        """`time_shift` for pictures of `size` (height, width)."""
        ...

    def velocity(self, network: nn.Module, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        """`F(x_t, t, c)` of the paper, answered by `network`, a module of the transformer's class; t (B,) in [0, 1]."""
        ...

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """One answer of two, as the stock pipeline guides; scale 1 is the first."""
        ...

    @property
    def text_width(self) -> tuple[int, int | None]:
        """Width of a condition's embeddings, and of its pooled vector where there is one."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """Text to condition, differentiable in the text encoder. The empty prompt is the null condition."""
        ...

    def unknown_words(self, prompts: Sequence[str]) -> list[str]:
        """Prompts of which the tokenizer knows no word at all."""
        ...

    def encode_images(self, images: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...

    def encoders_on(self, device: torch.device) -> AbstractContextManager[None]:
        """Within, autoencoder and text encoder stand on `device`; both are read when they are first called for."""
        ...

    def autoencoder_on(self, device: torch.device) -> AbstractContextManager[None]:
        """Within, the autoencoder alone stands on `device`; afterwards where it stood."""
        ...

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """(C, h, w) for a picture of `size` (height, width); UserError for a size that the model cannot take."""
        ...

    def round_time(self, t: Tensor) -> Tensor:
        """Times as the network really sees them."""
        ...

    def stock_options(self, settings: Settings) -> dict[str, Any]:
        """Keyword arguments of the stock pipeline's call that guide it, and have it read prompts, as `settings` say."""
        ...

    def stock_places(self, times: Tensor) -> dict[str, Any]:
        """How a stock pipeline that keeps its own scheduler is told where to ask, given a grid (steps + 1,)."""
        ...

    def save(self, folder: Path, settings: Settings) -> None:
        """Write a diffusers folder that the stock pipeline loads, with `settings` beside it."""
        ...


def backbones() -> dict[str, Any]:
    """The table of families by the pipeline class that `model_index.json` names: one line each."""
    from apexflow.backbones.flux import Flux
    from apexflow.backbones.flux2 import Flux2Klein
    from apexflow.backbones.lumina2 import Lumina2
    from apexflow.backbones.pixart import PixArt
    from apexflow.backbones.qwen_image import QwenImage
    from apexflow.backbones.sana import Sana
    from apexflow.backbones.sana_sprint import SanaSprint
    from apexflow.backbones.sd3 import StableDiffusion3
    from apexflow.backbones.sdxl import StableDiffusionXL
    from apexflow.backbones.z_image import ZImage

    return {
        "SanaPipeline": Sana,
        "SanaSprintPipeline": SanaSprint,
        "QwenImagePipeline": QwenImage,
        "StableDiffusion3Pipeline": StableDiffusion3,
        "FluxPipeline": Flux,
        "Flux2KleinPipeline": Flux2Klein,
        "ZImagePipeline": ZImage,
        "Lumina2Pipeline": Lumina2,
        "StableDiffusionXLPipeline": StableDiffusionXL,
        "PixArtAlphaPipeline": PixArt,
        "PixArtSigmaPipeline": PixArt,
    }


def check_shift(backbone: Backbone, a: float, b: float) -> None:
    """UserError for a shift (Eq. 16) that this model cannot see: a > 0 with b = 0 where it normalises the text."""
    if backbone.normalizes_text and a > 0 and b == 0:
        best = backbone.shift_defaults
        raise UserError(
            f"the shift a={a}, b=0 gives no contrast: {backbone.family} normalises the text, so F(a c) = F(c) for "
            f"a > 0; take a < 0 or b other than 0, such as a={best[0]}, b={best[1]}"
        )


BUILT_IN = Path(__file__).parent.parent / "assets"


def built_in() -> list[str]:
    """The names of the models that ship."""
    return sorted(path.parent.name for path in BUILT_IN.glob(f"*/{INDEX}"))


def resolve(path_or_id: str) -> Path:
    """The folder of a model: a built-in name ("mini-teacher", "mini-student"), a local folder, or a hub id.

    The network is touched only for a hub id, that is a name of the form owner/name which is no local path. UserError for
    what is none of these, or both the first and the second.
    """
    if not path_or_id:
        raise UserError("the name of the model is empty: give a diffusers folder, a hub id or a built-in name")
    if path_or_id in built_in():
        check_built_in(path_or_id, "the model that ships with apexflow")
        return BUILT_IN / path_or_id
    folder = Path(path_or_id)
    if folder.exists():
        return folder
    if path_or_id.count("/") == 1 and not path_or_id.startswith((".", "/", "~")):
        return hub.download(path_or_id)
    names = ", ".join(built_in())
    raise UserError(
        f"model {path_or_id!r} not found: give a diffusers folder, a hub id (owner/name) or one of: {names}"
    )


def load_backbone(
    path_or_id: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, hollow: bool = False
) -> Backbone:
    """Load a model folder by the family that its `model_index.json` names. Never unpickles, never runs its code.

    With `hollow` the transformer's weights are left on disk, for processes that each read a share of them.
    """
    folder = resolve(path_or_id)
    if folder.is_file():
        pickled = folder.suffix in PICKLES
        what = "a pickle, which can run code: convert it to safetensors first" if pickled else "a file"
        raise UserError(f"{folder} is {what}; give the folder of a diffusers checkpoint")
    if not (folder / INDEX).is_file():
        if (folder / "model" / INDEX).is_file():
            raise UserError(f"{folder} is a run, not a model: name {folder / 'model'}")
        raise UserError(f"{folder} is no diffusers checkpoint: {INDEX} is missing")
    pipeline = read_index(folder).get("_class_name")
    if not isinstance(pipeline, str):
        raise UserError(f"{folder / INDEX} names no pipeline (_class_name): restore it from the original checkpoint")
    table = backbones()
    if pipeline not in table:
        raise UserError(f"{folder} is a {pipeline}; apexflow serves {', '.join(table)}")
    backbone = table[pipeline].load(folder, torch.device(device), dtype, hollow)
    if torch.device(device).type != "meta":
        second_time.load(backbone.transformer, folder)
    return backbone


def read_settings(folder: Path, defaults: Settings | None = None) -> Settings:
    """`apexflow.json` of a model folder over the family's `defaults`; UserError for a file that does not fit."""
    defaults, path = defaults or Settings(), folder / "apexflow.json"
    if not path.is_file():
        return defaults
    try:
        settings = replace(defaults, **json.loads(path.read_text()))
        return TypeAdapter(Settings).validate_python(asdict(settings))
    except (TypeError, ValueError, RecursionError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        reason = f"{first['loc'][0]}: {first['msg']}" if first else str(error)
        raise UserError(f"{path} does not fit this version of apexflow ({reason}): restore or delete it") from error
