"""The report page: whole in one file, valid, complete, and calm about what a run lacks."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from apexflow.errors import UserError
from apexflow.files import write_json
from apexflow.reporting import curves
from apexflow.reporting.pictures import spaced
from apexflow.reporting.report import write_report

VOID = {"meta", "img", "br", "hr", "input", "link", "source"}
LOADING = ("src", "href", "xlink:href", "srcset", "poster", "data", "action")
RECIPE = {
    "output": "runs/x",
    "method": "apex",
    "model": "mini-teacher",
    "steps": 400,
    "objective": {"pairing": "rows", "times": {"kind": "uniform"}},
    "optimizer": {"learning_rate": 3e-4, "betas": [0.9, 0.95]},
    "preview": {"every": 100, "steps": 1, "guidance": 1.0, "count": 16},
    "minutes": None,
}
SCORES = {
    "teacher, 50 steps, guided": {
        "overall": 0.8671,
        "overall_se": 0.0061,
        "tasks": {"single_object": 0.995, "position": 0.712},
        "tasks_se": {"position": 0.022},
        "strict": 0.801,
        "strict_tasks": {"single_object": 0.987},
        "held_out": {"overall": 0.64, "overall_se": 0.03, "tasks": {"colors": 0.7}},
        "pictures": 2212,
    },
    "student, 1 step": {"overall": 0.8712, "tasks": {"single_object": 0.991}, "strict": math.nan, "latency": 0.0812},
}


class Page(HTMLParser):
    """Parses a page; fails on tags that do not close in order, keeps elements and text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def pictures(self) -> list[Image.Image]:
        coded = [str(image["src"]).partition(";base64,")[2] for image in self.all("img")]
        return [Image.open(io.BytesIO(base64.b64decode(code))) for code in coded]


def metrics(count: int, **bad: dict[int, Any]) -> list[dict[str, Any]]:
    """A run's lines; `bad` maps a key to the values at some steps."""
    rng = np.random.default_rng(0)
    lines = []
    for step in range(1, count + 1):
        noise = float(rng.lognormal(0, 0.3))
        line: dict[str, Any] = {
            "step": step,
            "path": 0.4 * noise,
            "adv": 0.2 * noise,
            "shift": -0.1 * noise,
            "loss": noise,
        }
        line |= {"grad_norm": 300 * noise / step, "learning_rate": 3e-4, "skipped": 0.0, "seconds": 1.5 * step}
        lines.append(line | {key: values[step] for key, values in bad.items() if step in values})
    return lines


def make_run(folder: Path, lines: list[dict[str, Any]] | None = None, previews: int = 4) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    lines = metrics(400) if lines is None else lines
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for index in range(previews):
        picture((64, 32), index).save(make(folder / "previews") / f"step-{100 * (index + 1):07d}.png")
    return folder


