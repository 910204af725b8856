"""A model of a network's file and of all else that its base has: an ordinary folder, which every command takes."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

from apexflow.backbones import Backbone, Settings, write_settings
from apexflow.backbones.single_file import SingleFile
from apexflow.export.copying import copy_model
from apexflow.files import link_or_copy


def provenance(network: SingleFile, base: str) -> dict[str, Any]:
    """What the card of such a model says: which file it is made of, and around which base. The base's own card is of another."""
    with network.file.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"network": {"file": network.file.name, "sha256": digest, "base": base}}


def write_around(network: SingleFile, model: Path, backbone: Backbone, settings: Settings, folder: Path) -> None:
    """Write a copy of a model with the parts of a file into `folder`. The weights of the others become links where they can."""
    copy_model(model, backbone.kinds, folder, network.parts, link_or_copy)
    for name in network.parts:
        (folder / name).mkdir()
        shutil.copyfile(model / name / "config.json", folder / name / "config.json")
        network.write(folder / name)
    write_settings(folder, settings)
