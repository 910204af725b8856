"""`apexflow plan`: counted on shapes, held against what is really saved; and every recipe that ships."""

from __future__ import annotations

import json
import re
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import Run, refused
from test_teacher import like

from apexflow.backbones import load_backbone
from apexflow.backbones.presets import load_shapes, presets
from apexflow.errors import UserError
from apexflow.objectives import objectives
from apexflow.training import plan as planning
from apexflow.training.config import Optimizer, Recipe, Tuning, load_recipe
from apexflow.training.loop import start, training_step
from apexflow.training.memory import activations, example_inputs, kept_for_backward, sizes_of
from apexflow.training.passes import Pass, cost, count_passes
from apexflow.training.plan import GIB, advise, plan, settled, shapes_of
from apexflow.training.roles import loaded_dtype
from apexflow.training.step import make_batch

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


def really_saved(run) -> int:
    """Bytes that autograd keeps at the end of the forward passes of a real micro-batch."""
    half = torch.autocast("cpu", torch.bfloat16, enabled=run.recipe.precision == "bf16")
    judges = [one for one in run.networks.further.values() if isinstance(one, torch.nn.Module)]
    with kept_for_backward([*run.roles.everything, *judges]) as kept:
        batch = make_batch(run, torch.arange(run.recipe.batch))
        with half:
            losses = run.objective(run.networks, batch, run.memory)
    assert losses.everything.requires_grad
    return kept.bytes


def moments_of(run) -> int:
    """Bytes that the optimizers keep, their counters of steps apart."""
    states = [state for trainee in run.trainees.values() for state in trainee.optimizer.state.values()]
    return sum(value.nbytes for state in states for name, value in state.items() if name != "step")


@pytest.mark.parametrize(
    ("precision", "kind", "checkpointing"),
    [("fp32", "full", True), ("fp32", "lora", False), ("bf16", "full", False), ("bf16", "lora", True)],
)
def test_the_plan_agrees_with_what_a_step_keeps(
    recipe_file: Path, kind: str, precision: str, checkpointing: bool
) -> None:
    options = [f"tuning.kind={kind}", f"tuning.checkpointing={str(checkpointing).lower()}", f"precision={precision}"]
    recipe = load_recipe(recipe_file, [*options, "tuning.rank=4", "batch=8"])
    run = start(recipe, resume=False)
    tokens = make_batch(run, torch.arange(8)).c.embeds.shape[1]
    found = plan(recipe, tokens=tokens)
    assert found.backward["activations"] == pytest.approx(really_saved(run), rel=0.15)
    assert (found.backward["one block again"] > 0) == checkpointing
    # The networks and the optimizer, to the byte.
    sizes = sizes_of(run.roles)
    assert found.backward["trained weights"] == sizes.trained and found.backward["frozen weights"] == sizes.frozen
    assert found.backward["average (EMA)"] == sizes.average
    training_step(run)
    assert found.backward["optimizer"] == moments_of(run)
    assert found.trainable == sum(p.numel() for p in run.roles.trained.values())
    assert found.host == sum(
        p.nbytes for p in load_backbone(recipe.model, dtype=loaded_dtype(recipe)).transformer.parameters()
    )


@pytest.mark.parametrize(
    ("method", "kind", "more"),
    [
        ("dmd2", "full", ["tuning.checkpointing=true"]),
        ("dmd2", "lora", ["tuning.checkpointing=false", "precision=bf16"]),
        ("sana_sprint", "lora", ["tuning.checkpointing=true"]),
        ("apex", "full", ["tuning.text_encoder=true", "tuning.checkpointing=false"]),
    ],
)
def test_further_networks_and_a_trained_text_encoder_are_counted(
    recipe_file: Path, method: str, kind: str, more: list[str]
) -> None:
    recipe = load_recipe(recipe_file, [f"method={method}", f"tuning.kind={kind}", "tuning.rank=4", *more])
    run = start(recipe, resume=False)
    tokens = make_batch(run, torch.arange(recipe.batch)).c.embeds.shape[1]
    found = plan(recipe, tokens=tokens)
    assert found.backward["activations"] == pytest.approx(really_saved(run), rel=0.15)
    others = [p for role, one in run.trainees.items() if role != "student" for p in one.parameters.values()]
    trained = sum(p.nbytes for p in run.roles.trained.values())
    assert found.backward["trained weights"] == trained
    assert found.backward["further networks"] == sum(p.nbytes for p in others)
    assert found.update["gradients"] == trained + sum(p.nbytes for p in others)
    for _ in range(2):  # sana_sprint's judge takes the odd turns
        training_step(run)
    assert found.backward["optimizer"] == moments_of(run)


