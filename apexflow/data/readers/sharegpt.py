"""ShareGPT-4o-Image: a JSON list of {input_prompt, output_image}, whose pictures lie in tars beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from apexflow.data.captioned import Loaded, Sample
from apexflow.data.readers import TEXT, read_within
from apexflow.data.readers.tars import MANIFEST, Member, members


def claim(path: Path) -> list[Path]:
    """The manifest, named itself or in a folder, and the tars beside it."""
    manifest = path if path.name == MANIFEST else path / MANIFEST
    return [manifest, *sorted(manifest.parent.glob("*.tar"))] if manifest.is_file() else []


def samples(home: Path, files: list[Path], broken: dict[str, str]) -> Iterator[Sample]:
    """One record an entry of the manifest, whose picture is looked for in the tars, then as a file."""
    manifest, *tars = files
    try:
        rows = json.loads(manifest.read_text(encoding=TEXT))
        prompts = [(str(row["output_image"]), {"input_prompt": row["input_prompt"]}) for row in rows]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        broken[str(manifest)] = f"not a JSON list with input_prompt and output_image ({error})"
        return
    found: dict[str, Member] = {member.name: member for tar in tars for member in members(tar, broken)}
    for name, fields in prompts:
        yield Sample(name, partial(_load, found.get(name), home, manifest.parent / name, fields))


def _load(member: Member | None, home: Path, path: Path, fields: Mapping[str, Any]) -> Loaded:
    return (read_within(home, path) if member is None else member.read()), fields
