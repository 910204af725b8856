"""The GPU benchmark's path at tiny size: the same code, on a CPU."""

from __future__ import annotations

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))


def test_every_case_takes_real_steps(tmp_path: Path) -> None:
    import real_size

    rows = real_size.main(["--tiny", "--batches", "2", "--steps", "1", "--output", str(tmp_path / "r.json")])
    assert [(row["case"], row["method"]) for row in rows] == [
        (c, m) for c in real_size.CASES for m in real_size.METHODS
    ]
    for row in rows:
        assert row["seconds"] > 0 and row["tflops_a_second"] > 0 and math.isfinite(row["tflops_a_second"])
        assert row["peak_gib"] is None  # nothing is claimed that was not measured
        assert (row["trained"] < row["parameters"]) == (row["case"] == "qwen-image-lora-r64")
    apex, matching = rows[0], rows[1]
    assert matching["forward_rows"] == 3 and apex["forward_rows"] > 3
    assert (tmp_path / "r.json").is_file()
