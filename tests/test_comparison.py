"""The comparison: equal budgets, the same data, resumed without repeats, one page; and what is refused or marked."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from apexflow.backbones import load_backbone
from apexflow.comparison import results as comparison
from apexflow.comparison import scores
from apexflow.comparison import train as training
from apexflow.comparison.plan import BASIS, Plan, comparison_recipe
from apexflow.comparison.results import run_comparison
from apexflow.comparison.scores import own_sampler
from apexflow.comparison.tables import budget_table
from apexflow.comparison.train import run_folder, stages, train_to_budgets
from apexflow.data.caching import CacheSettings, make_cache
from apexflow.errors import Diverged, Stopped, UserError
from apexflow.objectives import objectives
from apexflow.training import loop
from apexflow.training.config import Data
from apexflow.training.journal import read_metrics
from apexflow.training.loop import train
from apexflow.training.prepare import finished_cache

METHODS = ("scm", BASIS)


@pytest.fixture
def plan(tmp_path: Path, tiny_model: Path, scene_folder: Path) -> Plan:
    """Two methods on the tiny model, a handful of steps."""
    recipe = replace(comparison_recipe(), model=str(tiny_model), data=Data(source=str(scene_folder)), batch=2)
    return Plan(
        tmp_path / "out", recipe, METHODS, images=8, rates=(1e-4, 1e-3), nfe=(1, 2), seeds=2, per_prompt=2, limit=2
    )


Calls = list[tuple[str, float, int, int]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Every training that happens: method, learning rate, steps, seed."""
    seen: Calls = []
    real = training.train

    def train(recipe: Any, resume: bool = False) -> Path:
        seen.append((recipe.method, recipe.optimizer.learning_rate, recipe.steps, recipe.seed))
        return real(recipe, resume)

    monkeypatch.setattr(training, "train", train)
    return seen


def test_a_comparison_from_start_to_end(plan: Plan, calls: Calls) -> None:
    results = run_comparison(plan)
    rows = results["rows"]
    assert list(rows) == ["teacher", "scm", "flow_matching"]
    for name in METHODS:
        # The same sweep for all, and its best run as that of the images.
        rates = [call[1:] for call in calls if call[0] == name]
        assert rates[:2] == [(rate, plan.steps, 0) for rate in plan.rates] and rates[2][0] == rows[name]["rate"]
        assert not list((plan.output / "sweep" / name).glob("run*"))
        row = rows[name]
        assert row["rate"] in plan.rates and row["diverged"] == "0/4"
        assert row["budgets"]["images"]["images"] == 8 and row["budgets"]["images"]["steps"] == 4
        for budget in row["budgets"].values():
            assert set(budget["nfe"]) == {"1", "2"}
            for report in budget["nfe"].values():
                assert {"overall", "overall_se", "tasks", "diversity", "distance"} <= set(report)
                assert report["pictures"] == 2 * 2 * 2
    assert rows["scm"]["budgets"]["time"]["steps"] == 4  # the first method sets the time
    assert rows[BASIS]["time"] == pytest.approx(1) and rows[BASIS]["memory"] == pytest.approx(1)
    assert rows["scm"]["memory"] > 1
    out = plan.output
    markdown, page = (out / "results.md").read_text(), (out / "report.html").read_text()
    assert json.loads((out / "results.json").read_text())["rows"] == rows
    for text in (markdown, page):
        assert "scm" in text and "flow_matching" in text and "teacher" in text
        assert "8 images a run" in text and "best of 2 learning rates" in text and "2 seeds" in text
    assert all(escape(objectives()[name].citation) in page for name in METHODS)
    assert page.count("<svg") >= 2 + 4 and page.count("<img") == 2 and "http" not in page.replace("http-equiv", "")
    assert (out / "grid-prompts.png").is_file() and (out / "grid-nfe.png").is_file()

    before = len(calls)
    assert run_comparison(plan)["rows"] == rows and len(calls) == before  # nothing is done twice
    with pytest.raises(UserError, match="different images"):
        run_comparison(replace(plan, images=16))