def test_a_teacher_of_another_size_and_its_critic_are_counted(
    recipe_file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    larger = like(tiny_model, tmp_path / "larger", width=64, depth=6)  # deep enough to be extrapolated
    alone = load_recipe(recipe_file, ["method=dmd2", "tuning.checkpointing=true"])
    recipe = replace(alone, teacher=str(larger))
    run = start(recipe, resume=False)
    tokens = make_batch(run, torch.arange(recipe.batch)).c.embeds.shape[1]
    found, sizes = plan(recipe, tokens=tokens), sizes_of(run.roles)
    others = [p for role, one in run.trainees.items() if role != "student" for p in one.parameters.values()]
    assert found.backward["further networks"] == sum(p.nbytes for p in others)
    assert found.backward["frozen weights"] == sizes.frozen and found.backward["average (EMA)"] == sizes.average
    assert found.backward["activations"] == pytest.approx(really_saved(run), rel=0.15)
    assert found.backward["one block again"] > plan(alone, tokens=tokens).backward["one block again"]
    networks = (run.roles.backbone.transformer, run.roles.network("teacher"))
    assert found.host == sum(p.nbytes for network in networks for p in network.parameters())


def test_a_deep_network_is_extrapolated_from_a_shallow_one(tmp_path: Path) -> None:
    from apexflow.backbones.miniature import build_miniature
    from apexflow.data.scenes import vocabulary

    built = build_miniature(vocabulary(), seed=0, width=32, depth=6)
    built.save(tmp_path, built.settings)
    for checkpointing in (False, True):
        recipe = Recipe(output="x", model=str(tmp_path), tuning=Tuning(checkpointing=checkpointing))
        real = load_backbone(str(tmp_path))
        network = real.transformer.requires_grad_(True)
        if checkpointing:
            network.enable_gradient_checkpointing()
        backbone, passes = load_shapes(str(tmp_path)), [Pass("student", 4, True), Pass("student", 2, True)]
        found = activations(backbone, recipe, passes, (8, 8, 8), 16)
        with kept_for_backward([network]) as kept:
            alive = [real.velocity(network, *example_inputs(real, made.rows, (8, 8, 8), 16)) for made in passes]
        assert len(alive) == 2 and found.kept == pytest.approx(kept.bytes, rel=0.01)
        assert found.block < found.kept or checkpointing


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem.startswith("mini")], ids=lambda path: path.stem)
def test_the_miniature_s_recipes_parse(path: Path) -> None:
    assert load_recipe(path).output == f"runs/{path.stem}"


@pytest.mark.parametrize(
    "path", [path for path in RECIPES if not path.stem.startswith("mini")], ids=lambda path: path.stem
)
def test_the_other_recipes_parse_and_are_planned(path: Path) -> None:
    recipe, head = load_recipe(path), path.read_text()
    said = re.search(r"Planned memory: (\d+) GiB", head)
    asked = re.search(rf"apexflow plan recipes/{path.name}(?: --tokens (\d+))?(?: --gpus (\d+))?", head)
    assert said and asked
    assert "H200" in head.partition("# Hours:")[2].partition("output:")[0]  # measured there, or estimated from what was
    assert "--nnodes" not in head or "--rdzv-endpoint=" in head  # else each machine would wait for itself
    tokens, gpus = [number and int(number) for number in asked.groups()]
    found = plan(recipe, gpus or 1, tokens)
    assert 0 < found.peak < 80 * GIB
    assert round(found.peak / GIB) == int(said[1])
    if "qwen-image" in recipe.output:
        assert recipe.batch == 64 and recipe.precision == "bf16" and recipe.objective["path_weight"] == 1.0
        assert sum(p.numel() for p in shapes_of(recipe).transformer.parameters()) == 20_430_401_088
    if "qwen-image-lora-r" in recipe.output:
        assert found.trainable == {32: 212_336_640, 64: 424_673_280}[recipe.tuning.rank]
        assert found.peak < 62 * GIB  # the target for one 80 GB card
    if "24gb" in recipe.output:
        assert found.peak < 22 * GIB  # a card of 24 GB has 22.4 GiB


