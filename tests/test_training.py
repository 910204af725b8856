"""The loop: exact resume, micro-batches, roles, checkpoints that survive, and a model that stock diffusers loads."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from full_disk import file_size_limit
from interrupted import train_in_parts
from processes import command, launch, until, wait
from safetensors.torch import load_file, save_file

from apexflow.backbones import load_backbone
from apexflow.errors import Diverged, UserError
from apexflow.training import loop
from apexflow.training.checkpoint import checkpoints, load_checkpoint
from apexflow.training.config import load_recipe
from apexflow.training.journal import last_step, read_metrics
from apexflow.training.loop import start, train
from apexflow.training.roles import FullRoles
from apexflow.training.run import Trainee, _optimizer_targets, save
from apexflow.training.step import training_step

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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_resume_after_a_stop_is_exact(recipe_file: Path, tmp_path: Path, method: str, kind: str) -> None:
    common = [*method_overrides(method), f"tuning.kind={kind}", "tuning.rank=4"]
    whole = load_recipe(recipe_file, [*common, f"output={tmp_path / 'whole'}"])
    train(whole)
    parts = load_recipe(recipe_file, [*common, f"output={tmp_path / 'parts'}"])
    train_in_parts(parts)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    losses = [[m["loss"] for m in read_metrics(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0][2:] == losses[1]


def test_kill_and_resume_equals_an_uninterrupted_run(recipe_file: Path, tmp_path: Path) -> None:
    overrides = ["train", str(recipe_file), "steps=40", "checkpoint_every=3", "preview.every=100"]
    assert wait(launch(command, 1, *overrides, f"output={tmp_path / 'whole'}")) == [0]
    killed = launch(command, 1, *overrides, f"output={tmp_path / 'killed'}")
    until(lambda: checkpoints(tmp_path / "killed" / "checkpoints"), killed)
    os.kill(killed[0].pid, signal.SIGKILL)
    assert wait(killed) == [-signal.SIGKILL]
    assert wait(launch(command, 1, *overrides, f"output={tmp_path / 'killed'}", "--resume")) == [0]
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    steps = [m["step"] for m in read_metrics(tmp_path / "killed")]
    assert steps == list(range(1, 41))


def test_sigterm_saves_and_says_how_to_go_on(recipe_file: Path, tmp_path: Path) -> None:
    arguments = ["train", str(recipe_file), "steps=100000", "checkpoint_every=100000"]
    process = launch(command, 1, *arguments, errors=tmp_path / "errors")
    until(lambda: read_metrics(tmp_path / "run"), process)
    os.kill(process[0].pid, signal.SIGTERM)
    assert wait(process) == [130]
    errors = (tmp_path / "errors-0").read_text()
    assert "--resume" in errors and "Traceback" not in errors
    assert checkpoints(tmp_path / "run" / "checkpoints")


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
    recipe = load_recipe(recipe_file, [f"tuning.kind={kind}", "tuning.rank=4", "steps=3", "data.size=32"])
    run = start(recipe, resume=False)
    for _ in range(3):
        training_step(run)
    folder = loop.finish(run)
    assert (folder.parent / "lora" / "pytorch_lora_weights.safetensors").is_file() == (kind == "lora")
    x, t, c = run.data.latents([0, 1]), torch.tensor([0.4, 0.9]), run.data.condition([0, 1])
    loaded = load_backbone(str(folder))
    assert loaded.default_size == 32  # draws what it has learnt to draw
    with torch.no_grad():
        expected = run.networks.reference(x, t, c)
        assert (loaded.velocity(loaded.transformer, x, t, c) - expected).abs().max() < 1e-5


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
    shape = run.data.index["latent_shape"]
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


@pytest.mark.parametrize("tuned", ["tuning.kind=full", "tuning.kind=lora", "tuning.text_encoder=true"])
def test_weights_that_are_not_finite_are_not_saved_as_a_model(recipe_file: Path, tmp_path: Path, tuned: str) -> None:
    run = start(load_recipe(recipe_file, [tuned]), resume=False)
    list(run.roles.average.values())[-1].view(-1)[0] = float("nan")
    with pytest.raises(Diverged, match=r"are not finite, and no model is saved .*--resume"):
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


def test_a_full_disk_leaves_the_last_good_checkpoint(recipe_file: Path, tmp_path: Path) -> None:
    run = start(load_recipe(recipe_file), resume=False)
    training_step(run)
    good = save(run)
    training_step(run)

    with file_size_limit(1000), pytest.raises(UserError, match=r"cannot save .*free some space"):
        save(run)
    assert not list((tmp_path / "run" / "checkpoints").glob(".partial-*"))
    assert checkpoints(tmp_path / "run" / "checkpoints") == [good]
    assert load_checkpoint(good).state["step"] == 1


def test_a_run_whose_time_is_up_is_saved_once(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file, ["minutes=1e-6"])  # a step, then the time is up
    train(recipe)
    (saved,) = checkpoints(tmp_path / "run" / "checkpoints")
    before = (saved / "state.json").stat().st_ino
    train(recipe, resume=True)
    assert checkpoints(saved.parent) == [saved] and (saved / "state.json").stat().st_ino == before
    assert [p.name for p in (tmp_path / "run" / "previews").iterdir()] == ["step-0000001.png"]


def test_a_run_whose_checkpoints_are_gone_is_not_begun_again(recipe_file: Path, tmp_path: Path) -> None:
    recipe, folder = load_recipe(recipe_file), tmp_path / "run"
    train(recipe)
    shutil.rmtree(folder / "checkpoints")
    metrics = folder / "metrics.jsonl"
    before = metrics.read_text()
    with pytest.raises(UserError, match=r"trained 6 steps and holds no whole checkpoint: put .*checkpoints back, or "):
        train(recipe, resume=True)
    assert metrics.read_text() == before
    metrics.write_text(before.splitlines()[0] + "\n[]\n")  # as a run that was killed before its first checkpoint
    train(recipe, resume=True)
    assert [m["step"] for m in read_metrics(folder)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("odd", ["no text", "a folder", "a file for the curves"])
def test_what_lies_in_the_place_of_the_curves_is_named(recipe_file: Path, tmp_path: Path, odd: str) -> None:
    train(load_recipe(recipe_file, ["steps=2"]))
    metrics, board = tmp_path / "run" / "metrics.jsonl", tmp_path / "run" / "tensorboard"
    if odd == "no text":
        metrics.write_bytes(b"\xff\xfe{}")
    elif odd == "a folder":
        metrics.unlink()
        metrics.mkdir()
    else:
        shutil.rmtree(board)
        board.write_text("mine")
    with pytest.raises(
        UserError, match="tensorboard: a file lies where" if "curves" in odd else "cannot read .*metrics"
    ):
        train(load_recipe(recipe_file, ["steps=4"]), resume=True)
    assert len(checkpoints(tmp_path / "run" / "checkpoints")) == 1


def test_lines_that_tell_no_step_count_for_none(tmp_path: Path) -> None:
    lines = ['{"step": 3}', '{"step": 1e999}', '{"step": -Infinity}', f'{{"step": {10**400}}}', "[" * 10**5]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert last_step(tmp_path) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [("steps=5", "made 6 steps already"), ("optimizer.learning_rate=0.5", "learning_rate 0.5 instead of")],
)
def test_a_run_with_no_step_left_keeps_the_settings_that_made_it(
    recipe_file: Path, tmp_path: Path, change: str, words: str
) -> None:
    train(load_recipe(recipe_file))
    kept = (tmp_path / "run" / "recipe.json").read_text()
    with pytest.raises(UserError, match=words):
        train(load_recipe(recipe_file, [change]), resume=True)
    assert (tmp_path / "run" / "recipe.json").read_text() == kept
    train(load_recipe(recipe_file, ["keep=1"]), resume=True)  # changes no step: what is left of the run is made


def test_a_run_whose_time_is_up_keeps_the_settings_that_made_it(recipe_file: Path, tmp_path: Path) -> None:
    train(load_recipe(recipe_file, ["minutes=1e-6"]))
    with pytest.raises(UserError, match="no step left after the 1 that it made"):
        train(load_recipe(recipe_file, ["minutes=1e-6", "ema_decay=0.5"]), resume=True)
    train(load_recipe(recipe_file, ["minutes=1", "ema_decay=0.5"]), resume=True)
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["ema_decay"] == 0.5


def test_old_checkpoints_are_dropped(recipe_file: Path, tmp_path: Path) -> None:
    train(load_recipe(recipe_file, ["keep=2"]))
    assert [p.name for p in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-0000004", "step-0000006"]


def test_a_copy_among_the_checkpoints_is_neither_resumed_nor_deleted(recipe_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    train(load_recipe(recipe_file, ["steps=2"]))
    copies = ["step-2", "step-best", "step-0000002-backup", "step-00000002"]
    for name in copies:
        shutil.copytree(folder / "step-0000002", folder / name)
    train(load_recipe(recipe_file, ["keep=1"]), resume=True)
    assert sorted(p.name for p in folder.iterdir()) == sorted(["step-0000006", *copies])
    assert [m["step"] for m in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    # A name that a run might give: the state tells, and what was saved after it is no older for it.
    ahead = shutil.copytree(folder / "step-0000006", folder / "step-0000009")
    with pytest.raises(UserError, match=r"step-0000009 is damaged \(it was saved at step 6\): delete it"):
        train(load_recipe(recipe_file, ["steps=8"]), resume=True)
    run = start(load_recipe(recipe_file, [f"output={tmp_path / 'other'}"]), resume=False)
    (tmp_path / "other" / "checkpoints").mkdir()
    ahead.rename(tmp_path / "other" / "checkpoints" / ahead.name)
    for _ in range(3):
        training_step(run)
        save(run)
    assert [p.name for p in checkpoints(tmp_path / "other" / "checkpoints")][-2:] == ["step-0000003", ahead.name]


def test_checkpoints_are_ordered_by_number(tmp_path: Path) -> None:
    names = ["step-0000002", "step-9999999", "step-10000000"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{}")
    assert [p.name for p in checkpoints(tmp_path)] == names


STATES = {"list": [], "sizes": {"sizes": []}, "world": {"world": None}, "recipe": {"recipe": None}}
STATES |= {"no sizes": {"sizes": {}}, "no world": {"world": 0}, "less than no world": {"world": -1}, "bad": {"bad": -1}}
STATES |= {"before": {"step": -5}, "true": {"step": True}, "other step": {"step": 3}, "back in time": {"seconds": -1e9}}
STATES |= {"no time": {"seconds": float("nan")}, "without end": {"seconds": float("inf")}}


@pytest.mark.parametrize("damage", ["truncate", "remove", "foreign", "garbage", *STATES])
def test_a_damaged_checkpoint_is_named(recipe_file: Path, tmp_path: Path, damage: str) -> None:
    train(load_recipe(recipe_file, ["steps=2"]))
    last = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    file = next(last.glob("*.safetensors"))
    if damage == "truncate":
        os.truncate(file, file.stat().st_size // 2)
    elif damage == "remove":
        file.unlink()
    elif damage == "garbage":
        file.write_bytes(b"x" * file.stat().st_size)
    elif damage in STATES:
        state = json.loads((last / "state.json").read_text())
        damaged = STATES[damage]
        (last / "state.json").write_text(json.dumps(state | damaged if isinstance(damaged, dict) else damaged))
    else:
        state = json.loads((last / "state.json").read_text())
        save_file({"trained/other": torch.zeros(2)}, file)
        state["sizes"][file.name] = file.stat().st_size
        (last / "state.json").write_text(json.dumps(state))
    kept = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="step-0000002"):
        train(load_recipe(recipe_file, ["steps=4"]), resume=True)
    assert all(path.read_bytes() == content for path, content in kept.items())


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("/step", "lacks step of transformer"),
        ("/exp_avg", r"lacks exp_avg of transformer\S+, which optimizer.kind=adamw needs: delete it"),
        ("", "lacks the optimizer's state: delete it"),
    ],
)
def test_a_checkpoint_without_a_part_of_the_optimizer_is_not_resumed(
    recipe_file: Path, tmp_path: Path, lost: str, words: str
) -> None:
    train(load_recipe(recipe_file, ["steps=2"]))
    (last,) = checkpoints(tmp_path / "run" / "checkpoints")
    (file,) = last.glob("*.safetensors")
    tensors, state = load_file(file), json.loads((last / "state.json").read_text())
    gone = [name for name in tensors if name.startswith("optimizer/") and name.endswith(lost)]
    for name in gone[:1] if lost else gone:
        del tensors[name]
    save_file(tensors, file)
    state["sizes"][file.name] = file.stat().st_size
    (last / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=words):
        start(load_recipe(recipe_file, ["steps=4"]), resume=True)


def test_a_run_without_a_finite_step_has_no_moments_and_is_resumed(recipe_file: Path, tmp_path: Path) -> None:
    run = start(load_recipe(recipe_file), resume=False)
    run.step = run.bad = 1
    save(run)
    assert start(load_recipe(recipe_file), resume=True).bad == 1


def test_a_run_leaves_curves_grids_and_a_report(recipe_file: Path, tmp_path: Path) -> None:
    model = train(load_recipe(recipe_file))
    folder = tmp_path / "run"
    assert [m["step"] for m in read_metrics(folder)] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "path", "adv", "shift", "grad_norm", "learning_rate"} <= set(read_metrics(folder)[0])
    assert sorted(p.name for p in (folder / "previews").iterdir()) == ["step-0000003.png", "step-0000006.png"]
    assert list((folder / "tensorboard").iterdir())
    assert (folder / "report.html").stat().st_size > 10_000
    assert (model / "model_index.json").is_file()


def test_adam_in_eight_bits_is_an_extra(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r"bitsandbytes: pip install 'apexflow\[8bit\]'"):
        start(load_recipe(recipe_file, ["optimizer.kind=adamw8bit"]), resume=False)
    with pytest.raises(UserError, match="sharded"):
        load_recipe(recipe_file, ["optimizer.kind=adamw8bit", "parallel=fsdp"])


class CountingAdam(torch.optim.Optimizer):
    """Keeps state as the optimizer in eight bits does: a plain number of steps, moments as bytes, and a table."""

    def __init__(self, parameters: list, lr: float, **_: object) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state |= {"step": 0, "qmap1": torch.zeros(5)}
                state |= {key: torch.zeros_like(parameter, dtype=torch.uint8) for key in ("state1", "state2")}
            assert isinstance(state["step"], int)
            state["step"] += 1
            state["state1"] += 1
            state["qmap1"] += parameter.grad.abs().max()
            parameter.data -= self.param_groups[0]["lr"] * state["qmap1"].sum() * parameter.grad


@pytest.mark.parametrize("fused", [True, None])
def test_a_fused_optimizer_counts_its_steps_beside_the_weights(fused: bool | None) -> None:
    parameter = torch.nn.Parameter(torch.empty(3, device="meta"))
    optimizer = torch.optim.AdamW([parameter])
    optimizer.defaults["fused"] = fused  # which refuses to begin on this device
    found = {f"optimizer/w/{key}": torch.empty(shape) for key, shape in (("step", ()), ("exp_avg", (3,)))}
    run: Any = SimpleNamespace(trainees={"student": Trainee({"w": parameter}, optimizer)})
    targets = _optimizer_targets(run, found, "a checkpoint")
    assert targets["optimizer/w/step"].device.type == ("meta" if fused else "cpu")
    assert targets["optimizer/w/exp_avg"].device.type == "meta"


def test_moments_in_eight_bits_are_resumed(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "adam_in_eight_bits", lambda: CountingAdam)
    recipe = load_recipe(recipe_file, ["optimizer.kind=adamw8bit", "steps=4"])
    run = start(recipe, resume=False)
    for _ in range(2):
        training_step(run)
    save(run)
    again = start(recipe, resume=True)
    for one in (run, again):
        training_step(one)
    assert_same(run.roles.trained, again.roles.trained)
    states = [list(one.trainees["student"].optimizer.state.values()) for one in (run, again)]
    assert [s["step"] for s in states[0]] == [s["step"] for s in states[1]] and states[0][0]["step"] == 3


@pytest.mark.parametrize("told", [True, False])
def test_a_resumed_run_tells_what_its_model_says_otherwise(
    recipe_file: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], told: bool
) -> None:
    """No recipe says the scale at which its teacher is drawn; a checkpoint does, and one of before then compares recipes."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    settings = json.loads((model / "apexflow.json").read_text())
    ways = [f"model={model}", "checkpoint_every=1", f"output={tmp_path / 'scaled'}"]
    (model / "apexflow.json").write_text(json.dumps(settings | {"guidance": 4.0}))
    train(load_recipe(recipe_file, [*ways, "steps=1"]))
    assert json.loads((tmp_path / "scaled" / "recipe.json").read_text())["objective"] == {}
    train(load_recipe(recipe_file, [*ways, "steps=1"]), resume=True)  # ended, and nothing is otherwise
    (state,) = (tmp_path / "scaled" / "checkpoints").glob("*/state.json")
    if not told:
        kept = json.loads(state.read_text())
        assert kept.pop("objective")["guidance"] == 4.0
        state.write_text(json.dumps(kept))
    (model / "apexflow.json").write_text(json.dumps(settings | {"guidance": 3.0}))
    capsys.readouterr()
    train(load_recipe(recipe_file, [*ways, "steps=2"]), resume=True)
    seen = "".join(capsys.readouterr())
    assert ("objective.guidance 3.0 instead of 4.0" in " ".join(seen.split())) == told


def test_a_checkpoint_of_other_weights_is_refused_by_the_setting_that_was_changed(
    recipe_file: Path, tmp_path: Path
) -> None:
    ways = ["tuning.kind=lora", "tuning.rank=4", f"output={tmp_path / 'adapter'}", "steps=2"]
    train(load_recipe(recipe_file, ways))
    for change, words in (
        ("tuning.rank=8", "tuning.rank 8 instead of 4"),
        ("tuning.kind=full", "tuning.kind full instead"),
    ):
        with pytest.raises(UserError, match=rf"step-0000002 does not go on with .*{words}.*another output"):
            train(load_recipe(recipe_file, [*ways, "steps=3", change]), resume=True)
