"""Latents and text embeddings computed once, so that neither autoencoder nor text encoder runs while training."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from apexflow.backbones import Backbone
from apexflow.conditioning import Condition
from apexflow.data.captioned import Captioned, Skipped, read_captioned
from apexflow.errors import UserError
from apexflow.progress import Progress


@dataclass(frozen=True)
class CachedSet:
    """Latents (N, C, h, w) with captions, and the text embeddings (valid tokens only) unless the text encoder is trained."""

    latents: Tensor
    captions: list[str]
    embeds: Tensor | None = None  # (tokens of all captions, D)
    starts: Tensor | None = None  # (N + 1,)
    pooled: Tensor | None = None  # (N, P)

    def __len__(self) -> int:
        return len(self.captions)

    def condition(self, rows: Sequence[int]) -> Condition:
        """Embeddings of some captions, padded to the longest of them."""
        if self.embeds is None or self.starts is None:
            raise ValueError("this set was cached without text embeddings")
        spans = [self.embeds[self.starts[r] : self.starts[r + 1]].float() for r in rows]
        mask = nn.utils.rnn.pad_sequence([torch.ones(len(s)) for s in spans], batch_first=True)
        pooled = None if self.pooled is None else self.pooled[list(rows)].float()
        return Condition(nn.utils.rnn.pad_sequence(spans, batch_first=True), mask, pooled)


def to_tensor(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """Centre crop to the aspect of `size` (height, width), resize, (3, H, W) in [-1, 1]."""
    height, width = size
    scale = max(height / image.height, width / image.width)
    if scale != 1:
        new = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        image = image.resize(new, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    image = image.crop((left, top, left + width, top + height))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def fingerprint(*modules: nn.Module) -> str:
    """A short hash of weights, so that a cache made by another encoder is never taken for this one's."""
    return hash_tensors(*(module.state_dict() for module in modules))


def hash_tensors(*groups: Mapping[str, Tensor]) -> str:
    """A short hash of named tensors."""
    digest = hashlib.sha256()
    for group in groups:
        for name, tensor in sorted(group.items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            # A few values of each tensor: sums would differ in the last bit with the number of threads.
            flat = tensor.detach().flatten()
            digest.update(flat[:: max(len(flat) // 1024, 1)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def cache_set(
    source: Path,
    backbone: Backbone,
    folder: Path,
    size: tuple[int, int],
    with_text: bool,
    skip_limit: float = 0.05,
    batch: int = 64,
) -> CachedSet:
    """The cached form of a captioned set, made on first use in `folder` and read back afterwards.

    Raises UserError for unreadable data, or when the folder holds a cache that was made otherwise.
    """
    modules = (backbone.vae, backbone.text_encoder) if with_text else (backbone.vae,)
    made_by = {"source": str(source), "size": list(size), "text": with_text, "encoders": fingerprint(*modules)}
    if (folder / "cache.json").is_file():
        return load_cache(folder, made_by)
    skipped = Skipped()
    latents, captions, conditions = [], [], []
    with Progress(f"caching {source.name}") as progress:
        for group in _groups(read_captioned(source, skipped), batch):
            images = torch.stack([to_tensor(item.image, size) for item in group])
            with torch.no_grad():
                latents.append(backbone.encode_images(images).half().cpu())
                if with_text:
                    conditions.append(backbone.encode_prompts([item.caption for item in group]).to("cpu"))
            captions += [item.caption for item in group]
            progress.advance(len(group))
    skipped.check(skip_limit, source)
    cached = CachedSet(torch.cat(latents), captions, *_flatten(conditions))
    _save(cached, folder, made_by, skipped)
    return cached


def _groups(records: Iterator[Captioned], size: int) -> Iterator[list[Captioned]]:
    group: list[Captioned] = []
    for record in records:
        group.append(record)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _flatten(conditions: list[Condition]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Valid tokens of all captions end to end, where each caption starts, and the pooled embeddings."""
    if not conditions:
        return None, None, None
    spans = []
    for c in conditions:
        for row in range(len(c)):
            spans.append(c.embeds[row] if c.mask is None else c.embeds[row][c.mask[row].bool()])
    starts = torch.tensor([0, *[len(s) for s in spans]]).cumsum(0)
    pooled = [c.pooled for c in conditions if c.pooled is not None]
    return torch.cat(spans), starts, torch.cat(pooled) if pooled else None


def _save(cached: CachedSet, folder: Path, made_by: dict, skipped: Skipped) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: getattr(cached, name) for name in ("latents", "embeds", "starts", "pooled")}
    partial = folder / "tensors.safetensors.partial"
    save_file({name: t.contiguous() for name, t in tensors.items() if t is not None}, partial)
    os.replace(partial, folder / "tensors.safetensors")
    (folder / "captions.json").write_text(json.dumps(cached.captions))
    record = {"made_by": made_by, "rows": len(cached), "skipped": skipped.reasons}
    (folder / "cache.json.partial").write_text(json.dumps(record, indent=1))
    os.replace(folder / "cache.json.partial", folder / "cache.json")  # last: its presence says that the rest is whole


def load_cache(folder: Path, made_by: dict | None = None) -> CachedSet:
    """Read a cache back; UserError if it is damaged or was made with other settings than `made_by`."""
    try:
        record = json.loads((folder / "cache.json").read_text())
        tensors = load_file(folder / "tensors.safetensors")
        captions = json.loads((folder / "captions.json").read_text())
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cache {folder} is damaged ({error}): delete the folder, it will be made again") from error
    differs = [k for k, v in (made_by or {}).items() if record["made_by"].get(k) != v]
    if differs:
        raise UserError(
            f"cache {folder} was made with another {' and '.join(differs)}: delete the folder or name another"
        )
    return CachedSet(captions=captions, **tensors)