def test_advice_ends_where_it_fits() -> None:
    recipe = Recipe(output="x", batch=64)
    assert advise(recipe, 10_000 * GIB, tokens=16) == []
    most = plan(recipe, tokens=16).peak
    few = plan(replace(recipe, micro_batch=16, tuning=Tuning(checkpointing=True)), tokens=16).peak
    steps = advise(recipe, few, tokens=16)
    peaks = [most, *(found.peak for _, found in steps)]
    assert [change for change, _ in steps] == ["tuning.checkpointing=true", "micro_batch=16"]
    assert peaks == sorted(peaks, reverse=True) and peaks[-1] <= few < peaks[-2]


def test_what_did_not_help_is_advised_once_it_does() -> None:
    changes = ["model=Efficient-Large-Model/Sana_1600M_512px_diffusers", "data.size=512", "tuning.checkpointing=false"]
    recipe = replace(load_recipe(RECIPES[-1].parent / "sana-1.6b.yaml", changes), batch=1, micro_batch=None)
    found = advise(recipe, 6 * GIB, tokens=256)
    changes = [change for change, _ in found]
    assert changes.index("tuning.kind=lora") < changes.index("tuning.checkpointing=true")
    assert found[-1][1].peak <= 6 * GIB


def test_gradients_lie_beside_the_activations_only_where_rows_came_before(recipe_file: Path) -> None:
    whole = load_recipe(recipe_file, ["tuning.checkpointing=false"])
    first, parts = plan(whole, tokens=16), plan(replace(whole, micro_batch=2), tokens=16)
    room = plan(replace(whole, parallel="ddp"), gpus=2, tokens=16)
    assert first.backward["gradients"] == 0 < first.update["gradients"]
    assert parts.backward["gradients"] == room.backward["gradients"] == first.update["gradients"]
    both = plan(replace(whole, parallel="ddp", micro_batch=1), gpus=2, tokens=16)
    assert both.backward["gradients"] == 2 * first.update["gradients"]
    large = plan(replace(whole, batch=256), tokens=16)
    small = plan(replace(whole, model="mini-teacher", batch=1), tokens=16)
    assert (small.to_dict()["peak_in"], large.to_dict()["peak_in"]) == ("the optimizer's step", "backward")


@pytest.mark.parametrize(
    ("options", "advised"),
    [
        (["parallel=fsdp"], ["parallel=fsdp on 4 GPUs, with full precision again", "tuning.kind=lora"]),
        (["parallel=fsdp", "tuning.kind=lora"], ["parallel=fsdp on 4 GPUs, with full precision again"]),
        (["teacher=mini-teacher"], ["optimizer.kind=adamw8bit"]),  # below what two or four GPUs hold of it in full
    ],
)
def test_advice_keeps_to_what_goes_with_the_recipe(recipe_file: Path, options: list[str], advised: list[str]) -> None:
    recipe = load_recipe(recipe_file, [*options, "tuning.checkpointing=true", "micro_batch=1"])
    assert [change for change, _ in advise(recipe, 1, gpus=2, tokens=16)] == advised


def test_auto_is_planned_as_a_run_would_take_it(recipe_file: Path, run: Run) -> None:
    spare = ("model=mini-teacher", "tuning.checkpointing=true", "micro_batch=1")  # so that little is left to advise
    options = ("plan", recipe_file, *spare, "--tokens", 8, "--gpus", 2, "--json")
    for memory, sharded in ((0.1, True), (80, False)):
        assert ("one block whole" in json.loads(run(*options, "--memory", memory)[1])["parts_gib"]) == sharded
    recipe = Recipe(output="x", tuning=Tuning(checkpointing=True), batch=4, micro_batch=1)
    assert settled(recipe, 1, 1) == recipe and settled(recipe, 2, None).parallel == "ddp"
    advised = [change for change, _ in advise(settled(recipe, 2, 80 * GIB), 1, gpus=2, tokens=8)]
    assert "parallel=fsdp on 2 GPUs, with full precision again" in advised


def test_a_finished_cache_is_planned_at_its_own_size(
    recipe_file: Path, tiny_model: Path, scene_folder: Path, tmp_path: Path, run: Run
) -> None:
    assert run("cache", scene_folder, "-o", tmp_path / "c", "--model", tiny_model, "--size", 32)[0] == 0
    recipe = load_recipe(recipe_file, [f"data.source={tmp_path / 'c'}", "tuning.checkpointing=false"])
    assert recipe.data.size is None and settled(recipe, 1, None).data.size == 32
    own, cached = (plan(one, tokens=8).cached for one in (recipe, settled(recipe, 1, None)))
    assert cached < own


