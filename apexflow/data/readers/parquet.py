"""Parquet with picture bytes and one or several caption columns, as FLUX-Reason-6M and the hub's own sets have it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from apexflow.data.captioned import Loaded, Sample
from apexflow.data.readers import files_of
from apexflow.errors import UserError


def claim(path: Path) -> list[Path]:
    """The parquet files of a folder, or the one named."""
    return files_of(path, ".parquet")


def samples(home: Path, files: list[Path], broken: dict[str, str]) -> Iterator[Sample]:
    """One record a row, read by row groups. UserError for a file without a column of picture bytes."""
    pyarrow = _library()
    for path in files:
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                schema, groups = file.schema_arrow, file.metadata.num_row_groups
                sizes = [file.metadata.row_group(group).num_rows for group in range(groups)]
        except (OSError, ValueError, pyarrow.ArrowException) as error:  # the second of names that are no text
            broken[str(path)] = f"corrupt or truncated ({str(error).splitlines()[0]})"
            continue
        picture, texts = _columns(path, schema)
        for group, size in enumerate(sizes):
            for row in range(size):
                load = partial(_load, path, group, row, picture, texts)
                yield Sample(f"{path.name}:{sum(sizes[:group]) + row}", load, path.parent)


def _columns(path: Path, schema: Any) -> tuple[str, tuple[str, ...]]:
    """The column of picture bytes, plain or in a struct with `bytes`, and the columns of text."""
    import pyarrow.types as types

    def holds_bytes(kind: Any) -> bool:
        if types.is_struct(kind):
            return any(kind.field(index).name == "bytes" for index in range(kind.num_fields))
        return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)

    def is_text(kind: Any) -> bool:
        kind = kind.value_type if types.is_dictionary(kind) else kind  # as pandas writes what it calls a category
        return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)

    texts = tuple(field.name for field in schema if is_text(field.type))
    pictures = [field.name for field in schema if holds_bytes(field.type)]
    if not pictures:
        raise UserError(f"{path} has no column of picture bytes; its columns: {', '.join(schema.names)}")
    picture = "image" if "image" in pictures else pictures[0]
    if twice := [name for name in (picture, *texts) if schema.names.count(name) > 1]:
        raise UserError(f"{path} has several columns {twice[0]!r}: rename all but one")
    return picture, texts


def _load(path: Path, group: int, row: int, picture: str, texts: tuple[str, ...]) -> Loaded:
    table = _row_group(path, group, (picture, *texts))
    content = table[picture][row].as_py()
    content = content.get("bytes") if isinstance(content, dict) else content
    # An empty cell is no caption at all: the fields that are filled decide.
    filled = {name: value for name in texts if (value := table[name][row].as_py()) is not None}
    return content, filled


@lru_cache(maxsize=2)
def _row_group(path: Path, group: int, columns: tuple[str, ...]) -> Any:
    pyarrow = _library()
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            return file.read_row_group(group, columns=list(columns))
    except pyarrow.ArrowException as error:
        raise ValueError(str(error).splitlines()[0]) from error


def _library() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("reading .parquet needs pyarrow: pip install 'apexflow[parquet]'") from error
    return pyarrow
