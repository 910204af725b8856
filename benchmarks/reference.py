"""What `docs/recipe.md` and `docs/models.md` list: every key of a recipe, and the checkpoints that are known by name.

Nothing of it is typed there: types, ranges and defaults are those of the dataclasses, meanings their docstrings'. A field that
its docstring does not explain, as `name: what it means.`, is an error. `tables.py` writes both files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import diffusers

from apexflow.backbones import BUILT_IN, Backbone, built_in
from apexflow.backbones.presets import load_shapes, presets
from apexflow.comparison.tables import table
from apexflow.objectives import objectives
from apexflow.objectives.times import TimeLaw
from apexflow.training.config import Recipe

BOUNDS = {"ge": "at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}"}
NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false", dict: "section"}


def meanings(kind: type) -> dict[str, str]:
    """What the docstring of a dataclass says of its fields. Several may share a meaning: `one, other: of both.`

    LookupError for a field of which it says nothing.
    """
    text, names = " ".join((kind.__doc__ or "").split()), "|".join(field.name for field in fields(kind))
    parts = re.split(rf"(?:^|(?<=\.\s))((?:{names})(?:, (?:{names}))*): ", text)
    told: dict[str, str] = {}
    for keys, meaning in zip(parts[1::2], parts[2::2], strict=True):
        told |= dict.fromkeys(keys.split(", "), meaning.strip().removesuffix("."))
    if missing := [field.name for field in fields(kind) if not told.get(field.name)]:
        raise LookupError(f"the docstring of {kind.__name__} does not explain {', '.join(missing)}")
    return told


def lead(kind: type) -> str:
    """What the docstring says before the fields: its first paragraph."""
    return " ".join((kind.__doc__ or "").split("\n\n")[0].split())


def type_name(kind: Any) -> str:
    """A type as a writer of YAML knows it, with its range."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Annotated:
        within = ", ".join(bounds(inside[1:]))
        return type_name(inside[0]) + f" ({within})" * bool(within)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inside)
    if origin in (Union, UnionType):
        return " or ".join("`null`" if one is NoneType else type_name(one) for one in inside)
    if origin is tuple:
        one, bracket, within = type_name(inside[0]).partition(" (")
        return f"list of {'' if Ellipsis in inside else f'{len(inside)} '}{one}s{bracket}{within}"
    if is_dataclass(kind):
        return "section"
    return NAMES[origin or kind]


def bounds(constraints: tuple[Any, ...]) -> Iterator[str]:
    """The range that pydantic is told of."""
    for constraint in constraints:
        for one in getattr(constraint, "metadata", []):
            yield from (said.format(number(getattr(one, key))) for key, said in BOUNDS.items() if hasattr(one, key))


def number(value: float) -> str:
    """A bound as it is read best: 2^63 and not nineteen digits."""
    power = int(value).bit_length() - 1
    return f"2^{power}" if value == 2**power and power > 9 else f"{value:g}"


def default_of(field: Field[Any]) -> str:
    """A default as YAML has it."""
    if field.default is MISSING and field.default_factory is MISSING:
        return "must be given"
    value = field.default if field.default_factory is MISSING else field.default_factory()
    said = "" if value in (None, (), {}) else plain(value)
    return "" if said in ("", "{}") else f"`{said}`"


def plain(value: Any) -> str:
    """A value as YAML has it; of a section what differs from the section's own defaults."""
    if is_dataclass(value) and not isinstance(value, type):
        own = {field.name: getattr(value, field.name) for field in fields(value)}
        given = {name: one for name, one in own.items() if one != getattr(type(value)(), name)}
        return "{" + ", ".join(f"{name}: {plain(one)}" for name, one in given.items()) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(plain, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def keys(kind: type) -> str:
    """The table of a dataclass: a row a field."""
    told, hints = meanings(kind), get_type_hints(kind, include_extras=True)
    rows = [["key", "type", "default", "meaning"]]
    for field in fields(kind):
        row = [f"`{field.name}`", type_name(hints[field.name]), default_of(field), told[field.name]]
        rows.append([cell.replace("|", r"\|") for cell in row])
    return table(rows)


def recipe() -> str:
    """Every key of a recipe: its own, and those of its sections."""
    found = [f"## At the top\n\n{lead(Recipe)}\n\n{keys(Recipe)}"]
    sections = {field.name: field.default_factory for field in fields(Recipe) if is_dataclass(field.default_factory)}
    found += [f"## `{name}`\n\n{lead(kind)}\n\n{keys(kind)}" for name, kind in sections.items()]  # type: ignore[arg-type]
    return "\n\n".join(found)


def methods() -> str:
    """The fields of every method, and of the laws of times that they have."""
    found = [f"### `{name}`\n\n{kind.citation}. {lead(kind)}\n\n{keys(kind)}" for name, kind in objectives().items()]
    return "\n\n".join([*found, f"### A law of times\n\n{lead(TimeLaw)}\n\n{keys(TimeLaw)}"])


def models() -> str:
    """The checkpoints whose configs ship and the models that do: what is known of them without a download."""
    rows = [["model", "family", "parameters", "side", "steps", "guidance", "LoRA file", "stock scheduler"]]
    for path, ids in by_file().items():
        rows.append([ids, *facts(load_shapes(path))])
    return table(rows)


def by_file() -> dict[str, str]:
    """A name that is loaded, and all names of what has the same configs."""
    ids: dict[Path, list[str]] = {name: [] for name in dict.fromkeys(presets().values())}
    for name, path in presets().items():
        ids[path].append(name)
    shipped = {name: f"`{name}`" for name in built_in() if (BUILT_IN / name).is_dir()}
    return {names[0]: "<br>".join(f"`{name}`" for name in names) for names in ids.values()} | shipped


def facts(backbone: Backbone) -> list[str]:
    """The row of a model, but for its name."""
    settings, size = backbone.settings, sum(weight.numel() for weight in backbone.transformer.parameters())
    scale = backbone.embedded_guidance if backbone.guidance_input(1, backbone.device) is not None else None
    guidance = f"{settings.guidance:g}" if scale is None else f"{scale:g}, as an input"
    told = f"{size / 1e9:.2f} billion" if size > 1e8 else f"{size / 1e6:.1f} million"
    lora = hasattr(getattr(diffusers, backbone.pipeline), "load_lora_weights")
    answers = ["yes" if true else "no" for true in (lora, backbone.flow_scheduler)]
    return [backbone.family, told, str(backbone.default_size), str(settings.steps), guidance, *answers]


LISTS: dict[str, Callable[[], str]] = {"recipe": recipe, "methods": methods, "models": models}
