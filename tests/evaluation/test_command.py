"""`apexflow evaluate` and `apexflow convert-detector` as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree

import pytest
import torch
from command_line import Run, refused
from safetensors.torch import save_file
from test_geneval_detector import checkpoint

from apexflow.evaluation.command import _show
from apexflow.progress import console


def test_draw_now_and_score_later(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    common = ("evaluate", "--limit", 3, "--per-prompt", 1)
    out = tmp_path / "e"
    code, text, _ = run(*common, "--model", tiny_model, "--steps", 1, "-o", out, "--no-score")
    assert code == 0 and "seed-0: all generated; not scored" in text and not (out / "seed-0" / "report.json").exists()
    code, text, _ = run(*common, "--images", out / "seed-0" / "pictures", "-o", tmp_path / "scores")
    assert code == 0 and "mini-GenEval" in text and "INCOMPLETE (not all prompts), 3 pictures" in text
    report = json.loads((tmp_path / "scores" / "report.json").read_text())
    assert report["evaluations"] == 2 and report["steps"] == 1  # known from the folder of the drawing


def test_a_folder_of_something_else_is_not_drawn_into(run: Run, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "0.tar").touch()
    refused(
        run("evaluate", "--limit", 2, "-o", tmp_path / "set"),
        "set exists",
        "holds no seed-* folder of evaluate",
        "choose another",
    )
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["0.tar"]


def test_seeds_end_where_those_of_one_do(run: Run) -> None:
    last = 2**63 - 1
    refused(
        run("evaluate", "--model", "none", "--seed", last, "--seeds", 2),
        "--seeds 2",
        f"--seed {last}",
        "past the largest",
    )
    refused(run("evaluate", "--model", "none", "--seed", last - 1, "--seeds", 2), "'none'")


def test_a_model_with_another_lora_is_another_model(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    name, file = "transformer.transformer_blocks.0.attn1.to_q", tmp_path / "lora.safetensors"
    save_file({f"{name}.lora_A.weight": torch.ones(1, 32), f"{name}.lora_B.weight": torch.ones(32, 1)}, file)
    common = ("evaluate", "--model", tiny_model, "--steps", 1, "--limit", 2, "--per-prompt", 1, "-o", tmp_path / "e")
    code, text, _ = run(*common, "--lora", f"{file}:0.5", "--json")
    report = json.loads(text)
    assert code == 0 and report["lora"] == [{"file": str(file), "strength": 0.5}]
    assert report["name"] == f"{tiny_model} + {file}:0.5"
    assert run(*common, "--lora", f"{file}:0.50")[0] == 0  # goes on
    for other in ((), ("--lora", file), ("--lora", f"{file}:0.5", "--lora", f"{file}:0.5")):
        refused(run(*common, *other), "different weights and lora")
    refused(run("evaluate", "--images", tmp_path, "--lora", file), "--lora cannot be used with --images")


def test_several_seeds_are_averaged(run: Run, tiny_model: Path) -> None:
    code, text, _ = run(
        "evaluate", "--model", tiny_model, "--steps", 1, "--limit", 2, "--per-prompt", 1, "--seeds", 2, "--json"
    )
    report = json.loads(text)
    assert code == 0 and report["seed"] == [0, 1] and report["pictures"] == 4


def test_several_steps_are_each_what_one_is_and_go_on(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "e"
    common = ("evaluate", "--model", tiny_model, "--limit", 1, "--per-prompt", 1, "--seeds", 2)
    both = (*common, "--steps", "1, 2, 1", "-o", out)
    code, text, _ = run(*both)
    assert code == 0 and text.count("mini-GenEval") == 1 and "steps 1" in text and "steps 2" in text
    drawn = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    # It goes on, as an evaluation with different settings would be refused.
    alone = json.loads(run(*common, "--steps", 2, "-o", out / "steps-2", "--json")[1])
    results = json.loads(run(*both, "--json")[1])["results"]
    assert results[1] == alone and [result["evaluations"] for result in results] == [2, 4]
    assert all(result["seed"] == [0, 1] for result in results)
    assert len(drawn) == 4 and drawn == {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    refused(run(*common, "--steps", 1, "-o", out), "e exists", "holds no seed-* folder of evaluate")
    refused(run(*common, "--steps", "1,2", "-o", out / "steps-1"), "steps-1 exists", "holds no steps-*")


def test_several_steps_that_are_only_drawn_are_listed(
    run: Run, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "apexflow.evaluation.runner.evaluate",
        lambda *given: {"folder": str(given[2].relative_to(tmp_path)), "pending": 0},
    )
    code, text, _ = run("evaluate", "--model", tiny_model, "--steps", "1,2", "-o", tmp_path, "--no-score", "--json")
    told = [{"folder": f"steps-{number}/seed-0", "pending": 0} for number in (1, 2)]
    assert code == 0 and json.loads(text) == {"results": told}


def test_where_one_number_of_steps_waits_it_is_a_list_still(capsys: pytest.CaptureFixture[str]) -> None:
    _show([{"folder": "e", "suite": "own", "tasks": {}}, {"folder": "f", "pending": 1}], seeds=1, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"results": [{"folder": "f", "pending": 1}]}


def test_steps_that_cannot_be_are_told_before_anything_is_drawn(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    common = ("evaluate", "--model", tiny_model, "--limit", 1, "-o", tmp_path / "e")
    for steps, words in {"two": ("--steps", "'two'"), "1,": ("--steps", "commas"), "1,0": ("steps", "got 0")}.items():
        refused(run(*common, "--steps", steps), *words)
    (tmp_path / "s" / "steps-2").mkdir(parents=True)
    (tmp_path / "s" / "steps-2" / "0.tar").touch()
    refused(run(*common[:-1], tmp_path / "s", "--steps", "1,2"), "steps-2 exists", "holds no seed-* folder of evaluate")
    assert not list(tmp_path.rglob("*.png"))


def test_a_model_that_draws_no_scenes_is_warned_of_its_score(
    run: Run, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apexflow.evaluation.runner.evaluate", lambda *_: {"folder": "f", "pending": 0})
    model = copytree(tiny_model, tmp_path / "m")
    settings = json.loads((model / "apexflow.json").read_text())
    for size, more, warned in ((64, (), False), (512, (), True), (512, ("--suite", "mini-geneval"), False)):
        (model / "apexflow.json").write_text(json.dumps(settings | {"size": size}))
        code, _, errors = run("evaluate", "--model", model, *more)
        assert code == 0 and ("--suite geneval" in errors) == warned and len(errors.splitlines()) == warned, errors


def test_a_share_of_the_pictures_waits_for_the_others(
    run: Run, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("evaluate", "--model", tiny_model, "--steps", 1, "--limit", 2, "--per-prompt", 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(run(*common), "--output")
    code, text, _ = run(*common, "-o", tmp_path / "e")
    assert code == 0 and "1 pictures left to generate; not scored" in text
    monkeypatch.setenv("RANK", "1")
    code, text, _ = run(*common, "-o", tmp_path / "e")
    assert code == 0 and "mini-GenEval" in text


def test_under_torchrun_one_process_speaks(
    run: Run, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("evaluate", "--model", tiny_model, "--steps", 1, "--limit", 2, "--per-prompt", 1, "-o", tmp_path / "e")
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(console, "quiet", False)  # put back afterwards
    assert run(*common) == (0, "", "") and console.quiet
    assert run("evaluate", "--images", tmp_path / "e" / "seed-0" / "pictures") == (0, "", "")
    monkeypatch.setenv("RANK", "0")
    code, text, _ = run(*common)
    assert code == 0 and "mini-GenEval" in text and not console.quiet


def test_ctrl_c_says_what_is_kept(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> dict:
        raise KeyboardInterrupt

    monkeypatch.setattr("apexflow.evaluation.runner.evaluate", interrupted)
    monkeypatch.setattr("apexflow.evaluation.runner.score_folder", interrupted)
    for more in (("--steps", 1), ("--images", tmp_path)):
        code, _, errors = run("evaluate", *more, "-o", tmp_path / "e")
        assert code == 130 and f"kept in {tmp_path / 'e'}: run the same command to resume" in errors
        code, _, errors = run("evaluate", *more)
        assert code == 130 and "nothing is kept without an output folder" in errors and "-o" in errors


@pytest.mark.parametrize("written", ["os.replace", "PIL.Image.Image.save"])
def test_a_full_disk_is_one_line(
    run: Run, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(written, full)
    common = ("--model", tiny_model, "--steps", 1, "--limit", 2, "-o", tmp_path / "e")
    refused(run("evaluate", *common), "No space left", "free")


def test_options_that_cannot_apply_are_told(run: Run, tmp_path: Path) -> None:
    refused(run("evaluate", "--protocol", "clean"), "--protocol cannot be used with the suite mini-geneval")
    refused(run("evaluate", "--suite", "geneval", "--fid-size", 8, "--judge", "x"), "--judge and --fid-size", "geneval")
    drawing = ("--model", "m", "--seeds", 2, "--steps", 4, "--no-score")
    refused(
        run("evaluate", "--images", tmp_path, *drawing), "--model and --steps and --seeds and --no-score", "--images"
    )


def test_a_network_is_kept_as_asked(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    common = ("evaluate", "--model", tiny_model, "--limit", 1, "--no-score", "-o", tmp_path / "e")
    refused(run(*common, "--storage", "int2"), "int2", "fp8 or nf4")
    refused(run("evaluate", "--images", tmp_path, "--storage", "fp8"), "--storage cannot be used with --images")
    assert run(*common, "--storage", "fp8")[0] == 0
    drawn = json.loads((tmp_path / "e" / "seed-0" / "generation.json").read_text())
    assert drawn["storage"] == "fp8"
    refused(run(*common), "an evaluation with different", "storage")


def test_what_cannot_be_scored_is_told_before_anything_is_drawn(run: Run, tmp_path: Path) -> None:
    refused(run("evaluate", "--images", tmp_path / "none"), "none", "pictures folder")
    refused(run("evaluate", "--suite", "geneval"), "--detector", "docs/evaluation.md")
    refused(run("evaluate", "--suite", "geneval", "--detector", tmp_path / "d"), "--detector", str(tmp_path / "d"))
    refused(run("evaluate", "--suite", "geneval", "--detector", tmp_path), "--clip")
    refused(run("evaluate", "--no-score"), "--output")
    prompts = tmp_path / "prompts.jsonl"
    scorers = ("--detector", tmp_path, "--clip", tmp_path, "--no-score", "-o", tmp_path / "e")
    prompts.write_text("{")
    refused(run("evaluate", "--suite", "geneval", "--data", prompts, *scorers), "cannot read", "prompts.jsonl")
    clause = {"class": "dog", "count": 1}
    own = {
        "line 1": {"tag": "colors"},
        "include": {"tag": "colors", "prompt": "p"},
        "[relation, clause number]": {"tag": "x", "prompt": "p", "include": ["dog"]},
        "unicorn": {"tag": "x", "prompt": "p", "include": [clause | {"class": "unicorn"}]},
        "count of dog": {"tag": "x", "prompt": "p", "include": [clause | {"count": 0}]},
        "crimson": {"tag": "x", "prompt": "p", "include": [clause | {"color": "crimson"}]},
        "'near', 0": {"tag": "x", "prompt": "p", "include": [clause, clause | {"position": ["near", 0]}]},
        "'above', 1": {"tag": "x", "prompt": "p", "include": [clause, clause | {"position": ["above", 1]}]},
        "unicorns": {"tag": "x", "prompt": "p", "include": [], "exclude": [clause | {"class": "unicorns"}]},
    }
    for word, entry in own.items():
        prompts.write_text(json.dumps(entry))
        refused(run("evaluate", "--suite", "geneval", "--data", prompts, *scorers), "prompts.jsonl", word)


def test_a_wrong_setting_leaves_the_folder_free(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    common = ("evaluate", "--model", tiny_model, "--limit", 1, "--per-prompt", 1, "--steps", 1, "-o", tmp_path / "e")
    for option, value in (("--size", 50), ("--rho", 2), ("--kappa", -1), ("--order", 3)):
        refused(run(*common, option, value), str(value))
    refused(run(*common, "--size", 100_000), "--size", "8192")
    assert run(*common)[0] == 0


def test_the_official_detector_is_converted(run: Run, tmp_path: Path) -> None:
    weights = tmp_path / "official.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in checkpoint().items()}, weights)
    code, text, _ = run("convert-detector", weights, tmp_path / "detector", "--json")
    assert code == 0 and json.loads(text) == {"folder": str(tmp_path / "detector")}
    config = json.loads((tmp_path / "detector" / "config.json").read_text())
    assert config["apexflow_source"] == "mmdet" and (tmp_path / "detector" / "model.safetensors").is_file()
    refused(run("convert-detector", weights, tmp_path / "detector"), "exists")
    refused(run("convert-detector", tmp_path / "official.pth", tmp_path / "d"), "safetensors", "docs/evaluation.md")
    weights.write_bytes(b"short")
    refused(run("convert-detector", weights, tmp_path / "d"), "official.safetensors")
    assert not (tmp_path / "d").exists()
