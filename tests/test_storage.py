"""A LoRA's base in eight or four bits: the gradients of the base that it is, its merge, what it takes, and the extra."""

from __future__ import annotations

import sys
import weakref
from dataclasses import replace
from pathlib import Path

import four_bit
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from apexflow.backbones import load_backbone
from apexflow.backbones.miniature import build_miniature
from apexflow.backbones.storage import FourBit
from apexflow.data.scenes import vocabulary
from apexflow.errors import UserError
from apexflow.lora.merge import FILE, Pair
from apexflow.objectives import objectives
from apexflow.training.config import Recipe, Tuning, load_recipe
from apexflow.training.journal import read_metrics
from apexflow.training.loop import finish, start, train, training_step
from apexflow.training.memory import network_sizes
from apexflow.training.plan import plan, shapes_of
from apexflow.training.run import Run
from apexflow.training.sharding import gathered
from apexflow.training.step import make_batch


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose matrices have rows of whole blocks, which the smallest one has not."""
    folder = tmp_path_factory.mktemp("wide")
    backbone = build_miniature(vocabulary(), seed=0, width=64, depth=1)
    backbone.save(folder, backbone.settings)
    return folder


def gradients_of(run: Run) -> dict[str, torch.Tensor]:
    """Gradients of one step, by name."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in run.roles.trained.items():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: found.update({name: p.grad.clone()}))
    training_step(run)
    return found


def stored(network: nn.Module, kind: str) -> dict[str, torch.Tensor]:
    """The weights that are kept narrow, as they act."""
    if kind == "nf4":
        return {f"{name}.weight": m.whole() for name, m in network.named_modules() if isinstance(m, FourBit)}
    return {name: p.float() for name, p in network.named_parameters() if p.dtype == torch.float8_e4m3fn}


@pytest.mark.parametrize(
    ("kind", "checkpointing"), [("fp8", "true"), ("fp8", "false"), ("nf4", "true"), ("nf4", "false")]
)
def test_a_narrow_base_gives_the_gradients_of_the_base_that_it_is(
    recipe_file: Path, wide_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, checkpointing: str
) -> None:
    four_bit.use(monkeypatch)
    common = [f"model={wide_model}", "tuning.kind=lora", "tuning.rank=4", f"tuning.checkpointing={checkpointing}"]
    runs = []
    for name in ("narrow", "rounded"):
        storage = [f"tuning.storage={kind}"] if name == "narrow" else []
        runs.append(start(load_recipe(recipe_file, [*common, *storage, f"output={tmp_path / name}"]), resume=False))
    narrow = stored(runs[0].backbone.transformer, kind)
    rounded = dict(runs[1].backbone.transformer.named_parameters())
    assert any("to_q.base_layer.weight" in name for name in narrow) and not any("lora_" in name for name in narrow)
    with torch.no_grad():
        for name, weight in narrow.items():
            error = (rounded[name] - weight).abs().max() / rounded[name].abs().max()
            assert 0 < error < (0.2 if kind == "nf4" else 0.07)
            rounded[name].copy_(weight)  # float32, but no finer than what is stored
    gradients = [gradients_of(run) for run in runs]
    assert gradients[0].keys() == gradients[1].keys() == runs[0].roles.trained.keys()
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-6) for name in gradients[0])
    assert any(float(gradient.abs().max()) > 1e-6 for gradient in gradients[0].values())
    model = load_backbone(str(finish(runs[0])))  # merged in the run's precision, not in eight or four bits
    x, t = torch.randn(2, 8, 8, 8), torch.tensor([0.4, 0.9])
    c = make_batch(runs[0], torch.arange(2)).c
    with torch.no_grad():
        assert torch.allclose(
            model.velocity(model.transformer, x, t, c), runs[0].networks.reference(x, t, c), atol=1e-5
        )


# Every method in eight bits; in four, where nothing else differs by method, one with and one without further networks.
@pytest.mark.parametrize(
    ("method", "kind"), [*((one, "fp8") for one in objectives()), ("apex", "nf4"), ("dmd2", "nf4")]
)
def test_a_run_in_bf16_from_a_narrow_base_draws_on_its_way(
    recipe_file: Path, wide_model: Path, monkeypatch: pytest.MonkeyPatch, method: str, kind: str
) -> None:
    four_bit.use(monkeypatch)
    given = ["tuning.kind=lora", "tuning.rank=4", f"tuning.storage={kind}", "precision=bf16", f"model={wide_model}"]
    recipe = load_recipe(recipe_file, [*given, f"method={method}", "steps=2", "preview.every=1"])
    if getattr(objectives()[method](), "derivative", None) == "jvp":
        with pytest.raises(
            UserError, match=f"jvp is not possible on a base in {kind}: set the method's derivative to diff"
        ):
            train(recipe)
        recipe = replace(recipe, objective={"derivative": "difference"})
    train(recipe)
    assert len(list((Path(recipe.output) / "previews").glob("*.png"))) == 2
    assert not any(line["skipped"] for line in read_metrics(Path(recipe.output)))


