"""What README and docs claim: tables equal the JSON they come from, links and code names exist."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from apexflow.cli import app
from apexflow.training.config import load_recipe

ROOT = Path(__file__).parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))


@pytest.mark.parametrize("script", ["tables.py", "charts.py"])
def test_every_table_and_chart_equals_its_results_file(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--check"])
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    runpy.run_path(str(ROOT / "benchmarks" / script), run_name="__main__")  # SystemExit names what differs


def test_every_name_in_the_paper_map_exists() -> None:
    text = (ROOT / "docs" / "paper.md").read_text()
    names = re.findall(r"`((?:transport|conditioning|sampler|objectives\.apex|training\.[a-z]+)\.[A-Za-z_.]+)`", text)
    assert len(names) > 15
    for name in names:
        module, attribute = f"apexflow.{name}", ""
        parts = module.split(".")
        for cut in range(len(parts), 1, -1):
            try:
                found = importlib.import_module(".".join(parts[:cut]))
            except ImportError:
                continue
            for attribute in parts[cut:]:
                found = getattr(found, attribute)
            break
        else:
            raise AssertionError(name)


@pytest.mark.parametrize(("kind", "last"), [("Eq.", 21), ("Algorithm", 2), ("Table", 7), ("Fig.", 26)])
def test_the_paper_map_leaves_nothing_out(kind: str, last: int) -> None:
    found: set[int] = set()
    for row in (ROOT / "docs" / "paper.md").read_text().splitlines():
        for numbers in re.findall(rf"{re.escape(kind)} ([\d, -]+)", row.partition(" | ")[0]):
            for first, end in re.findall(r"(\d+)(?:-(\d+))?", numbers):
                found.update(range(int(first), int(end or first) + 1))
    assert found == set(range(1, last + 1))


def test_every_file_that_the_documents_name_exists() -> None:
    for document in DOCUMENTS:
        text = document.read_text()
        for name in re.findall(r"`((?:docs|recipes|benchmarks|results)/[\w./-]+\.\w+)`", text):
            assert (ROOT / name).is_file(), f"{document} names {name}"


def test_every_name_that_the_documents_import_exists() -> None:
    found = 0
    for document in DOCUMENTS:
        for block in re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and str(node.module).startswith("apexflow"):
                    module = importlib.import_module(str(node.module))
                    assert all(hasattr(module, name.name) for name in node.names), (document, ast.unparse(node))
                    found += 1
    assert found >= 4


def test_the_way_through_python_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a recipe to an export, as docs/training.md shows it."""
    text = (ROOT / "docs" / "training.md").read_text()
    [block] = [one for one in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "train(recipe)" in one]
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["folder"] == Path("runs/few/model") and names["folder"].is_dir()
    assert not names["report"]["complete"] and names["report"]["pictures"] == 2
    assert (tmp_path / "star.png").is_file() and (tmp_path / "my-student" / "model_index.json").is_file()


def commands() -> list[list[str]]:
    """The arguments of every `apexflow` that stands in a block of commands."""
    found = []
    for path in DOCUMENTS:
        for block in re.findall(r"```\n(.*?)```", path.read_text().replace("\\\n", " "), re.DOTALL):
            lines = (re.match(r"(?:torchrun .*-m )?apexflow (.*)", line) for line in block.splitlines())
            found += [shlex.split(line[1], comments=True) for line in lines if line is not None]
    return found


def test_every_command_that_the_documents_show_is_one() -> None:
    assert len(commands()) > 25
    for name, *arguments in commands():
        command: Any = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
        while hasattr(command, "commands"):
            command = command.commands[arguments.pop(0)]
        given = command.make_context(name, arguments).params  # a usage error for an option that is none
        recipe = ROOT / str(given.get("recipe"))
        if recipe.is_file():
            load_recipe(recipe, given["overrides"] or [])


def test_imports_point_down() -> None:
    """transport, conditioning -> sampler -> objectives -> backbones, lora, data -> training, evaluation -> cli."""
    order = [
        "transport conditioning randomness errors progress options locking files torchrun devices",
        "sampler",
        "objectives",
        "backbones",
        "lora",
        "data generator",
    ]
    order += ["evaluation", "training reporting export", "demo comparison bench drawing", "cli"]
    layers = {name: level for level, names in enumerate(order) for name in names.split()}
    for path in (ROOT / "apexflow").rglob("*.py"):
        own = path.relative_to(ROOT / "apexflow").parts[0].removesuffix(".py")
        for target in re.findall(r"(?:from|import) apexflow\.(\w+)", path.read_text()):
            if own in layers:
                assert layers[target] <= layers[own], f"{path} imports apexflow.{target}"