def make(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def picture(size: tuple[int, int], value: int = 0) -> Image.Image:
    return Image.new("RGB", size, (value, 2 * value % 256, 90))


def test_page_is_valid_and_loads_nothing(tmp_path: Path) -> None:
    picture((40, 40)).save(tmp_path / "grid.png")
    grids = [("student & teacher", tmp_path / "grid.png")]
    path = write_report(make_run(tmp_path / "run"), SCORES, grids, prompts=["a <red> star", "a ring"])
    page = Page(path)
    assert "a <red> star" in page.text and "a ring" in page.text
    assert path == tmp_path / "run" / "report.html"
    assert page.source.startswith("<!DOCTYPE html>")
    assert {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements} == set()
    for _, attributes in page.elements:
        assert all(str(attributes[key]).startswith("data:image/") for key in LOADING if key in attributes)
    assert "http" not in re.sub(r"http-equiv", "", page.source)
    assert not re.search(r"url\(|@import", page.source)
    assert not re.search(r"\b(nan|inf|None)\b", page.text)
    assert page.all("meta")[1]["name"] == "viewport" and "prefers-color-scheme: dark" in page.source
    assert sorted(p.name for p in path.parent.iterdir()) == ["metrics.jsonl", "previews", "recipe.json", "report.html"]


def test_headline_and_configuration(tmp_path: Path) -> None:
    text = Page(write_report(make_run(tmp_path / "run", metrics(300)))).text
    for shown in ("apex on mini-teacher", "300", "of 400 planned", "7 min 30 s", "1.5 s a step", "Final loss"):
        assert shown in text
    for shown in (
        "objective.times.kind",
        "uniform",
        "optimizer.betas",
        "0.9, 0.95",
        "minutes",
        "none",
        "one sampling step",
    ):
        assert shown in text


def test_headline_tells_what_a_run_has_cost(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", metrics(5))
    cost = {"rows": 12800, "device_hours": 51.26, "peak_gib": 55.13, "processes": 16, "device": "NVIDIA H200"}
    (folder / "cost.json").write_text(json.dumps(cost))
    text = Page(write_report(folder)).text
    for shown in ("Rows seen 12,800", "16 x NVIDIA H200 51.3 hours of one", "55.1 GiB"):
        assert shown in " ".join(text.split())
    for odd in ({"device": "CPU", "rows": "many"}, {"device": "CPU", "peak_gib": float("inf")}, ["CPU"]):
        (folder / "cost.json").write_text(json.dumps(odd))
        text = Page(write_report(folder)).text
        assert "Rows seen" not in text and "GiB" not in text and ("CPU" in text) == isinstance(odd, dict)


def test_every_term_has_a_curve(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "run")))
    spoken = [str(svg["aria-label"]) for svg in page.all("svg")]
    names = ["loss (total)", "path", "adv", "shift", "gradient norm", "learning rate"]
    assert [label.partition(" over steps")[0] for label in spoken] == names
    assert page.text.count("log scale") == 1  # the gradient norm alone spans more than two decades


def test_previews_are_embedded_in_order(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "run", previews=5)))
    assert [shown.convert("RGB").getpixel((0, 0)) for shown in page.pictures()] == [(i, 2 * i, 90) for i in range(5)]
    assert re.findall(r"^step ([\d,]+)$", page.text, re.M) == ["100", "200", "300", "400", "500"]


def test_what_previews_look_like_is_charted(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", previews=3)
    assert "What the samples look like" not in Page(write_report(folder)).text
    for step, brightness in ((100, 0.5), (200, 0.4), (300, 0.25)):
        write_json(folder / "previews" / f"step-{step:07d}.json", {"brightness": brightness, "contrast": 0.1})
    (folder / "previews" / "step-0000400.json").write_text('{"brightness": ')  # cut off by a crash
    page = Page(write_report(folder))
    every = [str(svg["aria-label"]) for svg in page.all("svg")]
    spoken = [label for label in every if label.startswith(("brightness", "contrast", "diversity"))]
    assert spoken == [
        "brightness over steps: from 0.500 to 0.250, lowest 0.250, highest 0.500",
        "contrast over steps: from 0.100 to 0.100, lowest 0.100, highest 0.100",
    ]


def test_many_previews_are_spaced_from_first_to_last(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "run", previews=40)))
    steps = [int(step.replace(",", "")) for step in re.findall(r"^step ([\d,]+)$", page.text, re.M)]
    assert len(steps) == 12 and (steps[0], steps[-1]) == (100, 4000)
    assert set(np.diff(steps)) <= {300, 400}
    assert spaced([1, 2, 3], 12) == [1, 2, 3]


def test_wide_and_foreign_pictures(tmp_path: Path) -> None:
    wide, bitmap = tmp_path / "wide.png", tmp_path / "grid.bmp"
    picture((3000, 500)).save(wide)
    picture((30, 30)).save(bitmap)
    page = Page(write_report(make_run(tmp_path / "run", previews=0), grids=[("wide", wide), ("bitmap", bitmap)]))
    assert [(p.format, p.size) for p in page.pictures()] == [("PNG", (1200, 200)), ("PNG", (30, 30))]


