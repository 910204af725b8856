"""What tests of runs share: methods by what a command says of them, and how what was trained is compared."""

from __future__ import annotations

from pathlib import Path

import torch

from apexflow.training.checkpoint import checkpoints, load_checkpoint

KINDS = ("full", "lora")
METHODS = {
    "flow_matching": [],
    "apex": [],
    "apex as printed": [
        "objective.pairing=printed",
        "objective.real=reference",
        "objective.path_velocity=sample",
        "objective.path_rows=all",
        "objective.reference=reference",
        "objective.guidance=1",
    ],
}


def method_overrides(name: str) -> list[str]:
    return [f"method={name.split()[0]}", *METHODS[name]]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(checkpoints(folder / "checkpoints")[-1]).tensors["trained"]


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
