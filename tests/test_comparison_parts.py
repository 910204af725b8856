"""The parts of a comparison that train nothing: plans, memory, seconds, means, features, charts, the command it tells of."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from apexflow.comparison.averages import over_runs
from apexflow.comparison.chart import lines_chart
from apexflow.comparison.command import compare_command
from apexflow.comparison.cost import lasting, most_kept, seconds_a_step
from apexflow.comparison.plan import EVERYONE, VARIANTS, Plan, comparison_recipe
from apexflow.comparison.results import own_command
from apexflow.comparison.scores import own_sampler, pooled
from apexflow.comparison.tables import budget_table, legend
from apexflow.comparison.train import once
from apexflow.errors import Stopped, UserError
from apexflow.objectives import guided, objectives
from apexflow.reporting.curves import BOTTOM, TOP
from apexflow.training.config import load_recipe, parse
from apexflow.training.loop import start


def test_memory_counts_weights_moments_and_what_backward_keeps(recipe_file: Path) -> None:
    full = lasting(start(load_recipe(recipe_file, ["method=flow_matching"]), resume=False))
    weights = sum(p.numel() * 4 for p in start_again(recipe_file).roles.trained.values())
    assert full == weights * (1 + 1 + 3)  # student, average; gradient and two moments


def start_again(recipe_file: Path) -> Any:
    return start(load_recipe(recipe_file, ["method=flow_matching"]), resume=True)


def test_memory_counts_one_micro_batch_at_a_time(recipe_file: Path, tmp_path: Path) -> None:
    """What a step keeps is what its largest micro-batch keeps, neither all of them nor some of several."""

    def kept(batch: int, micro_batch: int) -> int:
        sizes = [f"batch={batch}", f"micro_batch={micro_batch}", f"output={tmp_path}/{batch}-{micro_batch}"]
        return most_kept(start(load_recipe(recipe_file, ["method=flow_matching", *sizes]), resume=False))

    assert kept(5, 2) == kept(4, 2) == kept(2, 2) < kept(4, 4)


def test_seconds_a_step_leave_out_pauses() -> None:
    lines = [{"seconds": second} for second in (5.0, 6.0, 7.0, 60.0, 61.0)]
    assert seconds_a_step(lines) == pytest.approx(1.0)
    assert seconds_a_step(lines[:1]) == 5.0


def test_seconds_a_step_count_the_long_turns_of_methods_whose_networks_take_turns() -> None:
    """One student's step of ten seconds, three judge's of one; the pause of a judge's step is left out."""
    student, judge = ({"grad_norm": 1.0}, 10.0), ({"grad_norm_judge": 1.0}, 1.0)
    lines, now = [{"seconds": 0.0}], 0.0
    for norms, seconds in [student, judge, judge, judge] * 3 + [student, judge, judge, ({"grad_norm_judge": 1.0}, 9.0)]:
        now += seconds
        lines.append({"seconds": now} | norms)
    assert seconds_a_step(lines) == pytest.approx((10 + 3 * 1) / 4)


