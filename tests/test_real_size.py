"""The GPU benchmarks' paths at tiny size: the same code, on a CPU."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import four_bit
import pytest
import torch

from apexflow.training import loop

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
RESULTS = Path(__file__).parent.parent / "results" / "real-size.json"


def test_every_case_takes_real_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import real_size

    four_bit.use(monkeypatch)
    monkeypatch.setattr(loop, "adam_in_eight_bits", lambda: torch.optim.AdamW)

    def measured(*more: str) -> list[dict[str, Any]]:
        return real_size.main(["--tiny", "--batches", "2", "--steps", "1", "--output", str(tmp_path / "r.json"), *more])

    first = next(iter(real_size.CASES))
    (matching,) = measured("--cases", first, "--methods", "flow_matching")
    rows = measured("--methods", "apex")
    assert [row["case"] for row in rows] == list(real_size.CASES) and matching["case"] == rows[0]["case"] == first
    for row in [matching, *rows]:
        assert row["seconds"] > 0
        assert "nf4" in row["case"] if row["tflops_a_second"] is None else 0 < row["tflops_a_second"] < math.inf
        assert row["finite"] and row["peak_gib"] is None  # nothing is claimed that was not measured
        assert (row["trained"] < row["parameters"]) == ("lora" in row["case"])
    assert matching["forward_rows"] == 3 and rows[0]["forward_rows"] > 3
    assert (tmp_path / "r.json").is_file()


@pytest.mark.parametrize("card", [None, 1])
def test_one_evaluation_is_timed(card: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a guided teacher; or, as on a small card, with network and text encoder in turn."""
    import real_speed

    four_bit.use(monkeypatch)
    monkeypatch.setitem(real_speed.CASES, "miniature", replace(real_speed.CASES["miniature"], card=card))

    from apexflow import bench

    monkeypatch.setattr(bench, "ENOUGH", 0.0)
    (found,) = real_speed.main(["--cases", "miniature", "--output", str(tmp_path / "r.json")])
    assert [row["evaluations"] for row in found["rows"].values()] == [4, 1, 2, 4][card is not None :]
    assert all(row["latency_s"] > 0 and row["throughput_per_s"] > 0 for row in found["rows"].values())
    assert all(count > 0 for count in found["parameters"].values())
    assert found["peak_gib"] is None and (tmp_path / "r.json").is_file()


def test_the_plan_is_what_a_gpu_held() -> None:
    """Two rows of the results, planned again now: as they were then, and near what was measured."""
    import real_size

    rows = {(row["case"], row["method"], row["batch"]): row for row in json.loads(RESULTS.read_text())["rows"]}
    context = 0.5  # GiB that no allocator counts
    for case in ("sana-1.6b", "qwen-image-lora-r64"):
        row = rows[case, "apex", 8]
        planned = real_size.planned_gib(row)
        assert planned == pytest.approx(row["planned_gib"], abs=0.02)
        assert planned == pytest.approx(row["reserved_gib"] + context, rel=0.1)
