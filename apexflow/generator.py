"""From prompts to pictures: `apexflow.load(...)` gives a `Generator`."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from apexflow.backbones import Backbone, backbones, load_backbone, read_settings, resolve
from apexflow.backbones.encoders import ROLES
from apexflow.backbones.folder import model_of, read_index
from apexflow.backbones.precision import LARGE, multiply_in_tf32
from apexflow.backbones.room import InTurn, room_on, weight_bytes
from apexflow.backbones.second_time import going_to, second_time_of
from apexflow.backbones.storage import Kind, check_kind, storing
from apexflow.backbones.weights import stored_dtypes, weight_shapes
from apexflow.conditioning import Condition, guided_answer
from apexflow.devices import pick_device
from apexflow.errors import UserError, quoted
from apexflow.lora.added import Lora, read_loras
from apexflow.randomness import RowRandom
from apexflow.sampler import MOST_STEPS, sample

MAX_BATCH = 32
# Prompts that are encoded in one turn, where text encoder and network take turns: of 8 MiB each at most, in main memory.
AHEAD = 256
NOT_FINITE = "the weights are damaged or overflow, or guidance, kappa or the strength of a LoRA is too large"
LARGER = 4  # times a side of what a model draws: beyond that it is warned of
GAP = 2  # pixels between the pictures of a grid


class Sampling(NamedTuple):
    """How pictures are drawn: the grid (steps + 1,), the shape (C, h, w) of a latent, and what `check_sampling` checks."""

    times: Tensor
    shape: tuple[int, ...]
    guidance: float
    kappa: float
    rho: float
    order: int


class Generator:
    """A loaded model with its own sampling settings. `encode`: prompts to conditions, by default the model's text encoder;
    `decode`: latents (B, C, h, w) to pictures, by default its autoencoder, and of what it leaves out no picture is made;
    `most`: how many rows the network is asked at once, which changes no picture. `loras`: those that are in the weights.

    Of the last `generate`: `evaluations` counts network calls a picture, guidance included, and `finite` says of each picture
    whether the model's answer was.
    """

    def __init__(
        self,
        backbone: Backbone,
        encode: Callable[[Sequence[str]], Condition] | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
        most: int = MAX_BATCH,
        loras: Sequence[Lora] = (),
    ) -> None:
        self.backbone = backbone
        self.most = most
        self.encode = encode or backbone.encode_prompts
        self.decode = decode
        self.loras = loras
        self.evaluations = 0
        self.finite: list[bool] = []

    def generate(
        self,
        prompts: Sequence[str] | str,
        steps: int | None = 1,
        seed: int = 0,
        size: int | tuple[int, int] | None = None,
        guidance: float | None = None,
        kappa: float | None = None,
        rho: float | None = None,
        order: int | None = None,
    ) -> list[Image.Image]:
        """One picture a prompt, by `steps` network evaluations (twice that with guidance other than 1).

        One step unless asked otherwise; what is None comes from the model's settings. Picture i depends on `seed` and i alone,
        not on the batch. Raises UserError for steps < 1, a size that the model cannot take or a prompt that is no text; warns
        when a prompt is empty or has no word that the model knows, and of a size far above the model's own.
        """
        prompts = list(prompts) if isinstance(prompts, Iterable) and not isinstance(prompts, str) else [prompts]
        for prompt in prompts:
            _check_text(prompt)
        plan = self._plan(steps, size, guidance, kappa, rho, order)
        seeds = [(whole(seed, "seed"), index) for index in range(len(prompts))]
        _warn_of_size(self.backbone.default_size if size is None else size, self.backbone.default_size)
        if not all(prompt.strip() for prompt in prompts):
            warnings.warn("the prompt is empty: the picture will follow nothing", stacklevel=2)
        for prompt in self.backbone.unknown_words(prompts):
            warnings.warn(f"the model knows no word of {quoted(prompt)}: the picture will not follow it", stacklevel=2)
        return self._draw(prompts, seeds, plan)

    def generate_seeded(
        self,
        prompts: Sequence[str],
        seeds: Sequence[tuple[int, int]],
        steps: int | None = None,
        size: int | tuple[int, int] | None = None,
        guidance: float | None = None,
        kappa: float | None = None,
        rho: float | None = None,
        order: int | None = None,
    ) -> list[Image.Image]:
        """As `generate`, with a (seed, index) pair for each picture, and nothing said of the prompts."""
        return self._draw(prompts, seeds, self._plan(steps, size, guidance, kappa, rho, order))

    @torch.no_grad()
    def encode_ahead(self, prompts: Sequence[str]) -> None:
        """Encode the prompts of drawings to come at once, where text encoder and network take turns on a card."""
        if isinstance(self.encode, InTurn):
            self.encode.ahead(prompts)

    def _plan(
        self,
        steps: int | None,
        size: int | tuple[int, int] | None,
        guidance: float | None,
        kappa: float | None,
        rho: float | None,
        order: int | None,
    ) -> Sampling:
        """What was asked for, checked; None is the model's own."""
        asked = sides(self.backbone.default_size if size is None else size)
        times = self.times(steps, asked)
        sampler = self.sampler(len(times) - 1, guidance, kappa, rho, order)
        return Sampling(times, self.backbone.latent_shape(asked), **sampler)

    def sampler(
        self,
        steps: int,
        guidance: float | None = None,
        kappa: float | None = None,
        rho: float | None = None,
        order: int | None = None,
    ) -> dict[str, Any]:
        """These by name, checked; None is the model's own in so many steps."""
        given: dict[str, Any] = {"guidance": guidance, "kappa": kappa, "rho": rho, "order": order}
        settings = self.backbone.settings
        own: dict[str, Any] = {"guidance": settings.guidance, **settings.sampler(steps)}
        chosen = {name: own[name] if value is None else value for name, value in given.items()}
        check_sampling(**chosen, jumps=second_time_of(self.backbone.transformer) is not None)
        return chosen

    @torch.no_grad()
    def _draw(self, prompts: Sequence[str], seeds: Sequence[tuple[int, int]], plan: Sampling) -> list[Image.Image]:
        pictures: list[Image.Image] = []
        self.finite = []
        latents = self._latents(prompts, seeds, plan)
        # A decoder of its own works alone, in a sharded run: the drawing, in which all processes take part, is done by then.
        for drawn in latents if self.decode is None else list(latents):
            images = (self.decode or self.backbone.decode)(drawn)
            self.finite += images.isfinite().flatten(1).all(1).tolist()
            if not all(self.finite):
                warnings.warn(f"the model's output is not finite: {NOT_FINITE}", stacklevel=2)
            pictures += to_pictures(images)
        return pictures

    def _latents(self, prompts: Sequence[str], seeds: Sequence[tuple[int, int]], plan: Sampling) -> Iterator[Tensor]:
        most = max(1, self.most // 2) if plan.guidance != 1 and self.backbone.guided_at_once else self.most
        for first in range(0, len(prompts), AHEAD):
            window = slice(first, first + AHEAD)
            texts, own = prompts[window], seeds[window]
            self.encode_ahead(texts)
            for at in range(0, len(texts), most):
                yield self._sample(texts[at : at + most], own[at : at + most], plan)

    def times(self, steps: int | None, size: tuple[int, int] | None = None) -> Tensor:
        """The time grid for a number of steps: the model's own if it ships one of that length, else uniform and shifted.

        size: (height, width) of the pictures, by default the model's own; some families shift by it.
        """
        settings = self.backbone.settings
        steps = settings.steps if steps is None else whole(steps, "steps")
        if not 1 <= steps <= MOST_STEPS:
            raise UserError(f"steps must be at least 1 and at most {MOST_STEPS}, got {steps}")
        shift = self.backbone.time_shift if size is None else self.backbone.time_shift_at(size)
        return settings.grid(steps, shift)

    def _sample(self, prompts: Sequence[str], seeds: Sequence[tuple[int, int]], plan: Sampling) -> Tensor:
        backbone, guidance = self.backbone, plan.guidance
        z = noise(seeds, plan.shape).to(backbone.device)
        # While training, the encoders do not stand on the transformer's device.
        c = self.encode(prompts).to(backbone.device)
        null = self.encode([""]).expand(len(prompts)).to(backbone.device) if guidance != 1 else None
        self.evaluations = 0

        network = backbone.transformer
        jumps = second_time_of(network) is not None

        def ask(x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
            return backbone.velocity(network, x_t, t, c)

        def velocity(x_t: Tensor, t: Tensor, s: Tensor | None = None) -> Tensor:
            self.evaluations += 1 if null is None else 2
            at_once = backbone.guided_at_once and null is not None
            with going_to(network, torch.cat([s, s]) if at_once and s is not None else s):
                if null is None:
                    return ask(x_t, t, c)
                return guided_answer(ask, x_t, t, c, null, guidance, backbone.guide, at_once)

        fresh = RowRandom.of_pictures(seeds, 1, z.device)  # a picture's own, as its first noise is
        return sample(velocity, z, plan.times, plan.kappa, plan.rho, plan.order, backbone.transport, fresh, jumps)


def pictures_at_once(size: int | tuple[int, int]) -> int:
    """How many pictures of `size` (a side, or height and width) are drawn in a batch: 32 small ones, 8 of 512 or two of 1024."""
    return max(1, min(MAX_BATCH, MAX_BATCH * 256**2 // math.prod(sides(size))))


def noise(seeds: Sequence[tuple[int, int]], shape: Sequence[int]) -> Tensor:
    """Standard normal (B, *shape), row i from seeds[i] alone, drawn on the CPU so that every device gives the same picture."""
    return RowRandom.of_pictures(seeds, 0).normal(shape)


def check_sampling(guidance: float, kappa: float, rho: float, order: int, jumps: bool = False) -> None:
    """UserError for settings that the sampler does not take; `jumps`: of a model with a second time."""
    for name, value in (("guidance", guidance), ("kappa", kappa), ("rho", rho)):
        if not isinstance(value, Real):
            raise UserError(f"{name} is {value!r}: give a number")
    if not math.isfinite(guidance):
        raise UserError(f"guidance is {guidance}: give a number, 1 for none")
    if not 0 <= rho <= 1:
        raise UserError(f"rho is {rho}: the share of fresh noise lies in 0 to 1")
    if not 0 <= kappa < math.inf:
        raise UserError(f"kappa is {kappa}: the extrapolation ratio is at least 0")
    if order not in (1, 2):
        raise UserError(f"order is {order!r}: use 1, or 2 for Heun's correction")
    if jumps and (order != 1 or kappa > 0):
        what = f"kappa is {kappa}" if kappa > 0 else f"order is {order}"
        raise UserError(f"{what}: a model with a second time jumps along the path, so use order 1 and kappa 0")


def to_pictures(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] to 8-bit RGB pictures."""
    array = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(picture)) for picture in array]


def picture_grid(pictures: Sequence[Image.Image], columns: int = 8, scale: int = 1, gap: int = GAP) -> Image.Image:
    """Pictures of one size laid out in rows."""
    width, height = (side * scale for side in pictures[0].size)
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, picture in enumerate(pictures):
        spot = ((index % columns) * (width + gap), (index // columns) * (height + gap))
        sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST) if scale > 1 else picture, spot)
    return sheet


def _check_text(prompt: str) -> None:
    """UserError for what is no string, or cannot be written as UTF-8, as what a shell passes in another encoding."""
    if not isinstance(prompt, str):
        raise UserError(f"prompt {prompt!r} is not text: give a string, or a list of them")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UserError(f"prompt {quoted(prompt)} holds bytes that are not text: write it in UTF-8")


def sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of what may be one side."""
    both = size if isinstance(size, tuple | list) else (size, size)
    if len(both) != 2:
        raise UserError(f"size is {size}: give one side, or height and width")
    return whole(both[0], "size"), whole(both[1], "size")


def _warn_of_size(size: int | tuple[int, int], own: int) -> None:
    """Warn of a size (one side, or height and width) that is far above a model's own, in pixels a side."""
    height, width = sides(size)
    if max(height, width) > LARGER * own:
        told = f"the model generates at {own}: {width}x{height} is slow, and it was not trained on such pictures"
        warnings.warn(told, stacklevel=3)


def whole(value: Any, name: str) -> int:
    """`value` as an int, numpy's too; UserError for what is no whole number."""
    try:
        return operator.index(value)
    except TypeError:
        raise UserError(f"{name} is {value!r}: give a whole number") from None


def load(
    path_or_id: str = "mini-student",
    device: str | torch.device = "auto",
    dtype: torch.dtype | str | None = None,
    storage: Kind | None = None,
    lora: str | Path | Sequence[str | Path] | None = None,
) -> Generator:
    """Load a model: "mini-student" or "mini-teacher" (shipped), a diffusers folder, the folder of a finished run, or a hub id
    such as owner/name.

    dtype: of weights and arithmetic, or its name ("bfloat16"); None as in `suited_dtype`, and the matrices of a large model in
    float32 are then multiplied in TF32 on a GPU, from here on in all of this process.
    storage: keep the matrices of the denoiser in eight bits ("fp8") or four ("nf4", by bitsandbytes), for a card too small for
    it. Where a card has no room for all of a model, its text encoder and its denoiser stand there in turn, with a warning.
    lora: "FILE" or "FILE:STRENGTH", or several in a list, added into the weights as `apexflow export --merge` adds one; FILE may
    be a folder that holds one. How the model draws by itself (steps, guidance) is then as the last of their folders says.
    """
    check_kind(storage)
    place, path_or_id = torch.device(pick_device(str(device))), str(path_or_id)
    additions = None if lora is None else read_loras(lora, path_or_id)
    kind = _dtype(dtype) or suited_dtype(path_or_id, place, additions.settings.card if additions else None)
    # On the CPU, since what is stored narrower never stands on a card in full.
    backbone = load_backbone(path_or_id, "cpu", kind)
    if additions is not None:
        additions.add_to(backbone)
    if dtype is None:
        multiply_in_tf32(backbone.transformer, place)
    room = room_on(place)
    storing(storage, kind, place)(backbone.transformer)
    if in_turn := weight_bytes(backbone) > room:
        told = (
            f"{place} cannot hold all of {path_or_id}: its text encoder and network take turns there, which is slower"
        )
        warnings.warn(told, stacklevel=2)
    backbone.place(place, ("vae",) if in_turn else ROLES)
    return Generator(backbone, InTurn(backbone, place) if in_turn else None, loras=additions.loras if additions else ())


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise UserError(f"dtype is {dtype!r}: use float32, bfloat16 or float16")
    return found


def suited_dtype(path_or_id: str, device: str | torch.device, card: Mapping[str, Any] | None = None) -> torch.dtype:
    """`suited_on_gpu` where `device` is a GPU; else float32."""
    if torch.device(device).type != "cuda":
        return torch.float32
    return suited_on_gpu(resolve(path_or_id), str(model_of(Path(path_or_id))), card)


def suited_on_gpu(folder: Path, name: str, card: Mapping[str, Any] | None = None) -> torch.dtype:
    """bfloat16 for a model whose denoiser has half a billion parameters or more; else float32.

    Float32 for a large one too whose family does not draw well in bfloat16, unless it was trained in that: its weights are
    stored so, or its `name` (a path or hub id) says BF16, or its `card` (by default that in its folder) says a run in bf16.
    Reads the headers of the weights of its denoiser. UserError for a damaged file.
    """
    parts = [folder / part for part in ("transformer", "unet") if (folder / part).is_dir()]
    if sum(math.prod(shape) for part in parts for shape in weight_shapes(part).values()) < LARGE:
        return torch.float32
    family = backbones().get(str(read_index(folder).get("_class_name")))
    takes_it = family is None or family.bfloat16
    return torch.bfloat16 if takes_it or _was_trained_in_it(folder, parts[0], name, card) else torch.float32


def _was_trained_in_it(folder: Path, denoiser: Path, name: str, card: Mapping[str, Any] | None) -> bool:
    """Whether a model is known to have been trained in bfloat16."""
    if stored_dtypes(denoiser) == {"BF16"} or "bf16" in Path(name).name.lower():
        return True
    recipe = (read_settings(folder).card if card is None else card).get("recipe")
    return isinstance(recipe, dict) and recipe.get("precision") == "bf16"
