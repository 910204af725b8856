"""A set of the hub as a local path: only files of the kinds that are read, none that could run code."""

from __future__ import annotations

import re
from functools import cache
from glob import escape
from pathlib import Path, PurePosixPath

from apexflow.backbones.hub import why_not
from apexflow.data.pictures import PICTURES
from apexflow.errors import UserError

SCHEME = "hf://"
NAME = re.compile(r"hf://datasets/(?P<owner>[\w.-]+)/(?P<name>[\w.-]+)(@(?P<revision>[^/]+))?(/(?P<within>.+?))?/*")
READ = (*PICTURES, ".txt", ".json", ".jsonl", ".tar", ".parquet")


def located(source: str) -> Path:
    """Where a set lies that is named by its path, or as `hf://datasets/OWNER/NAME`, with `@REVISION` and `/FOLDER` behind it
    where that is meant. Only the latter touches the network; UserError where it cannot be fetched."""
    return _fetched(source) if source.startswith(SCHEME) else Path(source)


@cache  # asked for several times in a run, which must not see two revisions
def _fetched(source: str) -> Path:
    from huggingface_hub import snapshot_download

    found = NAME.fullmatch(source)
    within = PurePosixPath(found["within"] or "") if found else PurePosixPath("..")
    if found is None or ".." in within.parts:
        raise UserError(f"{source} is not a hub dataset: write hf://datasets/OWNER/NAME, or .../NAME@REVISION/FOLDER")
    hub_id, start = f"{found['owner']}/{found['name']}", escape(str(within)) if within.parts else ""
    below = [f"{start and start + '/'}*{ending}" for suffix in READ for ending in (suffix, suffix.upper())]
    patterns = [start, *below] if start else below
    try:
        home = Path(snapshot_download(hub_id, repo_type="dataset", revision=found["revision"], allow_patterns=patterns))
    except Exception as error:  # the hub raises many kinds
        reason = why_not(f"datasets/{hub_id}", error, "dataset")
        raise UserError(f"{source} cannot be downloaded from the hub: {reason}") from error
    if not (home / within).exists():
        raise UserError(f"{source}: the dataset has no readable {str(within)!r}")
    return home / within
