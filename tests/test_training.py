"""The loop: roles, micro-batches, losses that are not finite, and a model that stock diffusers loads."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from little_runs import KINDS, METHODS, assert_same, method_overrides
from safetensors.torch import load_file

from apexflow.backbones import load_backbone, read_settings, write_settings
from apexflow.errors import Diverged, UserError
from apexflow.objectives import objectives
from apexflow.training import loop
from apexflow.training.checkpoint import checkpoints
from apexflow.training.config import Recipe, load_recipe
from apexflow.training.journal import read_metrics
from apexflow.training.loop import start, train
from apexflow.training.roles import FullRoles
from apexflow.training.run import Run, save
from apexflow.training.saving import shipped_settings
from apexflow.training.step import training_step


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_change_nothing(recipe_file: Path, tmp_path: Path, method: str) -> None:
    norms = []
    for size in (4, 3, 1):
        if method == "apex as printed" and size != 4:
            continue  # the buffer of recent generations grows within a step, as Algorithm 1 has it
        recipe = load_recipe(
            recipe_file, [*method_overrides(method), f"micro_batch={size}", f"output={tmp_path / str(size)}"]
        )
        norms.append(training_step(start(recipe, resume=False)))
    for other in norms[1:]:
        assert other["loss"] == pytest.approx(norms[0]["loss"], rel=1e-4)
        assert other["grad_norm"] == pytest.approx(norms[0]["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_lora_leaves_the_base_untouched_to_the_bit(recipe_file: Path, tiny_model: Path, method: str) -> None:
    run = start(
        load_recipe(recipe_file, [*method_overrides(method), "tuning.kind=lora", "tuning.rank=4"]), resume=False
    )
    before = {name: p.detach().clone() for name, p in run.roles.trained.items()}
    for _ in range(3):
        training_step(run)
    original = load_file(next((tiny_model / "transformer").glob("*.safetensors")))
    tuned = run.backbone.transformer.state_dict()
    for name, tensor in original.items():
        module, _, last = name.rpartition(".")
        found = tuned.get(name, tuned.get(f"{module}.base_layer.{last}"))
        assert found is not None and torch.equal(found, tensor), name
    assert any(not torch.equal(before[name], p) for name, p in run.roles.trained.items())


def test_lora_roles_are_three_models_on_one_base(recipe_file: Path) -> None:
    run = start(load_recipe(recipe_file, ["tuning.kind=lora", "tuning.rank=4", "ema_decay=0.5"]), resume=False)
    x, c = run.data.latents([0, 1]), run.data.condition([0, 1])
    t = torch.tensor([0.3, 1.0])
    with torch.no_grad():
        base = run.networks.teacher(x, t, c)
        assert torch.equal(run.networks.student(x, t, c), base)  # a fresh adapter adds nothing
    for _ in range(3):
        training_step(run)
    with torch.no_grad():
        student, average = run.networks.student(x, t, c), run.networks.reference(x, t, c)
        assert torch.equal(run.networks.teacher(x, t, c), base)
    assert not torch.equal(student, base)
    assert not torch.equal(student, average)


@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_model_answers_as_the_average_did(recipe_file: Path, kind: str) -> None:
    overrides = [f"tuning.kind={kind}", "tuning.rank=4", "tuning.alpha=8", "steps=3", "data.size=32"]
    run = start(load_recipe(recipe_file, overrides), resume=False)
    for _ in range(3):
        training_step(run)
    folder = loop.finish(run)
    assert (folder.parent / "lora" / "pytorch_lora_weights.safetensors").is_file() == (kind == "lora")
    x, t, c = run.data.latents([0, 1]), torch.tensor([0.4, 0.9]), run.data.condition([0, 1])
    loaded = load_backbone(str(folder))
    assert loaded.default_size == 32  # draws what it has learnt to draw
    if kind == "lora":  # the adapter alone too, whoever hands it over or merges it
        assert read_settings(folder.parent / "lora") == loaded.settings
    with torch.no_grad():
        expected = run.networks.reference(x, t, c)
        assert (loaded.velocity(loaded.transformer, x, t, c) - expected).abs().max() < 1e-5


def test_counters_are_resumed_and_time_goes_on(recipe_file: Path) -> None:
    run = start(load_recipe(recipe_file), resume=False)
    run.step, run.bad, run.seconds, run.device_seconds, run.peak_gib = 4, 4, 1000.0, 3000.0, 1000.0
    save(run)
    resumed = start(run.recipe, resume=True)
    assert (resumed.step, resumed.bad, resumed.seconds) == (4, 4, 1000.0)
    loop.steps(resumed)
    assert resumed.seconds > 1000
    # Begun by three processes and ended by one, which held less.
    assert resumed.device_seconds - 3000 == pytest.approx(resumed.seconds - 1000)
    loop.finish(resumed)
    told = json.loads((resumed.folder / "cost.json").read_text())
    assert (told["steps"], told["rows"], told["processes"]) == (6, 6 * run.recipe.batch, 1)
    assert told["peak_gib"] == 1000 and told["seconds"] / 3600 < told["device_hours"] < 1
    assert load_backbone(str(resumed.folder / "model")).settings.card.items() >= told.items()


def test_a_run_whose_scoring_fails_leaves_its_model_and_its_report(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loop, "evaluate", fail)
    run = start(load_recipe(recipe_file, ["steps=1", "suite=mini-geneval"]), resume=False)
    loop.steps(run)
    with pytest.raises(
        UserError, match=r"out of memory while scoring.*apexflow evaluate --model \S*model --suite mini-geneval"
    ):
        loop.finish(run)
    assert (run.folder / "report.html").is_file() and load_backbone(str(run.folder / "model"))


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="only Linux tells of its pages there")
def test_the_memory_that_a_process_held_is_counted(recipe_file: Path) -> None:
    run = start(load_recipe(recipe_file, ["steps=1"]), resume=False)
    loop.steps(run)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    assert 0.9 * resident < run.peak_gib < 100  # pages may have come since


@pytest.mark.parametrize(
    ("options", "steps", "guidance"),
    [
        (["method=flow_matching"], 20, 3.0),  # as the model before
        (["method=apex", "preview.steps=2", "preview.guidance=1.5"], 2, 1.5),
        (["method=cm"], 1, 1.0),
        (["method=apex", "sampling_steps=4", "sampling_guidance=2"], 4, 2.0),
        (["method=flow_matching", "sampling_steps=4"], 4, 3.0),
    ],
)
def test_a_student_is_sampled_as_its_previews_were(
    recipe_file: Path, tiny_model: Path, tmp_path: Path, options: list[str], steps: int, guidance: float
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    before = json.loads((model / "apexflow.json").read_text())
    (model / "apexflow.json").write_text(json.dumps(before | {"steps": 20, "guidance": 3.0}))
    saved = load_backbone(str(train(load_recipe(recipe_file, [f"model={model}", "steps=1", *options])))).settings
    assert (saved.steps, saved.guidance) == (steps, guidance)


@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("method", objectives())
def test_a_student_takes_its_method_s_sampler_along(tiny_model: Path, tmp_path: Path, method: str, steps: int) -> None:
    recipe = Recipe("out", method, sampling_steps=steps)
    write_settings(tmp_path, shipped_settings(load_backbone(str(tiny_model), "meta"), recipe, {}))
    found = read_settings(tmp_path)
    sampler = {"kappa": found.kappa, "rho": found.rho, "order": found.order}
    assert found.steps == steps and sampler == objectives()[method].sampling(steps)
    for others in (1, 4, 7, 8, 20):  # and what it samples with in other numbers of steps
        assert found.sampler(others) == objectives()[method].sampling(others)


def test_the_saved_model_loads_in_the_stock_pipeline(recipe_file: Path) -> None:
    from diffusers import SanaPipeline

    folder = train(load_recipe(recipe_file, ["steps=1"]))
    pipeline = SanaPipeline.from_pretrained(folder)
    ours = load_backbone(str(folder))
    z = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    stock = pipeline(
        "a photo of a red star",
        num_inference_steps=1,
        guidance_scale=1.0,
        height=64,
        width=64,
        latents=z,
        output_type="latent",
        complex_human_instruction=None,
        max_sequence_length=32,
        use_resolution_binning=False,
    ).images
    with torch.no_grad():
        one = torch.ones(1)
        F = ours.velocity(ours.transformer, z, one, ours.encode_prompts(["a photo of a red star"]))
    assert (ours.transport.endpoint(F, z, one) - stock).abs().max() < 1e-5


def test_bf16_keeps_what_is_frozen_narrow_and_what_is_trained_in_float32(recipe_file: Path) -> None:
    for kind in KINDS:
        overrides = [f"tuning.kind={kind}", "tuning.rank=4", "precision=bf16", f"output={recipe_file.parent / kind}"]
        run = start(load_recipe(recipe_file, overrides), resume=False)
        numbers = [training_step(run) for _ in range(2)]
        assert all(n["skipped"] == 0 and n["grad_norm"] > 0 for n in numbers)
        kept = [*run.trained.values(), *run.roles.average.values()]
        kept += [t for s in run.trainees["student"].optimizer.state.values() for t in s.values()]
        assert {t.dtype for t in kept} == {torch.float32}
        frozen = run.roles.teacher if isinstance(run.roles, FullRoles) else run.backbone.transformer
        assert {p.dtype for n, p in frozen.named_parameters() if ".lora_" not in n} == {torch.bfloat16}
        assert loop.finish(run).is_dir()


def test_a_micro_batch_may_have_no_row_to_generate_from(recipe_file: Path, tmp_path: Path) -> None:
    numbers = []
    for size in (4, 1):
        overrides = ["objective.path_weight=0", "objective.share=0.25", f"micro_batch={size}"]
        recipe = load_recipe(recipe_file, [*overrides, f"output={tmp_path / str(size)}"])
        numbers.append(training_step(start(recipe, resume=False)))
    assert numbers[1]["loss"] == pytest.approx(numbers[0]["loss"], rel=1e-4)
    assert numbers[1]["grad_norm"] == pytest.approx(numbers[0]["grad_norm"], rel=1e-3)


def test_a_non_finite_loss_is_skipped_counted_and_ends_the_run(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(load_recipe(recipe_file, ["bad_steps=3"]), resume=False)
    before = {name: p.detach().clone() for name, p in run.roles.trained.items()}
    shape = run.data.latents([0]).shape[1:]
    monkeypatch.setattr(run.data, "latents", lambda rows: torch.full((len(rows), *shape), float("nan")))
    assert training_step(run)["skipped"] == 1
    training_step(run)
    assert_same(before, {name: p.detach() for name, p in run.roles.trained.items()})
    run.step, run.bad = 1, 2
    with pytest.raises(UserError, match=r"not finite for 3 steps in a row \(step 1\): lower optimizer.learning_rate$"):
        training_step(run)
    save(run)
    with pytest.raises(UserError, match=r"; the last checkpoint is .*checkpoints/step-0000001$"):
        training_step(run)


def test_checkpoints_from_before_a_loss_was_not_finite_are_not_pushed_out(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = loop.training_step

    def then_bad(run: Run) -> dict[str, float]:
        if run.step == 2:
            shape = run.data.latents([0]).shape[1:]
            monkeypatch.setattr(run.data, "latents", lambda rows: torch.full((len(rows), *shape), float("nan")))
        return good(run)

    monkeypatch.setattr(loop, "training_step", then_bad)
    overrides = ["steps=20", "checkpoint_every=1", "keep=2", "bad_steps=4"]
    with pytest.raises(Diverged, match=r"the last checkpoint is .*step-0000002$"):
        train(load_recipe(recipe_file, overrides))
    left = [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")]
    assert left == ["step-0000001", "step-0000002"]


def test_a_stop_while_losses_are_not_finite_deletes_no_checkpoint(recipe_file: Path) -> None:
    run = start(load_recipe(recipe_file, ["keep=1"]), resume=False)
    for step, bad, left in ((1, 0, [1]), (3, 2, [1, 3]), (4, 0, [4])):
        run.step, run.bad = step, bad
        found = checkpoints(save(run).parent)
        assert [path.name for path in found] == [f"step-{number:07d}" for number in left]


@pytest.mark.parametrize("tuned", ["tuning.kind=full", "tuning.kind=lora", "tuning.text_encoder=true"])
def test_weights_that_are_not_finite_are_not_saved_as_a_model(recipe_file: Path, tmp_path: Path, tuned: str) -> None:
    run = start(load_recipe(recipe_file, [tuned]), resume=False)
    list(run.roles.average.values())[-1].view(-1)[0] = float("nan")
    with pytest.raises(Diverged, match=r"are not finite, so no model was saved: .*--resume"):
        loop.finish(run)
    assert not (tmp_path / "run" / "model").exists() and not (tmp_path / "run" / "lora").exists()


def test_a_run_too_short_for_the_limit_fails_too_and_says_nothing_that_is_no_json(
    recipe_file: Path, tmp_path: Path
) -> None:
    wild = ["steps=6", "optimizer.learning_rate=1e30", "optimizer.warmup=0", f"output={tmp_path / 'wild'}"]
    with pytest.raises(UserError, match="not finite for 3 steps"):
        train(load_recipe(recipe_file, wild))
    assert not (tmp_path / "wild" / "model").exists()
    lines = (tmp_path / "wild" / "metrics.jsonl").read_text().splitlines()
    assert any("null" in line for line in lines)
    for line in lines:
        json.loads(line, parse_constant=pytest.fail)
    assert [one["step"] for one in read_metrics(tmp_path / "wild")] == list(range(1, len(lines) + 1))


def test_a_run_leaves_curves_grids_and_a_report(recipe_file: Path, tmp_path: Path) -> None:
    model = train(load_recipe(recipe_file))
    folder = tmp_path / "run"
    assert [m["step"] for m in read_metrics(folder)] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "path", "adv", "shift", "grad_norm", "learning_rate"} <= set(read_metrics(folder)[0])
    assert {p.name for p in (folder / "previews").iterdir()} == {
        f"step-000000{n}.{kind}" for n in "36" for kind in ("png", "json")
    }
    assert list((folder / "tensorboard").iterdir())
    assert (folder / "report.html").stat().st_size > 10_000
    assert (model / "model_index.json").is_file()


def test_adam_in_eight_bits_is_an_extra(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r"bitsandbytes: pip install 'apexflow\[8bit\]'"):
        start(load_recipe(recipe_file, ["optimizer.kind=adamw8bit"]), resume=False)
    with pytest.raises(UserError, match="sharded"):
        load_recipe(recipe_file, ["optimizer.kind=adamw8bit", "parallel=fsdp"])
