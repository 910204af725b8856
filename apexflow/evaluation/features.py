"""Inception features of many pictures, kept on disk chunk by chunk, and the statistics of a set of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from apexflow.data.shards import groups
from apexflow.errors import UserError, first_line
from apexflow.evaluation.fid import Array, RunningStatistics
from apexflow.evaluation.files import Item, Unreadable, read_ahead, stamp
from apexflow.evaluation.inception import Inception, prepare
from apexflow.files import replacing

CHUNK = 512  # pictures to a file: what an interruption can cost
BATCH = 32


class FeatureStore:
    """Features in safetensors files of a folder, under the key of each picture."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, features: Mapping[str, torch.Tensor]) -> None:
        """{key: (D,)} of some pictures, whole or not at all."""
        if not features:
            return
        name = hashlib.sha256("\n".join(features).encode()).hexdigest()[:16]
        with replacing(self.folder / f"{name}.safetensors") as partial:
            save_file({"features": torch.stack(list(features.values()))}, partial, {"keys": json.dumps(list(features))})

    def keys(self) -> set[str]:
        return {key for path in self._files() for key in _keys(path)}

    def chunks(self, wanted: Iterable[str]) -> Iterator[NDArray[np.float32]]:
        """The features of the wanted keys, each once."""
        left = set(wanted)
        for path in self._files():
            keys = _keys(path)
            rows = [row for row, key in enumerate(keys) if key in left]
            left -= set(keys)
            if rows:
                yield load_file(path)["features"][rows].numpy()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))


def _keys(path: Path) -> list[str]:
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["keys"])
    except (OSError, SafetensorError, TypeError, KeyError, ValueError):
        raise UserError(f"{path} is damaged: delete its folder and results.jsonl to compute it again") from None


def statistics(store: FeatureStore, keys: Iterable[str]) -> tuple[Array, Array, int]:
    """Mean, covariance and number of the stored features of some pictures."""
    running: RunningStatistics | None = None
    for chunk in store.chunks(keys):
        running = running or RunningStatistics(chunk.shape[1])
        running.add(chunk)
    if running is None:
        raise UserError("FID has no pictures: all are missing or unreadable")
    return *running.result(), running.count


def picture_key(path: Path, name: str) -> str:
    """A picture that is written again gets other features."""
    return f"{name}@{stamp(path)}"


def extract(
    network: Inception | None, items: Sequence[Item], read: Callable[[Item], Image.Image], protocol: str, size: int
) -> Iterator[tuple[Item, Image.Image | Unreadable, torch.Tensor | None]]:
    """Each picture, as `read` gives it and as features (D,); an unreadable one, and each where there is no network, comes
    without."""

    def prepared(item: Item) -> tuple[Image.Image, torch.Tensor | None]:
        image = read(item)
        return image, None if network is None else prepare(image, protocol, size)

    for part in groups(read_ahead(items, prepared, threads=8), BATCH):
        seen = [found[1] for _, found in part if not isinstance(found, Unreadable) and found[1] is not None]
        features = iter(network.features(torch.stack(seen)) if network is not None and seen else ())
        for item, found in part:
            if isinstance(found, Unreadable):
                yield item, found, None
            else:
                yield item, found[0], next(features, None)


def read_statistics(path: Path) -> tuple[Array, Array]:
    """mu (D,) and sigma (D, D) from a .npz (as Sana's and pytorch-fid's scripts write it) or .safetensors file."""
    try:
        if path.suffix == ".safetensors":
            tensors = {name: tensor.double().numpy() for name, tensor in load_file(path).items()}
            return tensors["mu"], tensors["sigma"]
        with np.load(path) as arrays:  # plain arrays only: NumPy refuses objects
            return np.asarray(arrays["mu"], np.float64), np.asarray(arrays["sigma"], np.float64)
    # An empty file ends too early, one array alone is no archive, and a broken archive is told by zipfile.
    except (OSError, EOFError, TypeError, ValueError, KeyError, BadZipFile, SafetensorError) as error:
        why = first_line(error).partition(" If you trust")[0]  # NumPy's advice to unpickle it is not ours
        raise UserError(f"cannot read mu and sigma from {path}, a .npz or .safetensors file: {why}") from None
