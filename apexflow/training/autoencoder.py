"""Fitting the miniature's autoencoder. Real families come with theirs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apexflow.data.captioned import Skipped, read_captioned
from apexflow.data.pictures import centred, to_bytes
from apexflow.errors import UserError
from apexflow.progress import Progress


def fit_autoencoder(
    vae: Any, sources: Sequence[Path], size: tuple[int, int], steps: int, seed: int, pictures: int = 4000
) -> float:
    """Train `vae` in place on the first pictures of some captioned sets, `pictures` together; the mean squared error at the end.

    Latents are held near unit variance and get noise before decoding, so that the decoder forgives the small errors of a
    generator. Cosine schedule, AdamW.
    """
    torch.manual_seed(seed)
    images = torch.cat([load_images(source, size, -(-pictures // len(sources))) for source in sources])
    generator = torch.Generator().manual_seed(seed)
    # channels_last is about a quarter faster for these convolutions on a CPU.
    vae.requires_grad_(True).train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.03)
    error = torch.tensor(0.0)
    with Progress("training the autoencoder", steps) as progress:
        for _ in range(steps):
            x = centred(images[torch.randint(len(images), (16,), generator=generator)])
            loss, error = reconstruction_loss(vae, x, generator)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.advance(note=f"mse {error.item():.4f}")
    vae.requires_grad_(False).eval().to(memory_format=torch.contiguous_format)
    return float(error)


def reconstruction_loss(vae: Any, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Loss and mean squared error of decoding noisy latents of pictures `x` (B, 3, H, W)."""
    z = vae.encode(x).latent
    y = vae.decode(z + 0.2 * torch.randn(z.shape, generator=generator)).sample
    error = (y - x).square().mean()
    return (y - x).abs().mean() + error + 0.01 * (z.square().mean() - 1) ** 2, error.detach()


def load_images(source: Path, size: tuple[int, int], count: int) -> Tensor:
    """The first pictures of a set as uint8 (N, 3, H, W)."""
    skipped, images = Skipped(), []
    for item in read_captioned(source, skipped):
        if item.image is None:
            raise UserError(f"{source} holds only prompts: give pictures, which the autoencoder is trained on")
        images.append(to_bytes(item.image, size))
        if len(images) == count:
            break
    skipped.check(0.5, source)
    return torch.stack(images)
