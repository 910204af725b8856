"""One self-contained HTML page a run: what was trained, its curves, its samples over time and its scores."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from apexflow.errors import UserError
from apexflow.files import replacing
from apexflow.reporting import curves, pictures
from apexflow.reporting.markup import duration, is_number, number, section, tag, text
from apexflow.reporting.style import CSS
from apexflow.reporting.tables import data_section, recipe_section, score_section
from apexflow.training.journal import COST, METRICS, SOURCES, read_metrics

NAME = "report.html"
FINAL_STEPS = 50  # the final loss is the mean over this many
FIRST_CURVES, LAST_CURVES = ("loss",), ("grad_norm", "learning_rate")
NO_CURVE = ("step", "seconds", "skipped")
TITLES = {"loss": "loss (total)", "grad_norm": "gradient norm", "learning_rate": "learning rate"}
LOOKS = ("brightness", "contrast", "saturation", "diversity")  # of previews; measured too seldom for a running mean
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # the page could load nothing even if it asked
Line = Mapping[str, Any]
Fact = tuple[str, str, str]  # what, value, note


def write_report(
    folder: Path,
    scores: Mapping[str, Any] | None = None,
    grids: Sequence[tuple[str, Path]] = (),
    title: str | None = None,
    prompts: Sequence[str] = (),
) -> Path:
    """Write `folder/report.html`, whole or not at all; its path.

    `folder` is a run's (recipe.json, metrics.jsonl, data.json, cost.json, previews/); what it lacks is left out. `scores` maps
    a name such as "student, one step" to its numbers: overall, tasks {name: number}, strict and any other, standard errors
    under `key_se`. `grids` are (caption, picture file), all of the same `prompts` in their order. Raises UserError where the
    folder is no run, a file in it or a grid cannot be read, or the page cannot be written.
    """
    folder = Path(folder)
    recipe, lines = _read_run(folder)
    name, cost = folder.resolve().name, _beside(folder / COST)
    heading = title or (f"{recipe['method']} on {recipe['model']}" if {"method", "model"} <= recipe.keys() else name)
    body = [
        _header(heading, name, _facts(recipe, lines) + _spent(cost)),
        score_section(scores),
        _comparison(grids, prompts),
        _curves(lines),
        _samples(folder, recipe),
        data_section(_sources(folder), _last(lines, "step"), recipe.get("batch")),
        recipe_section(recipe),
        tag("footer", "Written by apexflow. Everything on this page is inside this file."),
    ]
    return write(folder / NAME, page(heading, "".join(body)))


def _read_run(folder: Path) -> tuple[dict[str, Any], list[Line]]:
    """A run's recipe ({} where it has none) and the lines of its metrics, in order of steps."""
    recipe_file = folder / "recipe.json"
    if not recipe_file.is_file() and not (folder / METRICS).is_file():
        raise UserError(
            f"{folder} is not a run (no recipe.json, no metrics.jsonl): give the output folder of a training run"
        )
    recipe = _whole(recipe_file, lambda: json.loads(recipe_file.read_text()) if recipe_file.is_file() else {})
    lines = _whole(folder / METRICS, lambda: read_metrics(folder))
    if not isinstance(recipe, dict):
        raise UserError(f"{recipe_file} is damaged: it must hold a mapping of keys to values")
    return recipe, sorted((line for line in lines if is_number(line.get("step"))), key=lambda line: line["step"])


def _sources(folder: Path) -> list[Mapping[str, Any]]:
    """What a run was trained on, a mapping for each set; nothing where it does not say."""
    sources = _beside(folder / SOURCES).get("sources")
    return [one for one in sources if isinstance(one, dict)] if isinstance(sources, list) else []


def _beside(path: Path) -> Mapping[str, Any]:
    """What a file of a run says; nothing where it is not there, or says something else than a mapping."""
    read = _whole(path, lambda: json.loads(path.read_text())) if path.is_file() else {}
    return read if isinstance(read, dict) else {}


def _whole(path: Path, read: Callable[[], Any]) -> Any:
    """What `read` returns; UserError names the file where it cannot be read or is no JSON."""
    try:
        return read()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): repair or remove it") from error


def _header(heading: str, name: str, told: Sequence[Fact]) -> str:
    facts = "".join(
        tag("div", tag("dt", text(fact)) + tag("dd", text(value) + (tag("small", text(note)) if note else "")))
        for fact, value, note in told
    )
    shown = tag("dl", facts, class_="facts") if facts else ""
    return tag("header", tag("p", f"Training run {text(name)}") + tag("h1", text(heading)) + shown)


def _facts(recipe: Mapping[str, Any], lines: Sequence[Line]) -> list[Fact]:
    """Of the headline, what recipe and metrics say; only what is known."""
    facts = [(what, str(recipe[key]), "") for what, key in (("Method", "method"), ("Model", "model")) if key in recipe]
    if not lines:
        return facts
    done, planned = lines[-1]["step"], recipe.get("steps")
    short = is_number(planned) and done < planned
    facts.append(("Steps", f"{done:,}", f"of {planned:,} planned" if short else ""))
    seconds = _last(lines, "seconds")
    if seconds is not None:
        facts.append(("Time", duration(seconds), f"{number(seconds / max(done, 1), 2)} s a step"))
    losses = [value for _, value in _curve(lines, "loss").finite][-FINAL_STEPS:]
    if losses:
        facts.append(("Final loss", number(sum(losses) / len(losses)), f"mean of the last {len(losses)} steps"))
    skipped = sum(1 for line in lines if line.get("skipped"))
    facts.append(("Skipped steps", f"{skipped:,}", "loss or gradient not finite" if skipped else ""))
    return facts


