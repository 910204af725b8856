"""Tables of the report: scores, a row a model, and the recipe, a line a key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from apexflow.reporting.markup import NOTHING, is_number, label, minus, number, section, setting, table, tag, text

Scores = Mapping[str, Any]
Column = tuple[str, str]  # ("", key) for a number of the scores themselves, (group, key) for one of a mapping in them
MAIN_GROUP = "tasks"


def score_section(scores: Mapping[str, Scores] | None) -> str:
    """A table of overall, tasks, strict, held-out and all other numbers; one more for any other mapping.

    A number under `key_se` (for tasks: in `tasks_se`, or beside them) is the standard error of `key`. A mapping
    with an `overall` of its own (held-out prompts, say) counts as that number.
    """
    rows = {name: _numbers(result) for name, result in (scores or {}).items()}
    columns = _columns(rows.values())
    groups = list(dict.fromkeys(group for group, _ in columns if group not in ("", MAIN_GROUP)))
    main = _score_table([c for c in columns if c[0] in ("", MAIN_GROUP)], rows)
    others = [tag("h3", text(label(g))) + _score_table([c for c in columns if c[0] == g], rows) for g in groups]
    spread = any(key.endswith("_se") for row in rows.values() for _, key in row)
    return section("Scores", main + "".join(others), "± is one standard error." if spread else "")


def _numbers(result: Scores) -> dict[Column, float]:
    """Every number in a result by column; standard errors under their own `_se` keys."""
    found: dict[Column, float] = {}
    for key, value in result.items():
        if not isinstance(value, Mapping):
            found |= _number("", key, value)
        elif "overall" in value:
            found |= _number("", key, value["overall"]) | _number("", f"{key}_se", value.get("overall_se"))
        elif key.endswith("_se"):
            for inner, error in value.items():
                found |= _number(key.removesuffix("_se"), f"{inner}_se", error)
        else:
            for inner, inner_value in value.items():
                found |= _number(key, inner, inner_value)
    return found


def _number(group: str, key: str, value: Any) -> dict[Column, float]:
    return {(group, str(key)): value} if is_number(value) else {}


def _columns(rows: Iterable[Mapping[Column, float]]) -> list[Column]:
    """Columns of all rows in the order of the page: overall, tasks, strict, held-out, the rest as they come."""
    seen = dict.fromkeys(column for row in rows for column in row if not column[1].endswith("_se"))
    return sorted(seen, key=_rank)


def _rank(column: Column) -> int:
    group, key = column
    if group:
        return 1 if group == MAIN_GROUP else 5
    return {"overall": 0, "strict": 2}.get(key, 3 if key.startswith("held") else 4)


def _score_table(columns: list[Column], rows: Mapping[str, Mapping[Column, float]]) -> str:
    if not columns:
        return ""
    heads = "".join(
        tag("th", text(label(key)), scope="col", class_="main" if (group, key) == ("", "overall") else None)
        for group, key in columns
    )
    return table(
        "scores", heads, ((name, "".join(_cell(row, column) for column in columns)) for name, row in rows.items())
    )


def _cell(row: Mapping[Column, float], column: Column) -> str:
    group, key = column
    value, error = row.get(column), row.get((group, f"{key}_se"))
    spread = tag("small", f"±{number(error, 2)}") if value is not None and error is not None else ""
    return tag("td", score(value) + spread, class_="main" if column == ("", "overall") else None)


def score(value: float | None) -> str:
    """Fractions with three decimals, so that a column lines up; whole numbers in full; a dash for none."""
    if value is not None and not isinstance(value, Integral) and (value == 0 or 0.0005 <= abs(value) <= 1):
        return minus(f"{value:.3f}")
    return number(value) if value is not None else NOTHING


def data_section(sources: Sequence[Mapping[str, Any]], steps: float | None, batch: Any) -> str:
    """A table of the sets that a run was trained on: rows, share of the run's rows, and how often each row was seen by then."""
    heads = "".join(tag("th", text(name), scope="col") for name in ("Rows", "Share", "Times seen"))
    rows = [_source(source, steps, batch) for source in sources]
    return section("Data", table("data", heads, rows) if rows else "")


def _source(source: Mapping[str, Any], steps: float | None, batch: Any) -> tuple[str, str]:
    rows, share = (value if is_number(value := source.get(key)) else None for key in ("rows", "share"))
    known = rows and share is not None and steps is not None and is_number(batch)
    seen = number(steps * batch * share / rows, 2) if known else NOTHING  # type: ignore[operator]
    name = str(source.get("source")) + ("" if source.get("pictures", True) else " (prompts alone)")
    cells = (number(rows), NOTHING if share is None else minus(f"{share:.1%}"), seen)
    return name, "".join(tag("td", cell) for cell in cells)


def recipe_section(recipe: Mapping[str, Any]) -> str:
    """The recipe, nested keys flattened to the dotted names that overrides use, a small table for each section."""
    plain = {key: value for key, value in recipe.items() if not (isinstance(value, Mapping) and value)}
    nested = {key: flatten(value, f"{key}.") for key, value in recipe.items() if key not in plain}
    tables = [_settings("run", plain)] * bool(plain) + [_settings(key, rows) for key, rows in nested.items()]
    return section("Configuration", tag("div", "".join(tables), class_="settings") if tables else "")


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`; empty mappings stay values."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def _settings(title: str, rows: Mapping[str, Any]) -> str:
    lines = "".join(
        tag("tr", tag("th", text(key), scope="row") + tag("td", text(setting(value)))) for key, value in rows.items()
    )
    return tag("table", tag("caption", text(label(title))) + tag("tbody", lines))
