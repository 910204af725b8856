"""Sampling at real size: one evaluation against the teacher's many guided ones, text encoder and decoder included (Table 1).

    python benchmarks/real_speed.py [--cases sana-0.6b ...] [--output results/real-speed.json]
    python benchmarks/real_speed.py --cases miniature    # the same path in seconds on a CPU

Networks are built from the configs that ship with the package, with random weights in bf16, so nothing is downloaded and the
pictures show nothing. A word stands for a token, at one in four letters. What is timed is `apexflow bench`'s own.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from provenance import provenance

from apexflow.backbones import Backbone, load_backbone
from apexflow.backbones.parts import is_of_transformers
from apexflow.backbones.presets import presets, write_configs
from apexflow.backbones.room import InTurn
from apexflow.backbones.storage import storing
from apexflow.bench import Case, bench_table, sampling_speed
from apexflow.files import write_json
from apexflow.generator import Generator


@dataclass(frozen=True)
class Real:
    """A checkpoint, how its teacher is sampled, the side of its pictures, and how many are drawn at once for the throughput.

    card: stands in for a card of as many GiB, on which the student's network in four bits and its text encoder take turns.
    """

    model: str
    steps: int
    guidance: float
    size: int
    batch: int
    card: int | None = None


TINY, PARTS = "miniature", ("transformer", "vae", "text_encoder")
CASES = {
    "sana-0.6b": Real("Efficient-Large-Model/Sana_600M_1024px_diffusers", 20, 4.5, 1024, 10),
    "sana-1.6b": Real("Efficient-Large-Model/Sana_1600M_1024px_diffusers", 20, 4.5, 1024, 10),
    "qwen-image": Real("Qwen/Qwen-Image", 50, 4.0, 512, 4),
    "qwen-image-24gb": Real("Qwen/Qwen-Image", 50, 4.0, 512, 4, card=24),
    TINY: Real("mini-teacher", 2, 2.5, 64, 2),
}


class Words:
    """Stands for a tokenizer, whose vocabulary is not in the configs: a token for four letters, all of them the same."""

    padding_side, unk_token_id = "right", -1

    def encode(self, text: str) -> list[int]:
        return [5] * max(len(text) // 4, 1)

    def __call__(self, texts: Any, max_length: int = 10**6, return_tensors: str | None = None, **_: Any) -> Any:
        several = [self.encode(text)[:max_length] for text in ([texts] if isinstance(texts, str) else texts)]
        if return_tensors is None:
            return SimpleNamespace(input_ids=several[0] if isinstance(texts, str) else several)
        longest = max(map(len, several))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in several])
        return SimpleNamespace(input_ids=ids, attention_mask=(ids > 0).long())


def random_model(model: str, device: torch.device, folder: Path) -> Backbone:
    """A backbone with random weights in bf16 on `device`, of the sizes of a preset or of a model folder."""
    known = presets().get(model)
    if known is not None:
        write_configs(json.loads(known.read_text()), folder)
    backbone: Any = load_backbone(model if known is None else str(folder), "meta", torch.bfloat16)
    backbone.tokenizer = Words()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        for part in PARTS:
            setattr(backbone, part, drawn(getattr(backbone, part)))
    torch.set_default_dtype(torch.float32)
    return backbone


def drawn(network: nn.Module) -> nn.Module:
    """Another network of the same config, with weights."""
    kind: Any = type(network)
    made = kind(network.config) if is_of_transformers(kind) else kind.from_config(network.config)
    return made.eval().requires_grad_(False)


def measure(name: str, device: torch.device) -> dict[str, Any]:
    """The rows of one case. Memory is None where there is no GPU to ask."""
    case, on_gpu = CASES[name], device.type == "cuda"
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        backbone = random_model(case.model, device, Path(folder))
        parameters = {part: sum(p.numel() for p in getattr(backbone, part).parameters()) for part in PARTS}
        generator = Generator(backbone) if case.card is None else small_card(backbone, case.card, device)
        built = time.perf_counter() - began
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        cases = {f"student, {n} step{'s' * (n > 1)}": (generator, Case(case.model, n, 1.0)) for n in (1, 2, 4)}
        if case.card is None:
            guided = {f"teacher, {case.steps} steps, guided": (generator, Case(case.model, case.steps, case.guidance))}
            cases = guided | cases
        rows = sampling_speed(cases, case.batch, case.size)
    return {
        "case": name,
        "size": case.size,
        "batch": case.batch,
        "card_gib": case.card,
        "parameters": parameters,
        "build_s": built,
        "rows": rows,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
    }


def small_card(backbone: Backbone, gib: int, device: torch.device) -> Generator:
    """The model as `load(..., storage="nf4")` places it where a card has room for its network alone."""
    storing("nf4", torch.bfloat16, device)(backbone.transformer)
    backbone.text_encoder.to("cpu")
    if device.type == "cuda":
        torch.cuda.empty_cache()
        whole_card = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(gib * 2**30 / whole_card)
    return Generator(backbone, InTurn(backbone, device))


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[name for name in CASES if name != TINY])
    parser.add_argument("--output", type=Path)
    given = parser.parse_args(arguments)
    if given.cases != [TINY] and not torch.cuda.is_available():
        parser.error(f"real sizes need a GPU; --cases {TINY} checks the same path on a CPU")
    warnings.filterwarnings("ignore", message="the model's output is not finite")  # of random weights
    results = []
    for name in given.cases:
        if torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(1.0)
        results.append(measure(name, torch.device("cuda" if torch.cuda.is_available() else "cpu")))
        print(name, bench_table(results[-1] | {"device": provenance()["device"]}), flush=True)
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()
        if given.output:
            write_json(given.output, {"cases": results} | provenance())
    return results


if __name__ == "__main__":
    main()
