"""Which weights something was made with: short hashes of a module, and of the encoders of a model folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apexflow.backbones.folder import components, weight_paths
from apexflow.backbones.parts import load_part
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
READING = 2  # raised whenever prompts come to be encoded otherwise, so that older caches are not taken for new ones


def autoencoder_fingerprint(folder: Path) -> str:
    """Of the autoencoder of a diffusers folder."""
    return _hash(_weights(folder / "vae"))


def text_fingerprint(folder: Path, settings: Any) -> str:
    """Of everything that turns a prompt into an embedding: encoders, vocabularies, instruction and length limit."""
    parts = sorted(name for name in components(folder) if name.startswith(("text_encoder", "tokenizer")))
    texts = [_vocabulary(folder / name) for name in parts if name.startswith("tokenizer")]
    weights = [line for name in parts if name.startswith("text_encoder") for line in _weights(folder / name)]
    return _hash([*weights, *texts, f"{settings.instruction} {settings.max_tokens} {READING}"])


def _vocabulary(part: Path) -> str:
    """Of all that a tokenizer says, but for how it was last called. One that is saved again has `tokenizer.json` alone."""
    whole = part / "tokenizer.json"
    try:
        said = json.loads(whole.read_bytes() if whole.is_file() else _converted(part))
        said = {key: value for key, value in said.items() if key not in ("padding", "truncation")}
    except (ValueError, AttributeError) as error:
        raise UserError(f"cannot read {whole} ({error}): restore it from the original checkpoint") from error
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _converted(part: Path) -> str:
    """What `tokenizer.json` would say where there are older files alone."""
    from transformers import AutoTokenizer

    return load_part(part.parent, part.name, AutoTokenizer, torch.device("cpu")).backend_tokenizer.to_str()


def _hash(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _weights(folder: Path) -> list[str]:
    """Name, shape, dtype and some bytes of every tensor, sorted, however the tensors are spread over files."""
    lines = []
    for path in weight_paths(folder):
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
