"""The command line as a user meets it: what works, and one clear line with exit code 2 for what does not."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from apexflow import cli

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["apexflow", *map(str, arguments)])
        code: int | str | None = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return int(code or 0), captured.out, captured.err

    return call


def refused(result: tuple[int, str, str], *words: str) -> None:
    """Exit code 2 and one line that holds every word."""
    code, _, errors = result
    assert code == 2, errors
    line = errors.strip().splitlines()[-1]
    assert line.startswith("apexflow: error: ") and "Traceback" not in errors
    assert all(word in line for word in words), line


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# -- What works --------------------------------------------------------------------------------------------------------


def test_generate_writes_the_same_picture_for_the_same_seed(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        code, out, _ = run(
            "generate", "a photo of a red star", "--model", tiny_model, "--steps", 1, "-o", tmp_path / name, "--json"
        )
        assert code == 0 and json.loads(out)["evaluations"] == 2  # the tiny model's own guidance takes two
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    run("generate", "a photo of a red star", "--model", tiny_model, "--steps", 1, "--seed", 1, "-o", tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes() != (tmp_path / "a.png").read_bytes()


@pytest.mark.parametrize(("prompt", "warns"), [("zebra xylophone", True), ("", False), ("a red star " * 400, True)])
def test_odd_prompts_still_give_a_picture(run: Run, tiny_model: Path, tmp_path: Path, prompt: str, warns: bool) -> None:
    code, _, errors = run("generate", prompt, "--model", tiny_model, "--steps", 1, "-o", tmp_path / "o.png")
    assert code == 0 and Image.open(tmp_path / "o.png").size == (64, 64)
    assert ("warning" in errors) == warns


def test_scenes_evaluate_and_train_speak_json(run: Run, tiny_model: Path, recipe_file: Path, tmp_path: Path) -> None:
    code, out, _ = run("data", "scenes", tmp_path / "d", "--count", 5, "--json")
    assert code == 0 and json.loads(out)["scenes"] == 5
    code, out, _ = run("evaluate", "--model", tiny_model, "--steps", 1, "--limit", 12, "--per-prompt", 2, "--json")
    report = json.loads(out)
    assert code == 0 and report["complete"] is False and set(report["tasks"]) and report["diversity"] > 0
    code, out, _ = run("train", recipe_file, "steps=1", "--json")
    assert code == 0 and Path(json.loads(out)["report"]).is_file()


def test_compare_takes_a_recipe_and_speaks_json(run: Run, recipe_file: Path, tmp_path: Path) -> None:
    few = ["--images", 4, "--nfe", "1", "--rates", "1e-4", "--seeds", 1, "--per-prompt", 1, "--limit", 2]
    folder = tmp_path / "compared"
    code, output, errors = run("compare", "flow_matching", "-o", folder, "--recipe", recipe_file, *few, "--json")
    assert code == 0, errors
    result = json.loads(output)
    assert result["rows"]["flow_matching"]["budgets"]["images"]["images"] == 4
    assert Path(result["report"]).is_file() and (folder / "results.md").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["flow-matching"], ("unknown method 'flow-matching'", "did you mean 'flow_matching'")),
        (["apex", "--nfe", "one"], ("--nfe", "'one'")),
        (["apex", "--rates", "0"], ("rates", "above 0")),
        (["apex", "--recipe", "nowhere.yaml"], ("nowhere.yaml", "cannot be read")),
    ],
    ids=str,
)
def test_a_comparison_that_cannot_be(run: Run, tmp_path: Path, arguments: list[str], words: tuple[str, ...]) -> None:
    refused(run("compare", *arguments, "-o", tmp_path / "compared"), *words)
    assert not (tmp_path / "compared").exists()


def test_help_of_every_command(run: Run) -> None:
    for command in (
        [],
        ["train"],
        ["generate"],
        ["evaluate"],
        ["export"],
        ["demo"],
        ["cache"],
        ["data"],
        ["data", "scenes"],
    ):
        code, out, _ = run(*command, "--help")
        assert code == 0 and "Usage" in out


# -- Recipes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("output: x\nstepz: 3\n", ("stepz", "did you mean 'steps'")),
        ("output: x\nmethod: apexx\n", ("apexx", "did you mean 'apex'")),
        ("output: x\noptimizer: {learning_rat: 1}\n", ("learning_rat", "did you mean 'learning_rate'")),
        ("output: x\nobjective: {lambda_maxx: 1}\n", ("lambda_maxx", "did you mean 'lambda_max'")),
        ("output: x\nsteps: -3\n", ("steps", "-3")),
        ("output: x\nbatch: 0\n", ("batch", "0")),
        ("output: x\nbatch: many\n", ("batch", "many")),
        ("output: x\nobjective: {lambda_max: 1.5}\n", ("lambda_max", "1.5")),
        ("output: x\nobjective: {pairing: pears}\n", ("pairing", "pears")),
        ("output: x\nobjective: {times: {kind: sometimes}}\n", ("sometimes",)),
        ("steps: 3\n", ("output",)),
        ("output: [\n", ("YAML",)),
        ("- a\n- b\n", ("mapping",)),
    ],
)
def test_a_bad_recipe_is_named(run: Run, tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    refused(run("train", write(tmp_path / "r.yaml", text)), *words)


def test_a_missing_recipe_and_a_bad_override(run: Run, tmp_path: Path, recipe_file: Path) -> None:
    refused(run("train", tmp_path / "none.yaml"), "none.yaml")
    refused(run("train", tmp_path), str(tmp_path))
    refused(run("train", recipe_file, "steps"), "steps", "key=value")
    refused(run("train", recipe_file, "steps.more=1"), "steps")


def test_an_existing_output_is_never_overwritten(run: Run, recipe_file: Path, tiny_model: Path, tmp_path: Path) -> None:
    assert run("train", recipe_file, "steps=1")[0] == 0
    refused(run("train", recipe_file, "steps=1"), "exists", "--resume")
    picture = write(tmp_path / "o.png", "mine")
    refused(run("generate", "a star", "--model", tiny_model, "-o", picture), "o.png", "--force")
    assert picture.read_text() == "mine"
    refused(run("data", "scenes", tmp_path), "exists")
    refused(run("demo", "-o", tmp_path), "exists", "--force")
    taken = tmp_path / "scores"
    (taken / "seed-0").mkdir(parents=True)
    write(taken / "seed-0" / "mine.txt", "mine")
    refused(run("evaluate", "--model", tiny_model, "-o", taken, "--limit", 1, "--steps", 1), "seed-0", "exists")


COMMANDS = {
    "generate": ("a star", "--steps", 1),
    "evaluate": ("--limit", 1, "--steps", 1),
    "cache": ("SCENES",),
    "synthesize": ("SCENES", "--steps", 1),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_in_the_way_and_a_device_that_is_not_there_are_named(
    run: Run, tiny_model: Path, scene_folder: Path, tmp_path: Path, command: str
) -> None:
    file = write(tmp_path / "file", "mine")
    given = [str(scene_folder) if word == "SCENES" else word for word in COMMANDS[command]]
    common = (command, *given, "--model", tiny_model)
    refused(run(*common, "-o", file / "o.png"), "cannot write", "file")
    refused(run(*common, "-o", tmp_path / "o.png", "--device", "gpu"), "unknown device 'gpu'", "cuda")
    refused(run(*common, "-o", tmp_path / "o.png", "--size", 0), "--size")
    if command != "cache":
        refused(run(*common, "-o", tmp_path / "o.png", "--guidance", "nan"), "guidance is nan")
    assert file.read_text() == "mine"


def test_other_outputs_that_cannot_be(run: Run, recipe_file: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "file", "mine")
    refused(run("data", "scenes", file), "cannot write", "file")
    refused(run("data", "scenes", file / "below"), "cannot write", "file")
    refused(run("data", "scenes", tmp_path / "s", "--seed", -1), "--seed")
    refused(run("train", recipe_file, "steps=1", f"output={file}"), "cannot write", "file")
    refused(run("generate", "a star", "-o", tmp_path / "picture"), "picture", ".png")
    refused(run("demo", "-o", file), "cannot write", "file")
    refused(run("demo", "-o", tmp_path / "d", "--minutes", -1), "--minutes")
    refused(run("cache", tmp_path, "--verify"), "no finished cache")
    refused(run("demo", "-o", tmp_path, "--force"), "delete")  # not a run: --force does not remove it
    assert file.read_text() == "mine"


def test_a_full_disk_leaves_the_earlier_picture(
    run: Run, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = write(tmp_path / "o.png", "mine")

    def full(image: Image.Image, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    refused(
        run("generate", "a star", "--model", tiny_model, "--steps", 1, "-o", picture, "--force"), "No space", "o.png"
    )
    assert picture.read_text() == "mine" and list(tmp_path.iterdir()) == [picture]


# -- Data --------------------------------------------------------------------------------------------------------------


def with_data(recipe: Path, source: Path) -> tuple[str, ...]:
    return ("train", str(recipe), "steps=1", f"data.source={source}")


def picture_bytes() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "PNG")
    return buffer.getvalue()


def fill(folder: Path, pictures: dict[str, bytes], captions: dict[str, str]) -> Path:
    folder.mkdir()
    for name, content in pictures.items():
        (folder / f"{name}.png").write_bytes(content)
    for name, caption in captions.items():
        (folder / f"{name}.txt").write_text(caption)
    return folder


def test_a_folder_of_pictures_with_captions_trains(run: Run, recipe_file: Path, tmp_path: Path) -> None:
    names = [str(i) for i in range(6)]
    folder = fill(tmp_path / "own", dict.fromkeys(names, picture_bytes()), dict.fromkeys(names, "a red square"))
    assert run(*with_data(recipe_file, folder))[0] == 0


def test_data_that_cannot_be_used_is_named(run: Run, recipe_file: Path, tmp_path: Path) -> None:
    refused(run(*with_data(recipe_file, tmp_path / "none")), "none", "not found")
    (tmp_path / "empty").mkdir()
    refused(run(*with_data(recipe_file, tmp_path / "empty")), "empty")
    good = picture_bytes()
    cases = {
        "nocaption": ({"a": good, "b": good}, {"a": "a star"}, "caption missing"),
        "blank": ({"a": good, "b": good}, {"a": "a star", "b": "  "}, "caption empty"),
        "corrupt": ({"a": good, "b": good[:40]}, {"a": "a star", "b": "a star"}, "corrupt"),
    }
    for name, (pictures, captions, word) in cases.items():
        refused(run(*with_data(recipe_file, fill(tmp_path / name, pictures, captions))), word, name)


@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_a_damaged_shard_is_named(run: Run, recipe_file: Path, scene_folder: Path, tmp_path: Path, damage: str) -> None:
    content = next(scene_folder.glob("*.tar")).read_bytes()
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "bad.tar").write_bytes(content[: len(content) // 2 + 700] if damage == "truncated" else b"nonsense" * 500)
    refused(run(*with_data(recipe_file, folder)), "bad.tar")


def test_a_shard_with_one_bad_record_is_used_without_it(run: Run, recipe_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for index in range(40):
            for suffix, content in ((".png", picture_bytes() if index else b"x"), (".txt", b"a red square")):
                member = tarfile.TarInfo(f"{index}{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    assert run(*with_data(recipe_file, folder))[0] == 0
    record = json.loads((tmp_path / "run" / "cache" / "cache.json").read_text())
    assert record["rows"] == 39 and record["skipped"] == {"a.tar:0": "corrupt picture"}


def test_a_cache_of_other_data_or_a_damaged_cache_is_refused(
    run: Run, recipe_file: Path, tmp_path: Path, scene_folder: Path
) -> None:
    cache = tmp_path / "cache"
    assert run("train", recipe_file, "steps=1", f"data.cache={cache}")[0] == 0
    names = [str(i) for i in range(6)]
    other = fill(tmp_path / "own", dict.fromkeys(names, picture_bytes()), dict.fromkeys(names, "a red square"))
    again = (f"data.cache={cache}", f"output={tmp_path / 'again'}")
    refused(run(*with_data(recipe_file, other), *again), "cache", "source")
    refused(run("train", recipe_file, "steps=1", f"data.source={cache}", "data.size=32", *again[1:]), "size 64", "32")


def test_cache_makes_reads_and_verifies(run: Run, recipe_file: Path, tiny_model: Path, tmp_path: Path) -> None:
    names = [str(i) for i in range(6)]
    own = fill(tmp_path / "own", dict.fromkeys(names, picture_bytes()), dict.fromkeys(names[1:], "a red square"))
    folder = tmp_path / "kept"
    command = ("cache", own, "-o", folder, "--model", tiny_model)
    refused(run(*command), "1 of 6", "0.png", "caption missing")
    code, out, _ = run(*command, "--skip-limit", 0.5, "--json")
    made = json.loads(out)
    assert code == 0 and made["rows"] == 5 and made["complete"] and list(made["skipped"]) == [str(own / "0.png")]
    code, out, _ = run(*command, "--skip-limit", 0.5)
    assert code == 0 and "0.png: caption missing" in out and f"data.source={folder}" in out
    code, out, _ = run("cache", folder, "--verify", "--json")
    assert code == 0 and json.loads(out)["rows"] == 5
    assert run("train", recipe_file, "steps=1", f"data.source={folder}")[0] == 0
    (folder / "null.safetensors").unlink()
    refused(run("cache", folder, "--verify"), "null.safetensors", "run the same command again")
    refused(run(*command, "--skip-limit", 0.5, "--size", 32), "size", "other settings")
    refused(run("cache", own), "-o")
    refused(run("cache", folder, "-o", tmp_path / "twice"), "is a finished cache")
    refused(run("cache", own, "-o", tmp_path / "odd", "--model", tiny_model, "--size", 50), "50", "multiples")


# -- Models ------------------------------------------------------------------------------------------------------------


def copy_model(source: Path, target: Path) -> Path:
    import shutil

    shutil.copytree(source, target)
    return target


def generate(run: Run, model: Path | str, *more: object) -> tuple[int, str, str]:
    return run("generate", "a star", "--model", model, "--steps", 1, "--force", *more)


def test_a_folder_that_is_no_model_is_named(
    run: Run, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(generate(run, "nosuch"), "nosuch", "mini-teacher")
    refused(generate(run, tmp_path), "model_index.json")
    model = copy_model(tiny_model, tmp_path / "foreign")
    (model / "model_index.json").write_text('{"_class_name": "OtherPipeline"}')
    refused(generate(run, model), "OtherPipeline")
    (model / "model_index.json").write_text("{")
    refused(generate(run, model), "JSON")


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_or_truncated_part_is_named(
    run: Run, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    import shutil

    monkeypatch.chdir(tmp_path)
    model = copy_model(tiny_model, tmp_path / "m")
    for file in (model / part).glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:1000])
        refused(generate(run, model), part)
    shutil.rmtree(model / part)
    refused(generate(run, model), part)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt"])
def test_pickled_weights_are_refused(
    run: Run, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model = copy_model(tiny_model, tmp_path / "m")
    weights = next((model / "transformer").glob("*.safetensors"))
    weights.rename(weights.with_suffix(suffix))
    refused(generate(run, model), suffix, "pickle", "safetensors")
    single = write(tmp_path / f"weights{suffix}", "x")
    refused(generate(run, single), suffix)


def test_steps_and_sizes_that_cannot_be(
    run: Run, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(run("generate", "a star", "--model", tiny_model, "--steps", 0), "steps")
    refused(run("generate", "a star", "--model", tiny_model, "--steps", 1, "--size", 50), "50")
    refused(run("generate", "a star", "--model", tiny_model, "--steps", "two"), "--steps")
    refused(run("evaluate", "--model", tiny_model, "--suite", "mini-genval"), "mini-genval")
    refused(run("generate"), "prompts")


# -- Export ------------------------------------------------------------------------------------------------------------


def test_a_run_is_exported(run: Run, recipe_file: Path, tiny_model: Path, tmp_path: Path) -> None:
    refused(run("export", tmp_path / "run", "-o", tmp_path / "early"), "not found")
    assert run("train", recipe_file, "steps=1", "tuning.kind=lora", "tuning.rank=2")[0] == 0
    code, out, _ = run("export", tmp_path / "run", "-o", tmp_path / "lora", "--json")
    assert code == 0 and json.loads(out)["kind"] == "lora"
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert str(tiny_model) in (tmp_path / "lora" / "README.md").read_text()
    code, out, _ = run("export", tmp_path / "run", "--merge", "--scheduler", "any-step", "-o", tmp_path / "whole")
    assert code == 0 and "README.md" in out
    assert generate(run, tmp_path / "whole", "-o", tmp_path / "o.png")[0] == 0
    assert run("export", tmp_path / "run" / "model", "-o", tmp_path / "copy", "--scheduler", "original")[0] == 0
    refused(run("export", tmp_path / "run", "-o", tmp_path / "lora"), "exists")
    refused(run("export", tmp_path / "run", "-o", tmp_path / "x", "--scheduler", "euler"), "euler", "any-step")


# -- Plans -------------------------------------------------------------------------------------------------------------


def test_a_plan_says_what_fits_and_what_to_switch_on(run: Run, recipe_file: Path) -> None:
    code, out, _ = run("plan", recipe_file, "--tokens", 8, "--json")
    result = json.loads(out)
    assert code == 0 and result["fits"] and result["switch_on"] == [] and result["peak_gib"] < 3
    assert set(result["parts_gib"]) >= {"trained weights", "optimizer", "activations", "allowance"}
    code, out, _ = run("plan", recipe_file, "batch=4", "--tokens", 8, "--memory", 0.5)
    assert code == 0 and "does not fit" in out and "tuning.checkpointing=true" in out and "larger GPUs" in out
    refused(run("plan", recipe_file, "model=someone/else"), "someone/else", "folder")
    refused(run("plan", recipe_file, "data.size=50"), "50")


@pytest.mark.parametrize("kind", [MemoryError, torch.OutOfMemoryError])
def test_out_of_memory_says_what_the_plan_says(
    run: Run, recipe_file: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise kind("CUDA out of memory")

    monkeypatch.setattr("apexflow.training.loop.training_step", full)
    refused(run("train", recipe_file), "out of memory", "apexflow plan", "GiB", "tuning.checkpointing=true")


def test_a_shift_that_the_model_cannot_see_and_a_side_that_it_cannot_take(run: Run, recipe_file: Path) -> None:
    refused(run("train", recipe_file, "data.size=50"), "50", "multiples")
    refused(run("train", recipe_file, "tuning.storage=fp8"), "tuning.storage", "tuning.kind=lora")
