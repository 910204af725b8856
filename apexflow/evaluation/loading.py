"""A scorer's network from a local folder in the transformers layout: no network access, nothing unpickled, nothing made up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from apexflow.backbones.parts import SAFELY
from apexflow.errors import UserError, first_line

T = TypeVar("T")


def load_network(kind: Any, folder: str | Path, unused: tuple[str, ...] = ()) -> Any:
    """`kind.from_pretrained` in float32. UserError for what is no such model, or lacks weights other than the `unused` ones.

    transformers itself would draw the weights that it does not find.
    """
    options = {**SAFELY, "use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    model, info = guarded(folder, lambda: kind.from_pretrained(folder, **options))
    lacking = [name for name in sorted(info["missing_keys"]) if not name.endswith(unused)]
    if lacking:
        raise UserError(
            f"{folder} lacks {len(lacking)} weights of a {kind.__name__} (such as {lacking[0]}): give the folder that "
            "docs/evaluation.md asks for"
        )
    return model


def guarded(folder: str | Path, read: Callable[[], T]) -> T:
    """What `read` gives; libraries raise many kinds for a folder that does not fit, and all mean the same to the user."""
    try:
        return read()
    except Exception as error:
        raise UserError(f"cannot load {folder}: {first_line(error)[:160]}") from error