def test_a_derivative_within_a_method_is_refused_on_a_narrow_base_too(recipe_file: Path) -> None:
    given = ["tuning.kind=lora", "tuning.storage=fp8", "method=sana_sprint", "objective.scm.derivative=jvp"]
    with pytest.raises(UserError, match="jvp is not possible on a base in fp8"):
        start(load_recipe(recipe_file, given), resume=False)


def test_four_bits_take_half_a_byte_and_their_scales(
    recipe_file: Path, wide_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    four_bit.use(monkeypatch)
    tuning = ["tuning.kind=lora", "tuning.rank=4", "tuning.storage=nf4"]
    recipe = load_recipe(recipe_file, [*tuning, f"model={wide_model}", "precision=bf16"])
    network = start(recipe, resume=False).backbone.transformer
    layers = [module for module in network.modules() if isinstance(module, FourBit)]
    for layer in layers:
        count = layer.in_features * layer.out_features
        assert layer.codes.nbytes == count // 2 and layer.scales.nbytes == 4 * -(-count // 64)
    rest = {n: p for n, p in network.named_parameters() if "lora_" not in n}
    buffers = sum(buffer.nbytes for buffer in network.buffers())  # codes and scales among them
    assert len(layers) > 5 and all(p.dtype == torch.bfloat16 for p in rest.values())
    frozen = plan(recipe, tokens=16).backward["frozen weights"]
    assert frozen == buffers + sum(p.nbytes for p in rest.values())


def test_a_large_base_in_four_bits_is_planned_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    tuning = Tuning(kind="lora", checkpointing=True)
    recipe = Recipe(output="x", model="Qwen/Qwen-Image", precision="bf16", batch=1, tuning=tuning)
    plain, eight, four = (
        network_sizes(shapes_of(recipe), replace(recipe, tuning=replace(tuning, storage=kind)), (), 16)
        for kind in (None, "fp8", "nf4")
    )
    assert eight.frozen / plain.frozen == pytest.approx(0.5, abs=0.01)
    assert four.frozen / plain.frozen == pytest.approx((0.5 + 4 / 64) / 2, abs=0.01)
    assert four.trained == plain.trained == 4 * 212_336_640


def test_a_base_in_four_bits_is_merged_one_matrix_at_a_time(
    recipe_file: Path, wide_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    four_bit.use(monkeypatch)
    common = [f"model={wide_model}", "tuning.kind=lora", "tuning.rank=4", "tuning.storage=nf4"]
    run = start(load_recipe(recipe_file, common), resume=False)
    network = run.backbone.transformer
    under_adapters = {
        id(m.base_layer) for m in network.modules() if isinstance(getattr(m, "base_layer", None), FourBit)
    }
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    whole = FourBit.whole

    def counted(layer: FourBit) -> torch.Tensor:
        weight = whole(layer)
        if id(layer) in under_adapters:  # others are the merged model's own, as they are
            made.append(weakref.ref(weight))
            alive.append(sum(other() is not None for other in made))
        return weight

    monkeypatch.setattr(FourBit, "whole", counted)
    run.roles.final()
    assert len(alive) == len(under_adapters) > 3 and max(alive) <= 2  # the one before, until it has been left


def test_what_is_saved_lies_in_main_memory() -> None:
    with FakeTensorMode():  # knows of a GPU without having one
        weights = {"a": torch.ones(2, device="cuda"), "b": torch.ones(3, device="cuda")}
        seen: list[str] = []
        found = gathered(weights.items(), lambda name, weight: seen.append(weight.device.type) or 2 * weight)
    assert seen == ["cuda", "cuda"] and {weight.device.type for weight in found.values()} == {"cpu"}


def test_an_adapter_is_saved_though_its_merge_fails(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(load_recipe(recipe_file, ["tuning.kind=lora", "tuning.rank=4"]), resume=False)

    def no_room(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Pair, "delta", no_room)
    with pytest.raises(torch.OutOfMemoryError):
        finish(run)
    assert (run.folder / "lora" / FILE).is_file() and not (run.folder / "model").exists()


def test_four_bits_are_an_extra(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(UserError, match=r"storage nf4 needs bitsandbytes: pip install 'apexflow\[4bit\]'"):
        start(load_recipe(recipe_file, ["tuning.kind=lora", "tuning.storage=nf4"]), resume=False)
    with pytest.raises(UserError, match="does not work with parallel=fsdp"):
        load_recipe(recipe_file, ["tuning.kind=lora", "tuning.storage=nf4", "parallel=fsdp"])
