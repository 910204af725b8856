"""`apexflow bench`: what it counts and how it divides, on a clock that ticks once a call."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import pytest
from command_line import Run, refused

from apexflow import bench


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every measured call takes one second more than the one before."""
    times = itertools.accumulate(itertools.count())  # 0, 1, 3, 6, 10 ...
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(times)))


def test_a_training_step_is_timed_on_no_more_pictures_than_it_reads(tiny_model: Path, tmp_path: Path) -> None:
    bench.begin("apex", "lora", str(tiny_model), 3, tmp_path)
    assert json.loads((tmp_path / "cache" / "cache.json").read_text())["rows"] == 3


def test_sampling_and_training_are_timed(
    run: Run, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, ticks: None
) -> None:
    monkeypatch.setattr(bench, "STEPS", 1)
    cases = (f"{tiny_model}:1:1", f"{tiny_model}:2:2.5")
    code, out, errors = run("bench", *cases, "--batch", 2, "--train", "lora", "--json")
    assert code == 0, errors
    result = json.loads(out)
    (name, first), (other, second) = result["rows"].items()
    assert name == f"{tiny_model}, 1 step" and other == f"{tiny_model}, 2 steps, guidance 2.5"
    assert (first["evaluations"], second["evaluations"]) == (1, 4)
    # Calls take 1, 3, 5 ... ticks, and are repeated three times, or until they have taken ten.
    assert (first["latency_s"], first["throughput_per_s"]) == (3, 2 / 8)
    assert (second["latency_s"], second["throughput_per_s"]) == (11, 2 / 13)
    assert first["speedup_latency"] == first["speedup_throughput"] == 1
    assert (second["speedup_latency"], second["speedup_throughput"]) == pytest.approx((3 / 11, 8 / 13))
    step = result["training"]
    assert step["tuning"] == "lora" and step["ratio"] == step["seconds"]["apex"] / step["seconds"]["flow_matching"] > 1


def test_a_table_for_people(run: Run, tiny_model: Path, ticks: None) -> None:
    code, out, _ = run("bench", tiny_model, "--batch", 3)
    assert code == 0 and "batch 3" in out and "3000.0 ms" in out and "NFE" in out and "training" not in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nosuch:1"], ("'nosuch'", "mini-teacher")),
        (["mini-student:one"], ("mini-student:one", "MODEL:STEPS:GUIDANCE")),
        (["mini-student:1:2:3"], ("mini-student:1:2:3", "MODEL:STEPS:GUIDANCE")),
        (["mini-student:0"], ("steps", "at least 1")),
        (["mini-student:99999999999999999999"], ("steps", "at most 10000")),
        (["mini-student:1:nan"], ("guidance is nan",)),
        (["mini-student", "--size", "50"], ("50",)),
        (["mini-student", "--batch", "0"], ("--batch",)),
        (["mini-student", "--train", "all"], ("--train", "full", "lora")),
        (["mini-student", "--device", "gpu"], ("unknown device 'gpu'",)),
    ],
    ids=str,
)
def test_what_cannot_be_timed_is_named(run: Run, arguments: list[str], words: tuple[str, ...]) -> None:
    refused(run("bench", *arguments), *words)