def test_a_comparison_that_is_not_timed_has_equal_images_alone(plan: Plan, calls: Calls) -> None:
    """Flow matching, which times are relative to, is not trained for it, and memory is relative to its all the same."""
    untimed = replace(plan, methods=("scm",), images=2, rates=(1e-3,), nfe=(1,), seeds=1, per_prompt=1, timed=False)
    results = run_comparison(untimed)
    assert [call[0] for call in calls] == ["scm"] * 2  # one of them a look at what came of the sweep
    row = results["rows"]["scm"]
    assert list(results["rows"]) == ["teacher", "scm"] and list(row["budgets"]) == ["images"]
    assert row["time"] is None and row["memory"] > 1 and row["diverged"] == "0/2" and results["first"] is None
    for name in ("results.md", "report.html"):
        told = (plan.output / name).read_text()
        assert "Equal images" in told and "wall" not in told and "Memory of a training step" in told
    assert not (plan.output / "pace.json").exists() and run_comparison(untimed)["rows"] == results["rows"]
    with pytest.raises(UserError, match="different timed"):
        run_comparison(replace(untimed, timed=True))


def test_true_pictures_say_what_their_number_alone_makes_of_fd(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as are scored, none of them among those that all are measured against; no row where the data have too few."""
    monkeypatch.setattr(scores, "MOST_TRUE", 40)
    small = replace(plan, methods=(BASIS,), rates=(1e-4,), nfe=(1,))
    results = run_comparison(small)
    found = results["true_pictures"]
    assert found == {"pictures": 8, "distance": pytest.approx(scores.true_pictures(small, 8)["distance"])}
    assert 0 < found["distance"] < results["rows"]["teacher"]["budgets"]["images"]["nfe"]["1"]["distance"]
    assert scores.true_pictures(small, 9) == {}
    shown = budget_table(results["rows"], "images", [1], found)
    assert shown[1][0] == "true pictures" and shown[1][2] == f"{found['distance']:.3f}"
    assert len({len(row) for row in shown}) == 1 and [cell for cell in shown[1] if cell] == [shown[1][0], shown[1][2]]
    assert all(row[0] != "true pictures" for row in budget_table(results["rows"], "time", [1], found))
    for name in ("results.md", "report.html"):
        assert "true pictures" in (plan.output / name).read_text()


def test_a_comparison_that_is_cut_off_anywhere_goes_on_without_repeating_a_run(
    plan: Plan, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The power goes before everything that is done once, in turn: of every run only what was not finished is done again."""

    class PowerCut(Exception):
        pass

    def cut(*_: Any, **__: Any) -> Any:
        raise PowerCut

    small = replace(plan, methods=(BASIS,), rates=(1e-4,), nfe=(1,), seeds=1, per_prompt=1)
    places: list[tuple[Any, str, Any]] = [
        (training, "measure", cut),
        (training, "quick_score", cut),
        (training, "shutil", SimpleNamespace(rmtree=cut)),
        (training, "shutil", SimpleNamespace(rmtree=shutil.rmtree, copytree=cut)),
        (comparison, "score_at", cut),
        (comparison, "draw_strips", cut),
        (comparison, "write_page", cut),
    ]
    for place, name, broken in places:
        with monkeypatch.context() as patch:
            patch.setattr(place, name, broken)
            with pytest.raises(PowerCut):
                run_comparison(small)
    assert list(run_comparison(small)["rows"]) == ["teacher", BASIS]
    # A run cut off before its result was written is taken up again at its last step, where nothing is left to train.
    trained = [steps for _, _, steps, _ in calls]
    assert trained == [4] * 4 and not (plan.output / "sweep" / BASIS / "run-0.0001").exists()


def test_the_rate_is_chosen_by_every_number_of_steps(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two rates, the one with the best single step may answer nothing at two."""
    asked: list[tuple[int, Any]] = []
    one_step = {1e-4: 0.4, 1e-3: 0.5}

    def score(plan: Plan, generator: Any, sampler: dict[str, Any], steps: int, *_: Any) -> dict[str, float]:
        asked.append((steps, sampler))
        early = len(asked) <= len(plan.nfe)  # the rates are tried in order
        overall = one_step[1e-4 if early else 1e-3] if steps == 1 else 0.6 * early
        return {"overall": overall, "distance": 1.0}

    monkeypatch.setattr("apexflow.comparison.scores.score", score)
    found = training.sweep(plan, "scm")
    assert [steps for steps, _ in asked] == [1, 2, 1, 2] and all(s == own_sampler(plan, "scm", n) for n, s in asked)
    assert found["rate"] == 1e-4 and found["tried"]["0.0001"]["overall"] == pytest.approx(0.5)


@pytest.mark.parametrize(("limit", "prompts"), [(None, None), (2, 8)])
def test_the_sweep_looks_at_as_many_pictures_as_are_scored(
    plan: Plan, limit: int | None, prompts: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of a prompt of its own, as far as there are so many."""
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(scores, "score", lambda *given: asked.append(given[4:]) or {"overall": 0.5, "distance": 1.0})
    quick = scores.quick_score(replace(plan, limit=limit), "scm", Path(plan.recipe.model))
    assert quick == {"overall": 0.5, "distance": 1.0} and asked == [([scores.QUICK_SEED], 1, prompts)] * len(plan.nfe)


def test_a_finished_comparison_takes_more_runs_and_repeats_none(plan: Plan, calls: Calls) -> None:
    """A folder of one run a method, as the version before several runs left it, takes a second of each, a third of one."""
    small = replace(plan, rates=(1e-4,), nfe=(1,), seeds=1, per_prompt=1)
    once_each = run_comparison(small)
    as_before = {key: once_each[key] for key in ("plan", "teacher", "command")}
    as_before["rows"] = {
        name: {key: value for key, value in row.items() if key not in ("runs", "stages")}
        for name, row in once_each["rows"].items()
    }
    (plan.output / "results.json").write_text(json.dumps(as_before))
    (plan.output / "pace.json").unlink()
    marker = json.loads((plan.output / "plan.json").read_text())
    del marker["recipe"]["teacher"], marker["timed"]  # fields that there have been since
    (plan.output / "plan.json").write_text(json.dumps(marker))
    del calls[:]
    rows = run_comparison(replace(small, runs=2))["rows"]
    assert {call[0] for call in calls} == set(METHODS) and {call[3] for call in calls} == {1}
    for name in METHODS:
        first, second = (run["budgets"]["images"]["nfe"]["1"] for run in rows[name]["runs"])
        mean = rows[name]["budgets"]["images"]["nfe"]["1"]
        assert first == once_each["rows"][name]["budgets"]["images"]["nfe"]["1"]
        assert first["distance"] != second["distance"]
        assert mean["distance"] == pytest.approx((first["distance"] + second["distance"]) / 2)
        assert mean["distance_se"] == pytest.approx(abs(first["distance"] - second["distance"]) / 2)
        assert rows[name]["diverged"] == "0/5" and rows[name]["budgets"]["images"]["runs"] == 2

    del calls[:]
    results = run_comparison(replace(small, methods=(BASIS,), runs=3))
    assert {(call[0], call[3]) for call in calls} == {(BASIS, 2)}
    assert {name: len(row.get("runs", [])) for name, row in results["rows"].items()} == {
        "teacher": 0,
        "scm": 2,
        BASIS: 3,
    }
    assert results["rows"]["scm"] == rows["scm"] | {"time": results["rows"]["scm"]["time"]}
    counts = {row[0]: row[4] for row in budget_table(results["rows"], "time", [1])[1:]}
    assert counts == {"scm": "2", BASIS: "3"} and "Up to 3 runs a method" in (plan.output / "results.md").read_text()
    assert (plan.output / "report.html").read_text().count('class="error"') == 2 * 2
    assert results["first"] == "scm" and run_comparison(small)["rows"] == results["rows"]


@pytest.mark.parametrize(("name", "own"), [(BASIS, False), ("cm", True)])
def test_each_budgets_model_is_that_of_a_run_of_just_its_length(
    name: str, own: bool, plan: Plan, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CM's grid is refined by the share of the run, so its larger budget has a run of its own; flow matching's goes on."""
    monkeypatch.setattr("apexflow.comparison.plan.WARMUP", 1)
    steps = {"images": 3, "time": 5}
    results, seconds = train_to_budgets(plan, name, 1e-3, steps, seed=4)
    folder = plan.output / "runs" / name / "seed-4"
    assert stages(plan, name, steps) == {"images": "images", "time": "time-alone" if own else "time"}
    assert {budget: result["steps"] for budget, result in results.items()} == steps
    spent = [result["seconds"] for result in results.values()]
    assert seconds == (sum(spent) if own else spent[1])
    assert not list(folder.glob("run*/checkpoints")) and not list(folder.glob("run*/model"))
    for budget, stage in stages(plan, name, steps).items():
        straight = train(plan.recipe_for(name, plan.output / f"straight-{budget}", 1e-3, steps[budget], seed=4))
        weights = "transformer/diffusion_pytorch_model.safetensors"
        assert (folder / f"model-{stage}" / weights).read_bytes() == (straight / weights).read_bytes()
    before = len(calls)
    assert train_to_budgets(plan, name, 1e-3, steps, seed=4) == (results, seconds) and len(calls) == before


@pytest.mark.parametrize(
    ("name", "time", "again"), [("flow_matching", 5, 2), ("flow_matching", 3, 0), ("flow_matching", 2, 2), ("cm", 5, 5)]
)
def test_the_sweeps_best_run_is_the_first_seeds(
    name: str, time: int, again: int, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the images nothing is trained again; for the time, what goes on from there, or a run of its own."""
    monkeypatch.setattr("apexflow.comparison.plan.WARMUP", 1)
    plan = replace(plan, images=6, rates=(1e-4, 1e-3), nfe=(1,), seeds=1, per_prompt=1)
    rate = training.sweep(plan, name)["rate"]
    assert [run.name for run in (plan.output / "sweep" / name).glob("run*")] == [f"run-{rate:g}"]
    steps = {"images": 3, "time": time}
    trained: list[int] = []
    real = loop.training_step
    monkeypatch.setattr(loop, "training_step", lambda run: trained.append(run.step) or real(run))
    results, _ = train_to_budgets(plan, name, rate, steps, seed=0)
    assert len(trained) == again and {budget: result["steps"] for budget, result in results.items()} == steps
    assert not list((plan.output / "sweep" / name).glob("run*"))
    folder, weights = plan.output / "runs" / name, "transformer/diffusion_pytorch_model.safetensors"
    for budget, stage in stages(plan, name, steps).items():
        straight = train(plan.recipe_for(name, plan.output / f"straight-{budget}", rate, steps[budget]))
        assert (folder / f"model-{stage}" / weights).read_bytes() == (straight / weights).read_bytes()
        assert len(read_metrics(run_folder(folder, stage))) == max(steps[budget], 0 if name == "cm" else time)
    assert not list(folder.glob("run*/checkpoints"))


def test_a_schedule_or_a_short_warmup_gives_each_budget_its_own_run(plan: Plan) -> None:
    assert plan.nested(BASIS, (20, 30)) and plan.nested("apex", (20, 30))
    assert not plan.nested(BASIS, (19, 30))  # the warm-up would end elsewhere
    assert not any(plan.nested(name, (20, 30)) for name in ("scm", "cm", "sana_sprint"))
    cosine = replace(plan.recipe, optimizer=replace(plan.recipe.optimizer, schedule="cosine"))
    assert not replace(plan, recipe=cosine).nested(BASIS, (20, 30))
    assert stages(plan, "scm", {"images": 30, "time": 20}) == {"time": "time", "images": "images-alone"}
    assert stages(plan, "scm", {"images": 30, "time": 30}) == {"images": "images", "time": "images"}


def test_a_run_of_its_own_goes_on_where_the_shorter_diverged(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    real = training.train

    def diverge(recipe: Any, resume: bool = False) -> Path:
        real(recipe, resume)
        raise Diverged("the loss was not finite")

    def train(recipe: Any, resume: bool = False) -> Path:
        return diverge(recipe, resume) if recipe.steps == 2 else real(recipe, resume)

    monkeypatch.setattr(training, "train", train)
    results, _ = train_to_budgets(plan, "scm", 1e-3, {"images": 2, "time": 3}, seed=0)
    assert "diverged" in results["images"] and "diverged" not in results["time"]
    monkeypatch.setattr("apexflow.comparison.plan.WARMUP", 1)
    results, _ = train_to_budgets(plan, BASIS, 1e-3, {"images": 2, "time": 3}, seed=0)
    assert results["time"] == results["images"] and "diverged" in results["time"]


def test_a_stop_in_a_comparison_says_how_to_go_on(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(recipe: Any, resume: bool = False) -> Path:
        raise Stopped("saved at step 1; resume with the same command and --resume")

    monkeypatch.setattr(training, "train", stop)
    with pytest.raises(Stopped, match="run the same command to resume") as stopped:
        run_comparison(plan)
    assert "--resume" not in str(stopped.value)


def test_a_run_that_diverges_at_once_is_marked(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def burst(recipe: Any, resume: bool = False) -> Path:
        raise Diverged("the loss was not finite")

    monkeypatch.setattr(training, "train", burst)
    rows = run_comparison(replace(plan, nfe=(1,), seeds=1, per_prompt=1))["rows"]
    assert rows["scm"]["diverged"] == rows[BASIS]["diverged"] == "2/2"
    assert rows["scm"]["rate"] is None and rows["scm"]["sweep"]["seconds"] == 0
    assert (plan.output / "report.html").read_text().count("diverged") > 4


def test_a_diverged_run_is_marked_and_the_rest_goes_on(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    real = training.train

    def train(recipe: Any, resume: bool = False) -> Path:
        model = real(recipe, resume)
        if recipe.method == "scm" and recipe.optimizer.learning_rate == 1e-3:
            raise Diverged("the loss was not finite")
        if recipe.method == BASIS:
            raise Diverged("the loss was not finite")
        return model

    monkeypatch.setattr(training, "train", train)
    results = run_comparison(replace(plan, nfe=(1,), seeds=1, per_prompt=1))
    rows = results["rows"]
    assert rows["scm"]["rate"] == 1e-4 and rows["scm"]["diverged"] == "1/4"
    assert rows[BASIS]["rate"] is None and rows[BASIS]["diverged"] == "2/2" and rows["scm"]["time"] is None
    assert "diverged" in (plan.output / "results.md").read_text()


def test_a_method_that_the_backbone_cannot_take_says_why(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apexflow.backbones.second_time.TIME_MODULES", ("elsewhere",))
    with pytest.raises(UserError, match=r"method meanflow cannot be compared on .*cannot take a second time"):
        run_comparison(replace(plan, methods=("meanflow",)))
    assert not (plan.output / "sweep").exists()


def test_prompts_alone_are_refused_before_anything_is_made(plan: Plan, tmp_path: Path) -> None:
    """Even for methods that train on them: there would be nothing to measure against."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red star\na blue ring\n")
    with pytest.raises(UserError, match=r"only prompts, and a comparison needs true pictures.*synthesize"):
        run_comparison(
            replace(plan, recipe=replace(plan.recipe, data=Data(source=str(prompts))), methods=("apex-endpoint",))
        )
    assert not plan.output.exists()


def test_a_refusal_says_that_settings_come_from_a_recipe_and_leaves_a_folder_that_takes_another(plan: Plan) -> None:
    small = replace(plan, recipe=replace(plan.recipe, batch=1), methods=("apex",))
    with pytest.raises(UserError, match=r"method apex cannot be .*batch 1 is too small.* --recipe"):
        run_comparison(small)
    (plan.output / "costs" / "scm.json").write_text("{}")
    comparison._claim(plan)  # nothing was made with the batch that was refused, so its folder takes another
    assert json.loads((plan.output / "plan.json").read_text())["recipe"]["batch"] == 2
    assert not (plan.output / "costs").exists()
    (plan.output / "cache").mkdir()
    with pytest.raises(UserError, match="different recipe"):
        comparison._claim(small)


def test_a_folder_with_something_else_is_refused(plan: Plan) -> None:
    plan.output.mkdir()
    (plan.output / "holiday.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="is not a comparison"):
        run_comparison(plan)


def test_recipes_of_a_comparison_differ_in_the_method_alone(plan: Plan) -> None:
    one, other = (plan.recipe_for(name, Path("run"), 1e-4, 10).to_dict() for name in METHODS)
    assert {key for key in one if one[key] != other[key]} == {"method", "objective"}


def test_a_finished_cache_that_the_recipe_names_is_trained_and_measured_on(
    plan: Plan, tiny_model: Path, scene_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "MOST_TRUE", 40)
    folder = tmp_path / "cache"
    make_cache(scene_folder, load_backbone(str(tiny_model)), tiny_model, folder, CacheSettings(None))
    for data in (Data(source=str(folder)), Data(cache=str(folder))):
        named = replace(plan, recipe=replace(plan.recipe, data=data))
        assert finished_cache(named.recipe_for(BASIS, tmp_path / "run", 1e-4, 4).data) == folder
        assert scores.true_pictures(named, 8)["pictures"] == 8


def test_a_folder_is_older_than_fields_of_a_recipe(plan: Plan) -> None:
    comparison._claim(plan)
    marker = plan.output / "plan.json"
    held = json.loads(marker.read_text())
    del held["recipe"]["teacher"], held["recipe"]["optimizer"]["schedule"], held["recipe"]["data"]["skip_limit"]
    marker.write_text(json.dumps(held))
    comparison._claim(plan)
    (plan.output / "runs").mkdir()
    changed = replace(plan.recipe, optimizer=replace(plan.recipe.optimizer, schedule="cosine"))
    with pytest.raises(UserError, match="different recipe"):
        comparison._claim(replace(plan, recipe=changed))
