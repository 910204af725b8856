"""The lists that are written from the code: every field is explained where it stands, and a type reads as YAML has it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import reference
import tables

from apexflow.objectives import objectives
from apexflow.objectives.times import TimeLaw
from apexflow.training.config import Data, Optimizer, Preview, Recipe, Tuning


@dataclass(frozen=True)
class Explained:
    """What it is for.

    one, other: of both; either: or none.
    kind: "a" or
        "b | c". law: when.
    """

    one: float
    other: Annotated[int, Field(ge=1, le=2**16)] | None = None
    kind: Literal["a", "b | c"] = "a"
    law: tuple[Annotated[float, Field(gt=0)], ...] = (0.5,)


@dataclass(frozen=True)
class Silent:
    """What it is for.

    one: said.
    """

    one: int = 1
    other: int = 2


@pytest.mark.parametrize("kind", [Recipe, Data, Tuning, Optimizer, Preview, TimeLaw, *objectives().values()])
def test_every_field_of_a_recipe_is_explained_where_it_stands(kind: type) -> None:
    assert reference.meanings(kind) and reference.lead(kind)


def test_a_field_that_is_not_explained_is_named() -> None:
    with pytest.raises(LookupError, match=r"^the docstring of Silent does not explain other$"):
        reference.keys(Silent)


def test_a_field_is_told_with_its_type_its_range_and_its_default() -> None:
    rows = reference.keys(Explained).splitlines()[2:]
    assert rows == [
        "| `one` | number | must be given | of both; either: or none |",
        "| `other` | whole number (at least 1, at most 2^16) or `null` |  | of both; either: or none |",
        r"| `kind` | `a` or `b \| c` | `a` | " + r'"a" or "b \| c" |',
        "| `law` | list of numbers (above 0) | `[0.5]` | when |",
    ]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (1e-4, "0.0001"),
        (True, "true"),
        ((0.9, 0.95), "[0.9, 0.95]"),
        (TimeLaw(), "{}"),
        (TimeLaw(kind="uniform", shift=3.0), "{kind: uniform, shift: 3}"),
    ],
)
def test_a_default_is_written_as_yaml(value: Any, said: str) -> None:
    assert reference.plain(value) == said


def test_a_list_that_is_not_current_is_written_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tables.LISTS, "recipe", lambda: "every key")
    assert (
        tables.fill("a\n<!-- recipe -->\nold\n<!-- /recipe -->\nb")
        == "a\n<!-- recipe -->\nevery key\n<!-- /recipe -->\nb"
    )