def test_a_result_is_made_once(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> dict[str, Any]:
        made.append(1)
        return {"a": 1}

    assert once(tmp_path / "deep" / "one.json", make) == once(tmp_path / "deep" / "one.json", make) == {"a": 1}
    assert made == [1]


def test_features_are_latents_over_few_places() -> None:
    assert pooled(torch.ones(2, 8, 8, 8)).shape == (2, 8 * 16)
    assert pooled(torch.ones(2, 8, 2, 3)).shape == (2, 8 * 6)


def test_names_of_lines_do_not_lie_upon_each_other() -> None:
    figure = lines_chart("a & b", ["1", "2"], {"one": [0.1, 0.5], "<two>": [0.2, 0.5]}, {})
    assert "a &amp; b" in figure and "&lt;two&gt;" in figure
    places = [float(part.split('"')[0]) for part in figure.split('x="416" y="')[1:]]
    assert 'class="error"' not in figure
    barred = lines_chart("c", ["1"], {"one": [0.5], "two": [0.1]}, {"one": [0.25]})
    bar = re.search(r'd="M[\d.]+ ([\d.]+)V([\d.]+)" class="error"', barred)
    assert bar and TOP <= float(bar[2]) < float(bar[1]) <= BOTTOM
    assert len(places) == 2 and abs(places[0] - places[1]) >= 10


def test_the_command_is_the_same_however_it_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    for first in ("/some/where/apexflow/__main__.py", "/some/where/bin/apexflow"):
        monkeypatch.setattr("sys.argv", [first, "compare", "apex", "-o", "a b"])
        assert own_command() == "apexflow compare apex -o 'a b'"
    monkeypatch.setattr("sys.argv", ["benchmarks/some.py"])
    assert own_command() == "some.py"


def test_a_run_that_diverged_is_left_out_of_the_mean_and_counted() -> None:
    def run(overall: float) -> dict[str, Any]:
        report = {"overall": overall, "strict": 0.5, "diversity": None, "distance": 1.0, "tasks": {"colors": overall}}
        return {"steps": 4, "images": 8, "seconds": 2.0, "seconds_a_step": 0.5, "nfe": {"1": report}}

    lost = {"steps": 1, "images": 2, "seconds": 1.0, "diverged": "the loss was not finite"}
    both = over_runs([run(0.2), lost, run(0.6), run(0.4)])
    report = both["nfe"]["1"]
    assert (both["runs"], both["trained"]) == (3, 4)
    assert report["overall"] == pytest.approx(0.4) and report["overall_se"] == pytest.approx(0.2 / 3**0.5)
    assert report["tasks"]["colors"] == pytest.approx(0.4) and report["diversity"] is None
    assert over_runs([lost, lost]) == lost | {"runs": 0, "trained": 2}
    row = {"sweep": {}, "rate": 1e-4, "further": [], "diverged": "1/4", "budgets": {"images": both}}
    cells = budget_table({"scm": row}, "images", [1])[1]
    assert cells[1:5] == ["0.400 ±0.115", "1.000 ±0.000", "", "3 of 4"]


def test_unknown_methods_and_bad_numbers_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown method 'meanflo', did you mean 'meanflow'"):
        Plan(tmp_path, methods=("meanflo",))
    for options, named in (
        ({"images": 0}, "images"),
        ({"runs": 0}, "runs"),
        ({"limit": 1}, "limit"),
        ({"rates": ()}, "rates"),
        ({"rates": (float("nan"),)}, "rates"),
        ({"guidance": float("nan")}, "guidance"),
        ({"nfe": (0,)}, "nfe"),
    ):
        with pytest.raises(UserError, match=named):
            Plan(tmp_path, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [*EVERYONE, *VARIANTS])
def test_every_entry_is_a_recipe_of_its_method_with_the_plans_guidance(name: str, tmp_path: Path) -> None:
    plan = Plan(tmp_path, guidance=3.5)
    method, given = plan.entry(name)
    objective = parse(objectives()[method], given, name)
    if name == "apex-printed":  # Algorithm 1 to the letter, and the same in the ablations
        assert (objective.pairing, objective.path_rows, objective.real) == ("printed", "all", "reference")
        assert (objective.path_velocity, objective.reference) == ("sample", "reference")
    assert replace(objective, **guided(objective, 1.0 if name == "apex-printed" else 3.5)) == objective
    assert set(own_sampler(plan, name, 1)) == {"kappa", "rho", "order"}  # nothing is left to what the model says
    assert own_sampler(plan, "teacher", 1) == {"kappa": 0, "rho": 0, "order": 1}
    assert own_sampler(plan, "rcgm", 1) != own_sampler(plan, "rcgm", 20)


def test_settings_of_a_recipe_are_those_of_its_own_method_alone(tmp_path: Path) -> None:
    own = replace(comparison_recipe(), method="meanflow", objective={"derivative": "difference", "guidance": 3.0})
    plan = Plan(tmp_path, recipe=own)
    assert plan.entry("meanflow") == ("meanflow", Plan(tmp_path).entry("meanflow")[1] | own.objective)
    for name in ("apex", "apex-endpoint", "rcgm"):
        assert plan.entry(name) == Plan(tmp_path).entry(name)
    results = {"teacher": "t", "first": None, "rows": {"teacher": {}}, "plan": json.loads(json.dumps(plan.identity()))}
    said = "meanflow has the recipe's derivative: difference, guidance: 3.0."
    assert said not in legend(results) and legend(results | {"rows": {"meanflow": {}}}).endswith(said)


@pytest.mark.parametrize(("limit", "prompts"), [(2, "2 prompts"), (50, "3 prompts"), (None, None)])
def test_a_legend_counts_the_prompts_that_there_were(tmp_path: Path, limit: int | None, prompts: str | None) -> None:
    plan = json.loads(json.dumps(Plan(tmp_path, seeds=2, per_prompt=2, limit=limit).identity()))
    scored = {"overall": 0.5, "pictures": (2 if limit == 2 else 3) * 2 * 2}
    rows = {"teacher": {"budgets": {"images": {"nfe": {"1": scored}}}}}
    told = legend({"teacher": "t", "first": None, "rows": rows, "plan": plan})
    assert f", {prompts}." in told if prompts else "prompts." not in told


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plans that the command would carry out."""
    seen: list[Plan] = []

    def carry_out(plan: Plan) -> None:
        seen.append(plan)
        raise Stopped("enough")

    monkeypatch.setattr("apexflow.comparison.command.run_comparison", carry_out)
    return seen


def test_a_number_that_is_written_twice_counts_once(plans: list[Plan]) -> None:
    with pytest.raises(Stopped):
        compare_command((), Path("out"), None, "1,4,1", "3e-4,0.0003,1e-3", {})
    assert plans[0].nfe == (1, 4) and plans[0].rates == (3e-4, 1e-3)


def test_the_longer_comparison_has_a_rate_that_falls_and_is_else_the_same(plans: list[Plan]) -> None:
    for recipe in (None, Path(__file__).parent.parent / "recipes" / "mini-comparison.yaml"):
        with pytest.raises(Stopped):
            compare_command((), Path("out"), recipe, "1", "3e-4", {})
    short, longer = (plan.recipe.to_dict() for plan in plans)
    assert short["optimizer"].pop("schedule") == "constant" and longer["optimizer"].pop("schedule") == "cosine"
    assert {key for key in short if short[key] != longer[key]} == {"output"}  # every run has its own