def _spent(cost: Mapping[str, Any]) -> list[Fact]:
    """Of the headline, what the run has cost; only what is known."""
    facts, device = [], cost.get("device")
    known = {key: value for key, value in cost.items() if is_number(value) and math.isfinite(value)}
    if "rows" in known:
        facts.append(("Rows seen", number(known["rows"]), "pictures or prompts, each as often as it was seen"))
    if isinstance(device, str):
        several = known.get("processes", 1) > 1
        hours = f"{known['device_hours']:,.1f} hours of one" if several and "device_hours" in known else ""
        facts.append(("Device", f"{known['processes']:,} x {device}" if several else device, hours))
    if "peak_gib" in known:
        facts.append(("Memory", f"{known['peak_gib']:.1f} GiB", "the most that one process held"))
    return facts


def _last(lines: Sequence[Line], key: str) -> float | None:
    finite = _curve(lines, key).finite
    return finite[-1][1] if finite else None


def _curve(lines: Sequence[Line], key: str) -> curves.Curve:
    """The series of a key; null, which strict JSON writers put for NaN, counts as not finite."""
    values = ((line["step"], line[key]) for line in lines if key in line)
    kept = [(step, float("nan") if value is None else value) for step, value in values]
    points = [(step, float(value)) for step, value in kept if is_number(value)]
    return curves.Curve(TITLES.get(key, key), points, smooth=key not in ("learning_rate", *LOOKS))


def _curves(lines: Sequence[Line]) -> str:
    """A chart for each loss term, then the gradient norm and the learning rate."""
    found = dict.fromkeys(key for line in lines for key in line if key not in NO_CURVE)
    middle = [key for key in found if key not in FIRST_CURVES + LAST_CURVES]
    keys = [key for key in (*FIRST_CURVES, *middle, *LAST_CURVES) if key in found]
    if not keys:
        return ""
    note = "Over steps: single values faint, their running mean in full colour. Red strokes: a value was not finite."
    return section("Training curves", _charts(lines, keys), note)


def _charts(lines: Sequence[Line], keys: Sequence[str]) -> str:
    first, last = lines[0]["step"], lines[-1]["step"]
    span = (0 if first <= 0.05 * last else first, last)
    return tag("div", "".join(curves.figure(_curve(lines, key), span) for key in keys), class_="charts")


def _samples(folder: Path, recipe: Mapping[str, Any]) -> str:
    """The previews in order. The last has a row of its own, of an even number the first too: two columns, no gap."""
    found = pictures.previews(folder / "previews")
    alone = {len(found) - 1} | ({0} if len(found) % 2 == 0 else set())
    figures = [
        pictures.figure(picture, f"step {step:,}", "grid wide" if index in alone else "grid")
        for index, (step, picture) in enumerate(found)
    ]
    shown = _captions(folder / "previews") + tag("div", "".join(figures), class_="pictures") if figures else ""
    return section("Samples over time", shown, _samples_note(recipe.get("preview"))) + _looks(folder / "previews")


def _captions(folder: Path) -> str:
    """The captions of the newest preview that says them, under their numbers in the grids."""
    said = [line["captions"] for line in pictures.beside_previews(folder) if isinstance(line.get("captions"), list)]
    return _listed(said[-1]) if said else ""


def _listed(captions: Sequence[str]) -> str:
    return tag("ol", "".join(tag("li", text(caption)) for caption in captions), class_="captions") if captions else ""


def _looks(folder: Path) -> str:
    """What the previews look like over the steps, where there are two at least."""
    lines = pictures.beside_previews(folder)
    keys = [key for key in LOOKS if any(key in line for line in lines)]
    if len(lines) < 2 or not keys:
        return ""
    note = "Means over the sample pictures, from 0 to 1. Diversity: how far apart two pictures of one caption are."
    return section("What the samples look like", _charts(lines, keys), note)


def _samples_note(preview: Any) -> str:
    note = "The same prompts and the same noise each time, from the averaged weights"
    if not isinstance(preview, Mapping) or not {"steps", "guidance"} <= preview.keys():
        return f"{note}."
    steps = "one sampling step" if preview["steps"] == 1 else f"{preview['steps']} sampling steps"
    guided = f"guidance {preview['guidance']}" if preview["guidance"] != 1 else "no guidance"
    return f"{note}: {steps}, {guided}."


def _comparison(grids: Sequence[tuple[str, Path]], prompts: Sequence[str]) -> str:
    figures = "".join(pictures.figure(_grid(caption, Path(path)), caption) for caption, path in grids)
    note = "The same prompts and the same noise in every grid, row after row." if prompts else ""
    return section("Side by side", tag("div", figures, class_="stack") + _listed(prompts) if figures else "", note)


def _grid(caption: str, path: Path) -> str:
    try:
        return pictures.picture_tag(path, caption)
    except pictures.UNREADABLE as error:
        raise UserError(f"the grid {path} for the report cannot be read as a picture: check the file") from error


def page(heading: str, body: str) -> str:
    """A whole page of markup that loads nothing from outside."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{text(POLICY)}">'
        f"<title>{text(heading)}</title><style>{CSS}</style>"
    )
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body><main>{body}</main></body></html>\n'


def write(path: Path, markup: str) -> Path:
    """Write a page, whole or not at all; its path. UserError where it cannot be written."""
    with replacing(path) as partial:
        partial.write_bytes(markup.encode("utf-8", "replace"))  # a file name may hold bytes that are no text
    return path