def test_values_that_are_not_finite_are_marked(tmp_path: Path) -> None:
    bad = {7: math.nan, 8: math.inf, 9: None}
    lines = metrics(400, loss=bad, skipped={7: 1.0, 8: 1.0, 9: 1.0}, path=dict.fromkeys(range(1, 401), math.nan))
    page = Page(write_report(make_run(tmp_path / "run", lines)))
    assert "3 not finite" in page.text and "400 not finite" in page.text
    assert sum(path.get("class") == "missing" for path in page.all("path")) == 1
    assert re.search(r"Skipped steps\n3\n", page.text)
    for path in page.all("path"):
        assert "nan" not in str(path["d"]) and "inf" not in str(path["d"])


def test_long_runs_are_thinned_and_keep_their_spikes(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "run", metrics(20000, loss={12345: 40.0}))))
    counts = [
        len(re.findall("[ML]", str(path["d"]))) for path in page.all("path") if path.get("class") in ("raw", "line")
    ]
    assert counts and max(counts) <= curves.MOST_POINTS
    assert (12345, 40.0) in curves.thinned([(s, 40.0 if s == 12345 else 1.0 + s % 7) for s in range(20000)])
    assert len(page.source) < 400_000


def test_scores_are_shown(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "run"), SCORES))
    head = re.findall(r'<th scope="col"[^>]*>([^<]*)</th>', page.source)
    main = ["Overall", "Single object", "Position", "Strict", "Held out", "Pictures", "Latency"]
    assert head == [*main, "Single object"]  # the second table is strict_tasks
    for shown in ("0.867", "±0.0061", "0.712", "±0.022", "0.640", "±0.03", "2,212", "0.871", "0.081", "0.987"):
        assert shown in page.text
    assert "teacher, 50 steps, guided" in page.text and "–" in page.text


def test_everything_is_escaped(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "<b>run", metrics(60, **{"<i>": {1: 1.0, 2: 2.0}}))
    (folder / "recipe.json").write_text(json.dumps({"model": "<u>&\"'"}))
    grid = tmp_path / "g.png"
    picture((4, 4)).save(grid)
    scores = {"<s>": {"overall": 0.5, "<em>": 1.5}}
    page = Page(write_report(folder, scores, [('"><q>', grid)], title="<h6>"))
    assert not {"b", "i", "u", "s", "em", "q", "h6"} & {tag for tag, _ in page.elements}
    assert page.text.count("<h6>") == 2 and '"><q>' in page.text


def test_what_a_run_lacks_is_left_out(tmp_path: Path) -> None:
    folder = make(tmp_path / "bare")
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    text = Page(write_report(folder)).text
    assert "Configuration" in text
    for missing in ("Training curves", "Samples over time", "Scores", "Side by side", "Final loss"):
        assert missing not in text
    (folder / "recipe.json").unlink()
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5, "seconds": 2.0}\n{"step": 2, "lo')
    text = Page(write_report(folder)).text
    assert "Training curves" in text and "Configuration" not in text and "bare" in text


def test_a_preview_cut_off_by_a_crash_is_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", previews=3)
    last = folder / "previews" / "step-0000300.png"
    last.write_bytes(last.read_bytes()[:50])
    assert len(Page(write_report(folder)).all("img")) == 2


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="is not a run") as told:
            write_report(folder)
        assert str(folder) in str(told.value) and "\n" not in str(told.value)
        assert not (folder / "report.html").exists()


@pytest.mark.parametrize("name, content", [("recipe.json", "{"), ("recipe.json", "[]"), ("metrics.jsonl", '{"a": }\n')])
def test_damaged_files_are_named(tmp_path: Path, name: str, content: str) -> None:
    folder = make_run(tmp_path / "run")
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name} is damaged") as told:
        write_report(folder)
    assert "\n" not in str(told.value)


def test_a_grid_that_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("not a picture")
    for name in ("notes.png", "absent.png"):
        with pytest.raises(UserError, match=name):
            write_report(make_run(tmp_path / "run"), grids=[("grid", tmp_path / name)])


def test_a_failed_write_keeps_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path / "run")
    before = write_report(folder).read_bytes()

    def refuse(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match=r"cannot write .*report\.html .*No space left on device"):
        write_report(folder, title="another")
    assert (folder / "report.html").read_bytes() == before
    assert not list(folder.glob(".*"))
