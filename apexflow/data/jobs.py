"""What `apexflow cache` and `apexflow synthesize` do: load the model, do this process's share, and sum up.

Under torchrun the first process waits for the others, and alone speaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apexflow.backbones import load_backbone, resolve
from apexflow.data.cache import read_index
from apexflow.data.caching import CacheSettings, make_cache
from apexflow.data.synthesize import Synthesis, synthesize
from apexflow.data.workers import own_share
from apexflow.devices import worker_device
from apexflow.generator import load, suited_dtype


def cache_command(
    source: Path, folder: Path, model: str, settings: CacheSettings, device: str
) -> dict[str, Any] | None:
    """What `apexflow cache` does, its share of it under torchrun; a summary with what was skipped, by whoever speaks."""
    share, place = own_share(), worker_device(device)
    home = resolve(model)
    with share.alone_in(folder):
        backbone = load_backbone(model, "cpu", suited_dtype(model, place))
        backbone.vae.float()  # small, and its errors would stay in the data
        with backbone.encoders_on(place):
            complete = make_cache(source, backbone, home, folder, settings, share)
    if not share.leads:
        return None
    if not complete:
        return {"cache": str(folder), "complete": False}
    index = read_index(folder)
    shown = {key: index[key] for key in ("rows", "seen", "skipped", "broken")}
    return {"cache": str(folder), "complete": True} | shown


def synthesize_command(
    prompts: Path,
    folder: Path,
    model: str,
    settings: Synthesis,
    device: str,
    storage: str | None = None,
    lora: Sequence[str] | None = None,
) -> dict[str, Any] | None:
    """What `apexflow synthesize` does, its share of it under torchrun; a summary, by whoever speaks."""
    share, place = own_share(), worker_device(device)
    with share.alone_in(folder):
        generator = load(model, place, storage=storage, lora=lora)  # type: ignore[arg-type]
        result = synthesize(prompts, folder, generator, settings, share)
    return result if share.leads else None
