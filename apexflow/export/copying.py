"""What is read of a model's folder, checked and brought into another."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from apexflow.backbones.folder import INDEX, OWN, components, copy_part
from apexflow.backbones.parts import check_whole
from apexflow.backbones.weights import weight_shapes


def copy_model(
    model: Path,
    kinds: Mapping[str, Any],
    to: Path,
    without: Collection[str] = (),
    copy: Callable[[str, str], object] = shutil.copy2,
) -> None:
    """Bring all that is read of a model, but for the parts `without`, into the folder `to`; `copy` does it with a part's file.

    kinds: the parts that its family must have. UserError for what lacks one, or holds a truncated file: it must not leave here.
    """
    check_whole(model, {name: kind for name, kind in kinds.items() if name not in without})
    parts = [name for name in components(model) if (model / name).is_dir() and name not in without]
    for name in parts:
        if list((model / name).glob("*.safetensors")):
            weight_shapes(model / name)
    for name in parts:
        copy_part(model / name, to / name, copy)
    for file in (path for pattern in (INDEX, *OWN, "LICENSE*") for path in model.glob(pattern) if path.is_file()):
        shutil.copyfile(file, to / file.name)
