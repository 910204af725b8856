"""A real training step at real size: time, peak memory and TFLOP/s of APEX and of flow matching, with random weights.

    python benchmarks/real_size.py [--cases sana-0.6b ...] [--batches 1 4 8] [--steps 5] [--output results/real-size.json]
    python benchmarks/real_size.py --tiny    # the same path on two-layer networks, in seconds on a CPU
    python benchmarks/real_size.py --plan results/real-size.json    # on any machine: what the plan says of measured rows

Weights are drawn from the configs that ship with the package, so nothing is downloaded; latents and embeddings are random, as a
cache would hand them over. SANA is tuned whole, all others as a LoRA with checkpointing, all at 512 x 512 in bf16. A batch goes
through in one piece. The work of a step is counted from one forward pass: backward is twice as much, once where weights are
frozen, and checkpointing adds the forward pass again. A case that has no room says so and the next one goes on. What the plan
says of each row takes longer than its steps, and no GPU: --plan, afterwards.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))

from provenance import provenance

from apexflow.backbones import load_backbone
from apexflow.backbones.presets import presets, write_configs
from apexflow.backbones.storage import FourBit
from apexflow.files import write_json
from apexflow.training.config import Data, Optimizer, Recipe, Tuning
from apexflow.training.distributed import own_device
from apexflow.training.engine import Engine
from apexflow.training.loop import optimizer_of
from apexflow.training.memory import example_inputs
from apexflow.training.passes import cost, count_passes
from apexflow.training.plan import GIB, plan
from apexflow.training.roles import loaded_dtype, make_roles
from apexflow.training.run import Run, Trainee
from apexflow.training.step import training_step
from apexflow.training.suited import suited_objective

METHODS = ("apex", "flow_matching")
LORA = Tuning(kind="lora", rank=64, checkpointing=True)
WHOLE = Tuning(checkpointing=False)


@dataclass(frozen=True)
class Case:
    """A checkpoint, and how it is tuned."""

    model: str
    tuning: Tuning = LORA
    optimizer: Optimizer = field(default_factory=Optimizer)


QWEN = Case("Qwen/Qwen-Image")
SANA = Case("Efficient-Large-Model/Sana_1600M_512px_diffusers", WHOLE)
CASES = {
    "sana-0.6b": Case("Efficient-Large-Model/Sana_600M_512px_diffusers", WHOLE),
    "sana-1.6b": SANA,
    "sana-1.6b-adamw8bit": replace(SANA, optimizer=Optimizer("adamw8bit")),
    "qwen-image-lora-r64": QWEN,
    "qwen-image-lora-r64-fp8": replace(QWEN, tuning=replace(LORA, storage="fp8")),
    "qwen-image-lora-r32-nf4": replace(QWEN, tuning=replace(LORA, rank=32, storage="nf4")),
    "flux-dev-lora-r64": Case("black-forest-labs/FLUX.1-dev"),
    "flux2-klein-4b-lora-r64": Case("black-forest-labs/FLUX.2-klein-base-4B"),
    "z-image-lora-r64": Case("Tongyi-MAI/Z-Image"),
    "sd3.5-large-lora-r64": Case("stabilityai/stable-diffusion-3.5-large"),
    "lumina2-lora-r64": Case("Alpha-VLLM/Lumina-Image-2.0"),
    "sdxl-lora-r64": Case("stabilityai/stable-diffusion-xl-base-1.0"),
    "pixart-lora-r64": Case("PixArt-alpha/PixArt-XL-2-1024-MS"),
}
TINY = {
    "SanaTransformer2DModel": {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 16,
    },
    "QwenImageTransformer2DModel": {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "joint_attention_dim": 16,
        "axes_dims_rope": [4, 6, 6],
    },
    "FluxTransformer2DModel": {
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 16,
        "axes_dims_rope": [4, 6, 6],
    },
    "Flux2Transformer2DModel": {
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "joint_attention_dim": 48,
        "axes_dims_rope": [4, 4, 4, 4],
    },
    "ZImageTransformer2DModel": {
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 16,
        "axes_dims": [4, 6, 6],
    },
    "SD3Transformer2DModel": {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "joint_attention_dim": 16,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 16,
    },
    "Lumina2Transformer2DModel": {
        "num_layers": 2,
        "num_refiner_layers": 1,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "multiple_of": 16,
        "axes_dim_rope": [4, 6, 6],
        "cap_feat_dim": 16,
    },
    "UNet2DConditionModel": {
        "block_out_channels": [8, 16, 16],
        "transformer_layers_per_block": 1,
        "layers_per_block": 1,
        "attention_head_dim": [1, 2, 2],
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
    },
    "PixArtTransformer2DModel": {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "cross_attention_dim": 24,
        "caption_channels": 16,
    },
}


@dataclass
class RandomSet:
    """Latents and embeddings as a cache would hand them over, all of one length."""

    backbone: Any
    shape: tuple[int, ...]
    tokens: int

    def batch_rows(self, step: int, rows: list[int], batch: int, seed: int) -> list[int]:
        return rows

    def latents(self, index: list[int]) -> torch.Tensor:
        return torch.randn(len(index), *self.shape)

    def condition(self, index: list[int]) -> Any:
        return example_inputs(self.backbone, len(index), self.shape, self.tokens)[2]


def begin(case: str, method: str, batch: int, size: int, tokens: int, tiny: bool, device: torch.device) -> Run:
    """A run at its first step, with random weights made on the device."""
    recipe = recipe_of(case, method, batch, size, device.type)
    backbone = shapes(recipe.model, tiny, loaded_dtype(recipe))
    kind = type(backbone.transformer)
    torch.set_default_dtype(loaded_dtype(recipe))
    with torch.device(device):
        torch.manual_seed(0)
        backbone.transformer = kind.from_config(backbone.transformer.config).requires_grad_(False)
        for name, parameter in backbone.transformer.named_parameters():
            if "pad_token" in name:  # left as the memory was
                parameter.normal_()
    torch.set_default_dtype(torch.float32)
    objective = suited_objective(recipe, backbone)
    shape = backbone.latent_shape((size, size))
    roles = make_roles(backbone, recipe, objective.needs)
    null = example_inputs(backbone, 1, shape, tokens)[2].to(device)
    trainee = Trainee(roles.trained, optimizer_of(recipe, list(roles.trained.values())))
    data = RandomSet(backbone, shape, tokens)
    engine = Engine(roles.networks(null))
    return Run(recipe, Path("unused"), backbone, data, objective, roles, engine, {"student": trainee}, device)


def recipe_of(case: str, method: str, batch: int, size: int, device: str = "cpu") -> Recipe:
    """What a row measures, as a recipe."""
    given = CASES[case]
    return Recipe(
        output="unused",
        method=method,
        model=given.model,
        data=Data(size=size),
        tuning=given.tuning,
        optimizer=given.optimizer,
        batch=batch,
        precision="bf16",
        device=device,
    )


def planned_gib(row: dict[str, Any]) -> float:
    """What the plan says of a row, on any machine."""
    recipe = recipe_of(row["case"], row["method"], row["batch"], row["size"])
    return round(plan(recipe, tokens=row["tokens"]).peak / GIB, 2)


def plan_again(path: Path) -> None:
    """Write the plan beside what was measured."""
    result = json.loads(path.read_text())
    for row in result["rows"]:
        row["planned_gib"] = planned_gib(row)
    write_json(path, result)


def shapes(model: str, tiny: bool, dtype: torch.dtype) -> Any:
    """The backbone on the meta device; its transformer shrunk where `tiny`."""
    preset = json.loads(presets()[model].read_text())
    if tiny:
        network = preset.get("transformer") or preset["unet"]
        network |= TINY[network["_class_name"]]
    with tempfile.TemporaryDirectory() as folder:
        write_configs(preset, Path(folder))
        return load_backbone(folder, "meta", dtype)


def flops_a_row(run: Run) -> float:
    """Floating-point operations of one forward pass of one row."""
    inputs = example_inputs(run.backbone, 1, run.data.shape, run.data.tokens)
    x_t, t, c = (part.to(run.device) for part in inputs)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), torch.autocast(run.device.type, torch.bfloat16):
        run.backbone.velocity(run.backbone.transformer, x_t, t, c)
    return float(counter.get_total_flops())


def begin_or_none(case: str, method: str, given: argparse.Namespace, device: torch.device) -> Run | None:
    """A run of one case, whose batch is set for each row; None where the model alone has no room."""
    size, tokens = lengths(given)
    try:
        return begin(case, method, given.batches[0], size, tokens, given.tiny, device)
    except torch.OutOfMemoryError:
        return None


def lengths(given: argparse.Namespace) -> tuple[int, int]:
    """Side of the pictures and tokens of a prompt."""
    return (128, 8) if given.tiny else (512, 256)


def measure(run: Run | None, case: str, method: str, batch: int, given: argparse.Namespace) -> dict[str, Any]:
    """One row of the results. Memory is None where there is no GPU to ask."""
    size, tokens = lengths(given)
    result = {"case": case, "method": method, "batch": batch, "size": size, "tokens": tokens, "tiny": given.tiny}
    if run is None:
        return result | {"out_of_memory": True}
    on_gpu = run.device.type == "cuda"
    run.recipe = replace(run.recipe, batch=batch)
    empty()
    if on_gpu:  # what making the model took is not the step's
        torch.cuda.reset_peak_memory_stats()
    try:
        seconds, finite = timed_steps(run, given.steps)
    except torch.OutOfMemoryError:
        for trainee in run.trainees.values():  # the next batch begins without this one's gradients
            trainee.optimizer.zero_grad(set_to_none=True)
        return result | {"out_of_memory": True}
    passes = count_passes(run.objective, batch)
    tuning = run.recipe.tuning
    forwards = cost(passes, bool(tuning.checkpointing), frozen=tuning.kind == "lora")
    four_bits = [module for module in run.backbone.transformer.modules() if isinstance(module, FourBit)]
    work = None if four_bits else forwards * flops_a_row(run)  # the counter does not know products with four bits
    return result | {
        "parameters": sum(p.numel() for p in run.backbone.transformer.parameters())
        + sum(2 * module.codes.numel() for module in four_bits),
        "trained": sum(p.numel() for p in run.roles.trained.values()),
        "seconds": seconds,
        "finite": finite,
        "forward_rows": forwards / batch,
        "tflops_a_second": work and work / seconds / 1e12,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if on_gpu else None,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB if on_gpu else None,
    }


def timed_steps(run: Run, steps: int) -> tuple[float, bool]:
    """Median seconds a step, after two that are not counted; whether all were finite, since others move nothing."""
    measured, finite = [], True
    for _ in range(steps + 2):
        began = time.perf_counter()
        finite &= not training_step(run)["skipped"]
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        measured.append(time.perf_counter() - began)
    return statistics.median(measured[2:]), finite


def empty() -> None:
    """Give back the GPU's memory that nothing holds any more."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plan", type=Path)
    given = parser.parse_args(arguments)
    if given.plan:
        plan_again(given.plan)
        return []
    if not given.tiny and not torch.cuda.is_available():
        parser.error("real sizes need a GPU; --tiny checks the same path on a CPU")
    device = own_device("cuda" if torch.cuda.is_available() and not given.tiny else "cpu")
    results = []
    for case, method in product(given.cases, given.methods):
        run = begin_or_none(case, method, given, device)
        for batch in given.batches:
            results.append(measure(run, case, method, batch, given))
            print(json.dumps(results[-1]), flush=True)
            if given.output:
                write_json(given.output, {"rows": results} | provenance())
        del run
        empty()
    return results


if __name__ == "__main__":
    main()
