"""What turns measurements into results: seeds of an ablation, a published comparison, their tables."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import ablate
import publish_comparison
import tables


def scored(overall: float) -> dict[str, Any]:
    """What a run of an ablation leaves."""
    report = {"overall": overall, "overall_se": 0.01, "strict": 0.3, "diversity": 1.0, "tasks": {"colors": overall}}
    return {"steps_1": report, "steps_4": report}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every run that an ablation makes, by the row's (a, b) and seed; a=0.5, b=0 diverges with seed 2."""
    seen: list[tuple[str, int]] = []

    def run_one(objective: dict[str, Any], seed: int, *_: Any) -> dict[str, Any]:
        seen.append((f"a={objective['a']}, b={objective['b']}", seed))
        return (
            {"diverged": "not finite"} if (objective, seed) == ({"a": 0.5, "b": 0.0}, 2) else scored(0.1 + 0.2 * seed)
        )

    monkeypatch.setattr(ablate, "run_one", run_one)
    return seen


def test_an_ablation_of_one_seed_takes_more(
    tmp_path: Path, trained: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of an earlier version are the first seed's; only what lacks is run, the first seed of all rows first."""
    output = tmp_path / "shift.json"
    settings = {"steps": 200, "batch": 16, "learning_rate": 1e-3, "per_prompt": 2}
    early = {"a=0.5, b=0.0": scored(0.3), "a=0.5, b=0.1": scored(0.2)}
    old = {
        "rows": early,
        "settings": settings,
        "teacher": "mini-teacher",
        "commit": "abc",
        "command": "c",
        "device": "d",
    }
    output.write_text(json.dumps(old))

    def run(*seeds: int) -> dict[str, Any]:
        words = ["shift", "--steps", "200", "--only", "a=0.5", "--output", str(output), "--seeds", *map(str, seeds)]
        monkeypatch.setattr(sys, "argv", ["ablate.py", *words])
        ablate.main()
        found: dict[str, Any] = json.loads(output.read_text())
        return found

    found = run(0, 2)
    assert [seed for _, seed in trained] == [0, 0, 2, 2, 2, 2]
    assert {name for name, seed in trained if seed == 0} == {"a=0.5, b=1.0", "a=0.5, b=10.0"}
    row = found["rows"]["a=0.5, b=0.1"]
    assert row["runs"]["0"] == early["a=0.5, b=0.1"] | {"commit": "abc"} and "abc" in found["commits"]
    assert row["steps_1"]["overall"] == pytest.approx(0.35) and row["steps_1"]["overall_se"] == pytest.approx(0.15)
    table = {line.split(" | ")[0]: line for line in tables.ablation(found).splitlines()}
    assert "| 2 | 0.350 ±0.150 | 0.300 ±0.000 |" in table["| a=0.5, b=0.1"]
    assert "| 1 of 2 | 0.300 ±0.010 | 0.300 |" in table["| a=0.5, b=0.0"]
    assert "| 1 | 0.200 ±0.010 |" in tables.ablation(old)  # the form of the earlier version
    assert " abc" in tables.source(found, "shift.json")

    before = len(trained)
    assert run(0, 2)["rows"] == found["rows"] and len(trained) == before
    assert set(run(1)["rows"]["a=0.5, b=0.0"]["runs"]) == {"0", "1", "2"} and len(trained) == before + 4


def test_two_ablations_at_once_lose_nothing(tmp_path: Path, trained: list[tuple[str, int]]) -> None:
    output = tmp_path / "shift.json"
    for name, seed in (("one", 0), ("other", 0), ("one", 1)):
        ablate.keep(output, {}, "teacher", name, seed, scored(0.5))
    assert {name: list(row["runs"]) for name, row in json.loads(output.read_text())["rows"].items()} == {
        "one": ["0", "1"],
        "other": ["0"],
    }
    with pytest.raises(SystemExit, match="choose another --output"):
        ablate.read(output, {"steps": 1}, "teacher")


def test_the_seed_of_a_row_reaches_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Reached(Exception):
        pass

    def train(recipe: Any) -> None:
        assert recipe.seed == 7
        raise Reached

    monkeypatch.setattr(ablate, "train", train)
    given = argparse.Namespace(model="mini-teacher", learning_rate=1e-3, steps=1, batch=1, per_prompt=1)
    with pytest.raises(Reached):
        ablate.run_one({}, 7, given, tmp_path, tmp_path / "cache")


def test_a_comparison_is_published_with_the_commit_of_every_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, folder = tmp_path / "root", tmp_path / "runs" / "compare"
    for place in (root / "results", root / "docs" / "images", folder):
        place.mkdir(parents=True)
    for kind in ("prompts", "nfe"):
        Image.new("RGB", (2, 2)).save(folder / f"grid-{kind}.png")
    (folder / "report.html").write_text(f"made in {folder}")
    monkeypatch.setattr(publish_comparison, "ROOT", root)
    monkeypatch.setattr(sys, "argv", ["publish_comparison.py", str(folder)])
    rows: dict[str, Any] = {"teacher": {"budgets": {}}, "cm": {"runs": [{"seed": 0}], "stages": {}}}

    def publish(commit: str, **recipe: Any) -> dict[str, Any]:
        plan = {"images": 8, "recipe": {"seed": 0} | recipe}
        results = {"plan": plan, "rows": rows, "command": f"apexflow compare -o {folder}"}
        (folder / "results.json").write_text(json.dumps(results))
        monkeypatch.setattr(publish_comparison, "provenance", lambda: {"commit": commit, "command": "publish"})
        publish_comparison.main()
        found: dict[str, Any] = json.loads((root / "results" / "comparison.json").read_text())
        return found

    assert publish("first")["commits"] == {"first": ["teacher", "cm"]}
    rows["cm"] = {"runs": [{"seed": 0}, {"seed": 1}], "stages": {"images": "images", "time": "time-alone"}}
    found = publish("second", teacher=None)
    new = ["cm, time-alone", "cm, seed 1", "cm, seed 1, time-alone"]
    assert found["commits"] == {"first": ["teacher", "cm"], "second": new}
    assert publish("third", teacher=None)["commits"] == found["commits"]
    assert list(publish("fourth", seed=1)["commits"]) == ["fourth"]  # another comparison
    assert found["command"] == "apexflow compare -o runs/compare"
    assert (root / "results" / "comparison.html").read_text() == "made in runs/compare"

    monkeypatch.setattr(sys, "argv", [*sys.argv, "--name", "comparison-other"])
    (folder / "report.html").unlink()
    assert list(publish("fifth")["commits"]) == ["fourth"]  # the comparison stays
    other = json.loads((root / "results" / "comparison-other.json").read_text())
    assert list(other["commits"]) == ["fifth"] and other["rows"] == rows


def scored_row(overall: float) -> dict[str, Any]:
    """A method's row of a comparison, its two budgets alike."""
    report = {"overall": overall, "overall_se": 0.1, "distance": 1.0, "diversity": 1.0}
    one = {"images": 8, "nfe": {"1": report}}
    return {"sweep": {}, "rate": 1e-4, "further": [], "diverged": "0/1", "budgets": {"images": one, "time": one}}


def test_the_table_of_a_comparison_has_the_budgets_that_were_kept() -> None:
    plan = {"images": 8, "recipe": {"batch": 2}, "limit": 2, "per_prompt": 1, "seeds": 1, "nfe": [1]}
    rows = {"teacher": {"budgets": {"images": {"nfe": {"1": {"overall": 0.25}}}}}, "cm": scored_row(0.5)}
    both = tables.comparison({"plan": plan, "rows": rows})
    assert "Equal images:" in both and "Equal wall time:" in both and both.count("| cm | 0.500") == 2
    del rows["cm"]["budgets"]["time"]
    one = tables.comparison({"plan": plan, "rows": rows})
    assert "Equal images:" in one and "wall" not in one and "| cm | 0.500" in one and "| teacher | 0.250" in one
