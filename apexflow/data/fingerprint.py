"""Which weights something was made with: short hashes of a module, and of the encoders of a model folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from apexflow.errors import UserError


def fingerprint(*modules: nn.Module) -> str:
    """A short hash of loaded weights."""
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


# A cache's are read from the files, not from the loaded weights, so that dtype, device and number of threads make no difference.
SAMPLES, SAMPLE_BYTES = 16, 256
VOCABULARY = ("vocab.json", "merges.txt", "spiece.model", "tokenizer.model")


def autoencoder_fingerprint(folder: Path) -> str:
    """Of the autoencoder of a diffusers folder."""
    return _hash(_weights(folder / "vae"))


def text_fingerprint(folder: Path, settings: Any) -> str:
    """Of everything that turns a prompt into an embedding: encoders, vocabularies, instruction and length limit."""
    parts = sorted(p for p in folder.iterdir() if p.is_dir() and p.name.startswith(("text_encoder", "tokenizer")))
    texts = [text for part in parts for text in _vocabulary(part)]
    weights = [line for part in parts if part.name.startswith("text_encoder") for line in _weights(part)]
    return _hash([*weights, *texts, f"{settings.instruction} {settings.max_tokens}"])


def _vocabulary(part: Path) -> list[str]:
    """Of what a tokenizer's files say.

    `tokenizer.json` alone says everything, and a model that is saved again has no other; but what it says of how the
    tokenizer was last called is left out.
    """
    whole = part / "tokenizer.json"
    if whole.is_file():
        try:
            said = {k: v for k, v in json.loads(whole.read_bytes()).items() if k not in ("padding", "truncation")}
        except (ValueError, AttributeError) as error:
            raise UserError(f"cannot read {whole} ({error}): restore it from the original checkpoint") from error
        return [hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()]
    files = [part / name for name in VOCABULARY if (part / name).is_file()]
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]


def _hash(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _weights(folder: Path) -> list[str]:
    """Name, shape, dtype and some bytes of every tensor, sorted, however the tensors are spread over files."""
    lines = []
    for path in folder.glob("*.safetensors"):
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
                header.pop("__metadata__", None)
                for name, entry in header.items():
                    start, end = entry["data_offsets"]
                    digest = hashlib.sha256()
                    for index in range(SAMPLES):
                        place = start + (end - start) * index // SAMPLES
                        file.seek(8 + length + place)
                        digest.update(file.read(min(SAMPLE_BYTES, end - place)))
                    lines.append(f"{name} {entry['shape']} {entry['dtype']} {digest.hexdigest()}")
        except (OSError, ValueError, KeyError, MemoryError, OverflowError) as error:
            raise UserError(f"cannot read {path} ({error}): restore it from the original checkpoint") from error
    return sorted(lines)
