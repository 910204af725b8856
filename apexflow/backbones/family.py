"""What a backbone is, and most families share: one denoiser, an AutoencoderKL, text encoders, and a diffusers folder."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from apexflow.backbones.encoders import Encoders
from apexflow.backbones.parts import check_factors, load_parts, save_folder
from apexflow.backbones.scheduler import scheduler_shift
from apexflow.backbones.settings import Settings, read_settings
from apexflow.backbones.text import device_of, unknown_words
from apexflow.conditioning import Condition, guide
from apexflow.errors import UserError
from apexflow.transport import LINEAR, Transport


class Backbone(Encoders, ABC):
    """A loaded text-to-image model. Pictures are (B, 3, H, W) in [-1, 1]; latents have about unit variance.

    Base of a family's file, which adds `classes`, `encode_prompts` and `velocity`, and overrides what differs. With several text
    encoders, `text_encoder` is a ModuleDict of them by the names of their folders, so that whoever trains, copies or hashes
    "the text encoder" gets all of them.

    pipeline: the stock class. network_part: the folder of the denoiser. kinds: the parts of the model's folder by name, with
        the class of each network.
    lora_targets: module names or their last parts, as peft takes them.
    without_gradient: first parts of the names of parameters that no loss can reach, because their output is dropped. DDP must
        be told of them.
    shift_defaults: (a, b) of Eq. (16). normalizes_text: whether the network RMS-normalises the text first, so that scaling it by
        a positive factor changes nothing (see `check_shift`).
    time_shift: s of `t' = s t / (1 + (s - 1) t)` for pictures of `default_size` pixels a side. flow_scheduler: whether the
        stock pipeline hands its network's answer to the scheduler as z - x on linear transport. embeds_guidance: whether the
        scale of the stock pipeline's call goes into the network.
    depth: the key of the transformer's config that counts its like blocks, if there is one.
    bfloat16: whether weights that are not stored in bfloat16 draw well in it.
    guided_at_once: whether a guided teacher is asked for caption and null in one pass. Not where that would pad the null to a
        caption's length within the picture's attention.
    """

    family: ClassVar[str]
    pipeline: str  # the class that `model_index.json` names
    defaults: ClassVar[Settings] = Settings(instruction=False)
    network_part: ClassVar[str] = "transformer"
    transport: Transport = LINEAR
    lora_targets: Sequence[str]
    without_gradient: Sequence[str] = ()
    # Table 6's best pair, found on Qwen-Image; elsewhere a starting point.
    shift_defaults: tuple[float, float] = (-0.5, 1.0)
    normalizes_text: bool = False
    flow_scheduler: bool = True
    embeds_guidance: bool = False
    depth: str | None = None
    bfloat16: ClassVar[bool] = True
    guided_at_once: ClassVar[bool] = False

    def __init__(self, parts: Mapping[str, Any], settings: Settings) -> None:
        super().__init__(parts)
        self.settings = settings
        self.kinds = {name: getattr(part, "kind", type(part)) for name, part in parts.items()}
        self.transformer: Any = parts[self.network_part]
        self.config = self.transformer.config
        check_factors(self.network_part, self.config, ("timestep_scale", "guidance_embeds_scale"))
        said = ("scaling_factor", "shift_factor") if self.vae_config.get("shift_factor") else ("scaling_factor",)
        check_factors("vae", self.vae_config, said)
        self.scheduler = parts["scheduler"]
        self.tokenizers = {name: part for name, part in parts.items() if name.startswith("tokenizer")}
        for tokenizer in self.tokenizers.values():
            tokenizer.padding_side = "right"  # velocities and caches expect real tokens first
        self.tokenizer = next(iter(self.tokenizers.values()))
        self.time_shift = self._scheduled_shift((self.default_size, self.default_size))

    @classmethod
    @abstractmethod
    def classes(cls) -> dict[str, Any]:
        """What is read of a diffusers folder beside the scheduler: the class of each part by the name of its sub-folder."""

    @classmethod
    def load(cls, folder: Path, device: torch.device, dtype: torch.dtype, hollow: bool = False) -> Self:
        """Read the parts of a diffusers folder; UserError names the part that is missing or damaged."""
        return cls.of_parts(load_parts(folder, cls.classes(), device, dtype, hollow), folder)

    @classmethod
    def of_parts(cls, parts: dict[str, Any], folder: Path) -> Self:
        """The model that these parts of a folder make, by the folder's settings over those of the family."""
        return cls(parts, read_settings(folder, cls.defaults))

    @abstractmethod
    def velocity(self, network: nn.Module, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        """`F(x_t, t, c)` of the paper, answered by `network`, a module of the transformer's class; t (B,) in [0, 1]."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """Text to condition, differentiable in the text encoder. The empty prompt is the null condition."""

    @property
    def device(self) -> torch.device:
        return device_of(self.transformer)

    @property
    def text_width(self) -> tuple[int, int | None]:
        """Width of a condition's embeddings, and of its pooled vector where there is one."""
        return self.config.joint_attention_dim, self.config.get("pooled_projection_dim")

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """One answer of two (B, C, h, w), as the stock pipeline guides: a line through both."""
        return guide(conditional, unconditional, scale)

    def encoder(self, name: str) -> Any:
        """One of several text encoders, by the name of its folder."""
        return self.text_encoder[name]

    def unknown_words(self, prompts: Sequence[str]) -> list[str]:
        """Prompts in which every token is the unknown token."""
        return unknown_words(self.tokenizer, prompts)

    def encode_images(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] to latents (B, C, h, w) in float32: the mode, shifted and scaled."""
        latents = self.vae.encode(images.to(next(self.vae.parameters()))).latent_dist.mode().float()
        return (latents - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to pictures (B, 3, H, W), clamped to [-1, 1], in float32."""
        latents = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        return self.vae.decode(latents.to(next(self.vae.parameters()))).sample.float().clamp(-1, 1)

    @property
    def patch(self) -> int:
        """Latent pixels to a side of a token."""
        return 2

    @property
    def embedded_guidance(self) -> float | None:
        """The scale that a network is fed which takes one as an input."""
        scale = self.settings.embedded_guidance
        return self.defaults.embedded_guidance if scale is None else scale

    def guidance_input(self, rows: int, device: torch.device) -> Tensor | None:
        """That scale as the network takes it, (rows,); None for a network that takes none."""
        if not self.config.get("guidance_embeds"):
            return None
        scale = float(self.embedded_guidance or 0) * self.config.get("guidance_embeds_scale", 1.0)
        return torch.full((rows,), scale, device=device)

    @property
    def factor(self) -> int:
        """Pixels to a side of a latent pixel."""
        return 2 ** (len(self.vae_config.block_out_channels) - 1)

    @property
    def most_tokens(self) -> int:
        """How long a condition (B, L, D) gets at most."""
        return self.settings.max_tokens

    @property
    def channels(self) -> int:
        """Latent channels, unpacked."""
        return self.config.in_channels

    @property
    def max_tokens_a_side(self) -> int | None:
        """How many tokens the position table has along a side; None if it has no end."""
        return None

    @property
    def default_size(self) -> int:
        return self.settings.size or (self.config.get("sample_size") or 128) * self.factor

    def draw_at(self, size: int) -> None:
        """Make `size` the `default_size`, in pixels a side, with the time shift of such pictures."""
        self.follow(replace(self.settings, size=size))

    def follow(self, settings: Settings) -> None:
        """Be drawn as other settings than the folder's say, with the time shift of pictures of their size."""
        self.settings = settings
        self.time_shift = self.time_shift_at((self.default_size, self.default_size))

    def time_shift_at(self, size: tuple[int, int]) -> float:
        """`time_shift` for pictures of `size` (height, width): the same for all, unless the scheduler's shift is dynamic."""
        dynamic = self.scheduler.config.get("use_dynamic_shifting")
        return self._scheduled_shift(size) if dynamic else self.time_shift

    def _scheduled_shift(self, size: tuple[int, int]) -> float:
        tokens = math.prod(side // (self.factor * self.patch) for side in size)
        return scheduler_shift(self.scheduler.config, tokens)

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """(C, h, w) for pictures of `size` (height, width) in pixels; UserError for one that the model cannot take."""
        multiple, wrong = self.factor * self.patch, f"size {size[1]}x{size[0]} does not fit this model: "
        if min(size) <= 0 or any(side % multiple for side in size):
            raise UserError(f"{wrong}both sides must be multiples of {multiple}")
        most = self.max_tokens_a_side
        if most is not None and max(size) > most * multiple:
            raise UserError(f"{wrong}sides can be at most {most * multiple}")
        return (self.channels, size[0] // self.factor, size[1] // self.factor)

    def round_time(self, t: Tensor) -> Tensor:
        """Times as the network sees them: unchanged, since most families feed their sinusoid in float32."""
        return t

    def save(self, folder: Path, settings: Settings) -> None:
        """Write the diffusers folder of `pipeline`, with `settings` beside it."""
        parts = {self.network_part: self.transformer, "scheduler": self.scheduler, **self.tokenizers}
        parts |= self.encoders_to_save()
        save_folder(folder, self.pipeline, parts, settings, self.index())

    def index(self) -> dict[str, Any]:
        """What `model_index.json` says beside the parts."""
        return {}

    def stock_options(self, settings: Settings) -> dict[str, Any]:
        """Keyword arguments of the stock pipeline's call that guide it, and have it read prompts, as `settings` say."""
        scale = settings.embedded_guidance if self.embeds_guidance else settings.guidance
        options: dict[str, Any] = {} if scale is None else {"guidance_scale": scale}
        limit = stock_parameters(self.pipeline).get("max_sequence_length")
        said = limit is not None and limit.default != settings.max_tokens
        return options | ({"max_sequence_length": settings.max_tokens} if said else {})

    def stock_places(self, times: Tensor) -> dict[str, Any]:
        """How a stock pipeline that keeps its own scheduler is told where to ask, given a grid (steps + 1,)."""
        return {}


def stock_parameters(pipeline: str) -> Mapping[str, inspect.Parameter]:
    """What the call of a stock pipeline takes."""
    import diffusers

    return inspect.signature(getattr(diffusers, pipeline).__call__).parameters


def pack(latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) as tokens (B, h/2 * w/2, 4 C), each a 2 x 2 block in the order channel, row, column."""
    rows, channels, height, width = latents.shape
    blocks = latents.reshape(rows, channels, height // 2, 2, width // 2, 2)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(rows, (height // 2) * (width // 2), 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`, for latents of `height` x `width`."""
    rows, _, wide = tokens.shape
    blocks = tokens.reshape(rows, height // 2, width // 2, wide // 4, 2, 2)
    return blocks.permute(0, 3, 1, 4, 2, 5).reshape(rows, wide // 4, height, width)