def test_a_judge_is_planned_at_the_run_s_size(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own may be none that it takes; and what is kept of its shapes for other plans is left as it is."""
    recipe = load_recipe(recipe_file, ["method=sana_sprint", "objective={}", "data.size=32"])
    backbone = copy(planning.shapes_of(recipe))
    backbone.settings = replace(backbone.settings, size=20)
    monkeypatch.setattr(planning, "shapes_of", lambda recipe: backbone)
    assert plan(recipe, tokens=8).backward["further networks"] > 0 and backbone.default_size == 20


def test_storage_in_eight_bits_and_sharding_shrink_what_they_should() -> None:
    recipe = Recipe(output="x", precision="bf16", batch=4, tuning=Tuning(kind="lora", checkpointing=False))
    plain, narrow = (
        plan(replace(recipe, tuning=replace(recipe.tuning, storage=kind)), tokens=16) for kind in (None, "fp8")
    )
    assert 0.5 < narrow.backward["frozen weights"] / plain.backward["frozen weights"] < 0.9
    assert narrow.backward["trained weights"] == plain.backward["trained weights"]
    full = replace(recipe, tuning=Tuning(checkpointing=False), batch=8)
    whole, shared = plan(full, 4, 16), plan(replace(full, parallel="fsdp"), 4, 16)
    for name in ("trained weights", "frozen weights", "average (EMA)", "gradients", "optimizer"):
        assert shared.update[name] == whole.update[name] // 4
    assert shared.host == whole.host // 4 and shared.saving == whole.host and whole.saving == 0
    for lora in (plain, narrow):  # the merged model, in the precision of the run
        assert lora.saving == plain.host + plain.update["average (EMA)"]


def test_presets_have_the_published_sizes() -> None:
    found = presets()
    assert {"Qwen/Qwen-Image", "black-forest-labs/FLUX.1-schnell"} <= set(found)
    for model in (
        "Efficient-Large-Model/Sana_600M_512px_diffusers",
        "Tongyi-MAI/Z-Image",
        "black-forest-labs/FLUX.2-klein-base-4B",
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
    ):
        backbone = load_shapes(model)
        count = sum(p.numel() for p in backbone.transformer.parameters())
        assert count == json.loads(found[model].read_text())["params"]["transformer"]
        assert next(backbone.transformer.parameters()).device.type == "meta"
    scales = [load_shapes(f"black-forest-labs/FLUX.2-klein-{name}").settings.guidance for name in ("base-4B", "4B")]
    assert scales == [4.0, 1.0]  # the index of the latter says that it is distilled
    with pytest.raises(UserError, match="give the folder"):
        load_shapes("someone/else")


def test_the_text_encoder_of_a_preset_is_there_to_be_counted() -> None:
    backbone = load_shapes("Efficient-Large-Model/Sana_600M_512px_diffusers")
    assert sum(p.numel() for p in backbone.text_encoder.parameters()) == 2_614_341_888


@pytest.mark.parametrize("method", objectives())
def test_passes_are_counted_for_every_method(method: str) -> None:
    passes = count_passes(Recipe(output="x", method=method).build_objective(), 8)
    assert sum(made.rows for made in passes if made.graph) >= 4
    assert cost(passes, checkpointing=True) > cost(passes) > 0


def test_passes_of_known_methods() -> None:
    matching = count_passes(objectives()["flow_matching"](), 8)
    assert matching == [Pass("student", 8, True)] and cost(matching) == 24 and cost(matching, True) == 32
    for path_rows, without in (
        ("all", 20),
        ("others", 12),
    ):  # teacher and secant on those rows, the real branch on half
        made = count_passes(objectives()["apex"](guidance=1.0, path_rows=path_rows), 8)
        assert sum(p.rows for p in made if p.graph) == 12  # the endpoint objective runs on its own rows alone
        assert sum(p.rows for p in made if not p.graph) == without


def test_eight_bits_go_with_a_lora_alone() -> None:
    with pytest.raises(ValueError, match="storage"):
        Recipe(output="x", tuning=Tuning(storage="fp8"), optimizer=Optimizer())


def test_a_batch_that_the_gpus_cannot_share_is_refused(recipe_file: Path, run: Run) -> None:
    refused(run("plan", recipe_file, "batch=6", "--gpus", 4), "batch 6 cannot be shared equally by 4 processes")
    spare = Recipe(output="x", batch=6, micro_batch=1, tuning=Tuning(checkpointing=True))
    advice = advise(spare, 1, tokens=16)
    assert [change for change, _ in advice if "parallel=fsdp" in change] == [
        "parallel=fsdp on 2 GPUs, with full precision again"
    ]
