"""Models on the command line that cannot be loaded or asked so: one line, exit code 2."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from command_line import Run, generate, refused, write
from planted import plant
from safetensors.torch import load_file, save_file

from apexflow.backbones import load_backbone, resolve, second_time


def copy_model(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def test_a_folder_that_is_no_model_is_named(
    run: Run, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(generate(run, "nosuch"), "nosuch", "mini-teacher")
    refused(generate(run, tmp_path), "model_index.json")
    (tmp_path / "model").mkdir()
    write(tmp_path / "model" / "model_index.json", "{}")
    refused(generate(run, tmp_path), "is not a model but holds one", str(tmp_path / "model"))
    model = copy_model(tiny_model, tmp_path / "foreign")
    (model / "model_index.json").write_text('{"_class_name": "OtherPipeline"}')
    refused(generate(run, model), "OtherPipeline")
    for text in ("[]", "null", "1"):
        (model / "model_index.json").write_text(text)
        refused(generate(run, model), "model_index.json", "not a JSON object")
    for text in ("{}", '{"_class_name": {}}', '{"_class_name": ["SanaPipeline"]}'):
        (model / "model_index.json").write_text(text)
        refused(generate(run, model), "model_index.json", "names no pipeline")
    for text in ("{", "[" * 100_000):
        (model / "model_index.json").write_text(text)
        refused(generate(run, model), "JSON")
    (model / "model_index.json").write_bytes(b"\xff")
    refused(generate(run, model), "JSON")


@pytest.mark.parametrize(
    ("left", "named", "words"),
    [
        ("checkpoints/step-0000002/state.json", ".", ("is not a model", "apexflow export", "-o MODEL")),
        ("checkpoints/step-0000002/state.json", "checkpoints/step-0000002", ("is not a model", "step-0000002")),
        (
            "lora/pytorch_lora_weights.safetensors",
            "lora",
            ("is a LoRA", "--model MODEL --lora", "apexflow export", "--base MODEL --merge"),
        ),
    ],
)
def test_what_lies_in_a_run_and_is_no_model_is_told_with_the_way_to_one(
    run: Run, tmp_path: Path, left: str, named: str, words: tuple[str, ...]
) -> None:
    home = tmp_path / "my 'run' #2"
    (home / left).parent.mkdir(parents=True)
    write(home / left, "{}")
    told = generate(run, home / named)
    refused(told, *words)
    command = shlex.split(told[2].split("`")[-2])  # as it is pasted
    assert command[:2] == ["apexflow", "export"] and (home / left).is_relative_to(command[2])


def test_a_finished_run_is_taken_for_its_model(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bf16-run"
    copy_model(tiny_model, folder / "model")
    write(folder / "recipe.json", "{}")
    drawn = []
    for index, named in enumerate((folder, folder / "model")):
        code, _, _ = run("generate", "a photo of a red star", "--model", named, "-o", tmp_path / f"{index}.png")
        assert code == 0
        drawn.append((tmp_path / f"{index}.png").read_bytes())
    assert drawn[0] == drawn[1] and resolve(str(folder)) == folder / "model"
    write(folder / "model_index.json", (tiny_model / "model_index.json").read_text())
    assert resolve(str(folder)) == folder  # which is a model itself


def test_a_run_that_is_not_finished_is_told_with_the_way_to_a_model(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "recipe.json", "{}")
    refused(generate(run, tmp_path), "an unfinished run", "--resume")
    saved = tmp_path / "checkpoints" / "step-0000002"
    saved.mkdir(parents=True)
    refused(generate(run, tmp_path), "an unfinished run", f"apexflow export {saved} -o MODEL")


def test_a_folder_with_the_name_of_a_shipped_model_is_not_passed_over(
    run: Run, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mini-student", "miniature"):
        write(tmp_path / name, "mine")
    refused(generate(run, "mini-student"), "'mini-student' stands for the model that ships", "./mini-student")
    refused(generate(run, "./mini-student"), "mini-student is a file")
    write(tmp_path / "model_index.json", "{}")
    refused(generate(run, "./model_index.json"), "is the index of a diffusers checkpoint", "give the folder")
    refused(run("train", recipe_file, "model=miniature"), "'miniature' stands for", "./miniature")
    refused(run("train", recipe_file, "model=./miniature"), "miniature is a file")


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


@pytest.mark.parametrize("name", ["../victim", "/etc", "*", ".", "vae/../..", ""])
def test_a_part_whose_name_leads_out_of_the_folder_is_refused(
    run: Run, tiny_model: Path, tmp_path: Path, name: str
) -> None:
    model = copy_model(tiny_model, tmp_path / "m")
    index = json.loads((model / "model_index.json").read_text())
    write(model / "model_index.json", json.dumps(index | {name: ["a", "b"]}))
    (tmp_path / "victim").mkdir()
    write(tmp_path / "victim" / "secret", "x")
    for command in (("generate", "a star", "--model"), ("export",)):
        refused(run(*command, model, "-o", tmp_path / "o.png"), "model_index.json", repr(name), "not a plain name")


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"weight_map": {"a": "../victim.safetensors"}}, ("'../victim.safetensors'", "not a plain safetensors name")),
        ({"weight_map": {"a": "weights.bin"}}, ("'weights.bin'", "not a plain safetensors name")),
        ({"weight_map": {"a": 1}}, ("the file 1", "not a plain safetensors name")),
        ({"weight_map": None}, ("the file None", "not a plain safetensors name")),
        (None, ("not a JSON object",)),
    ],
)
def test_an_index_of_weights_that_names_none_is_told(
    run: Run, tiny_model: Path, tmp_path: Path, index: object, words: tuple[str, ...]
) -> None:
    model = copy_model(tiny_model, tmp_path / "m")
    name = "diffusion_pytorch_model.safetensors"
    (model / "vae" / name).rename(tmp_path / "victim.safetensors")
    write(model / "vae" / f"{name}.index.json", json.dumps(index))
    refused(generate(run, model), f"vae/{name}.index.json", *words)


def test_weights_that_are_a_broken_link_or_a_folder_are_called_so(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    model = copy_model(tiny_model, tmp_path / "m")
    weights = next((model / "transformer").glob("*.safetensors"))
    weights.unlink()
    weights.symlink_to(tmp_path / "gone")
    refused(generate(run, model), f"{weights} is a broken link")
    index = model / "transformer" / f"{weights.name}.index.json"
    write(index, json.dumps({"weight_map": {"a": weights.name}}))
    refused(generate(run, model), f"{weights} is a broken link")
    index.unlink()
    weights.unlink()
    weights.mkdir()
    refused(generate(run, model), f"{weights} is a folder")


@pytest.mark.parametrize("entry", [None, [None, None], "left out"])
@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_part_that_the_index_does_not_name_is_told(
    run: Run, tiny_model: Path, tmp_path: Path, part: str, entry: object
) -> None:
    model = copy_model(tiny_model, tmp_path / "m")
    index = json.loads((model / "model_index.json").read_text()) | {part: entry}
    if entry == "left out":
        del index[part]
    write(model / "model_index.json", json.dumps(index))
    refused(generate(run, model), f"names no {part}")
    weights = list((model / part).glob("*.safetensors"))
    if weights:  # a pickle of it is refused all the same
        weights[0].rename(weights[0].with_suffix(".bin"))
        refused(generate(run, model), ".bin is a pickle")


def test_a_scheduler_is_read_as_no_other_class_of_diffusers(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    model = copy_model(tiny_model, tmp_path / "m")
    write(model / "scheduler" / "scheduler_config.json", json.dumps({"_class_name": "AutoencoderTiny"}))
    write(model / "scheduler" / "config.json", json.dumps({"_class_name": "AutoencoderTiny"}))
    torch.save(Planted(tmp_path / "ran"), model / "scheduler" / "diffusion_pytorch_model.bin")
    save_file({"a": torch.zeros(3)}, model / "scheduler" / "other.safetensors")  # so the pickle passes for a twin
    refused(generate(run, model), "scheduler_config.json", "'AutoencoderTiny'")
    assert not (tmp_path / "ran").exists()


class Planted:
    """Leaves a mark when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", [5, None, ["EulerDiscreteScheduler"], "logging"])
def test_a_scheduler_that_is_none_is_named(run: Run, tiny_model: Path, tmp_path: Path, name: object) -> None:
    model = copy_model(tiny_model, tmp_path / "m")
    write(model / "scheduler" / "scheduler_config.json", json.dumps({"_class_name": name}))
    refused(generate(run, model), "scheduler_config.json")


def test_weights_of_another_network_are_named_and_damaged_ones_draw_nothing(
    run: Run, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = copy_model(tiny_model, tmp_path / "m")
    weights = next((model / "transformer").glob("*.safetensors"))
    tensors = load_file(weights)
    save_file({name: tensor * math.nan for name, tensor in tensors.items()}, weights, {"format": "pt"})
    (tmp_path / "out.png").write_text("an earlier picture")
    result = generate(run, model, "--count", 2)
    refused(result, "2 of 2 pictures are not finite, so out.png was not written", "restore the model, or")
    assert len(result[2].splitlines()) == 1 and (tmp_path / "out.png").read_text() == "an earlier picture"
    refused(generate(run, model, "--storage", "fp8"), "restore the model, leave out --storage, or")
    for part in ("transformer", "vae", "text_encoder"):
        model = copy_model(tiny_model, tmp_path / part)
        save_file({"other": torch.zeros(3)}, next((model / part).glob("*.safetensors")), {"format": "pt"})
        refused(generate(run, model), part, "of another network")


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_missing_weights_are_told_in_one_line_without_a_librarys(
    run: Run, tiny_model: Path, tmp_path: Path, part: str
) -> None:
    model = copy_model(tiny_model, tmp_path / "m")
    weights = next((model / part).glob("*.safetensors"))
    index = {"weight_map": {"a": weights.name, "b": "second.safetensors"}}
    write(model / part / f"{weights.name}.index.json", json.dumps(index))
    result = generate(run, model)
    refused(result, "incomplete", f"{part}/second.safetensors is missing")
    weights.unlink()
    result = generate(run, model)
    refused(result, "incomplete", f"{part}/{weights.name} is missing")
    (model / part / f"{weights.name}.index.json").unlink()
    save_file({"a": torch.zeros(3)}, model / part / "model.fp16.safetensors")
    refused(generate(run, model), "incomplete", f"{part}/ holds no safetensors", "model.fp16.safetensors")
    result = generate(run, model)
    assert len(result[2].splitlines()) == 1, result[2]


@pytest.mark.parametrize(
    ("part", "config", "words"),
    [
        ("text_encoder", "{}", ("model_type is missing",)),
        ("vae", "{}", ("_class_name is missing",)),
        ("vae", "[]", ("not a JSON object",)),
        ("transformer", "x", ("cannot read",)),
        ("text_encoder", '{"model_type": "gemma2"}', ("describes 2,614,341,888 parameters", "of another network")),
        ("transformer", None, ("incomplete", "is missing")),
    ],
)
def test_a_config_that_is_not_that_of_its_weights_is_named(
    run: Run, tiny_model: Path, tmp_path: Path, part: str, config: str | None, words: tuple[str, ...]
) -> None:
    model = copy_model(tiny_model, tmp_path / "m")
    (model / part / "config.json").unlink()
    if config is not None:
        write(model / part / "config.json", config)
    refused(generate(run, model), f"{part}/config.json", *words)


@pytest.mark.parametrize(
    ("part", "said", "words"),
    [
        ("transformer", {"num_layers": 0}, "fewer layers"),
        ("text_encoder", {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}, "fewer layers"),
        ("text_encoder", {"num_hidden_layers": 0, "layer_types": []}, "fewer layers"),
        ("vae", {"decoder_layers_per_block": [0, 1, 1, 0]}, "fewer layers"),
    ],
)
def test_a_config_of_fewer_layers_than_its_weights_is_named(
    run: Run, tiny_model: Path, tmp_path: Path, part: str, said: dict[str, object], words: str
) -> None:
    model = copy_model(tiny_model, tmp_path / "m")
    config = model / part / "config.json"
    write(config, json.dumps(json.loads(config.read_text()) | said))
    refused(generate(run, model), part, words)


@pytest.mark.parametrize("value", [None, "x", math.nan, 0, [1]])
@pytest.mark.parametrize(("part", "name"), [("transformer", "timestep_scale"), ("vae", "scaling_factor")])
def test_a_factor_that_is_no_number_is_named(
    run: Run, tiny_model: Path, tmp_path: Path, part: str, name: str, value: object
) -> None:
    model = copy_model(tiny_model, tmp_path / "m")
    config = model / part / "config.json"
    write(config, json.dumps(json.loads(config.read_text()) | {name: value}))
    refused(generate(run, model), f"{part}/config.json", name)


def test_a_tokenizer_of_more_words_than_its_text_encoder_is_named(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    model = copy_model(tiny_model, tmp_path / "m")
    path = model / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] |= {f"word{number}": 500 + number for number in range(100)}
    write(path, json.dumps(content))
    refused(generate(run, model), f"{model / 'tokenizer'} has", "words", "the text encoder beside it embeds")


def test_weights_that_the_config_has_no_place_for_are_named(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    for part in ("transformer", "text_encoder", "vae"):
        model = copy_model(tiny_model, tmp_path / part)
        weights = next((model / part).glob("*.safetensors"))
        tensors = load_file(weights)
        first = min(name for name in tensors if name.endswith(".weight")).removesuffix(".weight")
        save_file(tensors | {f"{first}.other.weight": torch.zeros(3)}, weights, {"format": "pt"})
        refused(generate(run, model), part, "1 tensors are unexpected", f"{first}.other.weight")


def test_a_config_of_another_size_is_named(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    model = copy_model(tiny_model, tmp_path / "m")
    config = model / "text_encoder" / "config.json"
    write(config, json.dumps(json.loads(config.read_text()) | {"hidden_size": 64}))
    refused(generate(run, model), "text_encoder", "of another network", "have a different shape")


NO_GRIDS = ("[5, 0]", "[1, -1]", "[1, 0.5, 0.7]", "[]", "[1, NaN, 0]", "[1, 0.5]")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ("apexflow.json",)),
        ("[]", ("apexflow.json",)),
        ('{"steps": "many"}', ("apexflow.json", "steps")),
        ('{"steps": 0}', ("apexflow.json", "steps")),
        ('{"stepz": 1}', ("apexflow.json", "stepz")),
        ('{"steps": 1000000000}', ("apexflow.json", "steps")),
        ("[" * 100_000, ("apexflow.json",)),
        ('{"samplers": null}', ("apexflow.json", "samplers")),
        ('{"samplers": {"0": {"kappa": 0, "rho": 0, "order": 1}}}', ("apexflow.json", "samplers.0")),
        ('{"samplers": {"8": {"kappa": 0, "rho": 0, "order": 3}}}', ("apexflow.json", "samplers.8.order")),
        *((f'{{"times": {times}}}', ("apexflow.json", "times", "descend")) for times in NO_GRIDS),
        *((f'{{"max_tokens": {number}}}', ("apexflow.json", "max_tokens")) for number in (-5, 0, 2**64)),
        *((f'{{"{name}": NaN}}', ("apexflow.json", name)) for name in ("guidance", "embedded_guidance")),
        *((f'{{"size": {number}}}', ("apexflow.json", "size")) for number in (0, 2**40)),
        *((f'{{"kappa": {number}}}', ("apexflow.json", "kappa")) for number in (-1, "NaN", "Infinity")),
        *((f'{{"rho": {number}}}', ("apexflow.json", "rho")) for number in (-0.1, 1.1, "NaN")),
        *((f'{{"order": {number}}}', ("apexflow.json", "order")) for number in (0, 3, 1.5)),
    ],
)
def test_settings_that_do_not_fit_are_named(
    run: Run, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = copy_model(tiny_model, tmp_path / "m")
    write(model / "apexflow.json", text)
    refused(generate(run, model), *words)


DYNAMIC = {"use_dynamic_shifting": True}


@pytest.mark.parametrize(
    "said",
    [
        *({"shift": shift} for shift in (-1, 0, math.nan, math.inf, 1e300, "x")),
        {"flow_shift": math.nan},
        DYNAMIC | {"max_image_seq_len": 256},
        DYNAMIC | {"base_shift": "x"},
        DYNAMIC | {"base_shift": 1e6},
    ],
    ids=str,
)
def test_a_time_shift_that_cannot_be_is_told(
    run: Run, tiny_model: Path, tmp_path: Path, said: dict[str, object]
) -> None:
    model = copy_model(tiny_model, tmp_path / "m")
    config = model / "scheduler" / "scheduler_config.json"
    write(config, json.dumps(json.loads(config.read_text()) | said))
    refused(generate(run, model), "scheduler_config.json")


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


@pytest.mark.parametrize("name", ["lora.safetensors", "lora.bin"])
def test_a_lora_given_as_a_model_is_told_the_way_to_one(run: Run, tmp_path: Path, name: str) -> None:
    way = f"apexflow export {tmp_path / 'lora.safetensors'} --base MODEL --merge -o FOLDER"
    file = write(tmp_path / name, "x")
    if file.suffix == ".safetensors":
        save_file({"transformer.blocks.0.to_q.lora_A.weight": torch.ones(1, 1)}, file)
    refused(generate(run, file, "-o", tmp_path / "o.png"), "folder of a diffusers", way)
    refused(run("bench", file), way)


@pytest.mark.parametrize("ending", ["ckpt", "sft", "gguf"])
def test_loose_weights_that_are_not_read_are_told_both_ways(run: Run, tmp_path: Path, ending: str) -> None:
    file, way = write(tmp_path / f"net.{ending}", "x"), f"apexflow export {tmp_path / 'net.safetensors'} --base MODEL"
    refused(run("export", file, "--base", "mini-teacher", "-o", tmp_path / "made"), f"{way} --merge", f"{way} -o")


def test_a_network_given_as_a_model_is_told_the_way_to_one(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "net.safetensors"
    shutil.copyfile(next((tiny_model / "transformer").glob("*.safetensors")), file)
    way = f"apexflow export {file} --base MODEL -o FOLDER"
    refused(generate(run, file, "-o", tmp_path / "o.png"), "holds a network alone", way)
    for key in ("model", "teacher"):
        refused(run("train", "recipes/mini-apex.yaml", f"{key}={file}", f"output={tmp_path / 'run'}"), way)
    assert run("export", file, "--base", tiny_model, "-o", tmp_path / "made")[0] == 0
    assert generate(run, tmp_path / "made", "-o", tmp_path / "o.png")[0] == 0
    assert generate(run, tiny_model, "-o", tmp_path / "p.png")[0] == 0
    assert (tmp_path / "o.png").read_bytes() == (tmp_path / "p.png").read_bytes()
    file.write_bytes(file.read_bytes()[:-1])
    refused(generate(run, file, "-o", tmp_path / "o.png"), "cannot read", str(file), "restore it")


def test_a_lora_is_drawn_by_its_strength(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    name, random = "transformer.transformer_blocks.0.attn1.to_q", torch.Generator().manual_seed(0)
    sides = {"A": torch.randn(2, 32, generator=random), "B": torch.randn(32, 2, generator=random)}
    file = tmp_path / "lora.safetensors"
    save_file({f"{name}.lora_{side}.weight": tensor for side, tensor in sides.items()}, file)

    def drawn(*given: str) -> bytes:
        more = [word for one in given for word in ("--lora", f"{file}{one}")]
        assert generate(run, tiny_model, *more, "-o", tmp_path / "o.png")[0] == 0
        return (tmp_path / "o.png").read_bytes()

    assert drawn() == drawn(":0") != drawn("") == drawn(":1") != drawn(":2")
    refused(generate(run, tiny_model, "--lora", f"{file}:much"), "the strength of the LoRA", "'much'", "give a number")
    refused(generate(run, tiny_model, "--lora", tmp_path / "no"), "does not exist", "give a LoRA file")


@pytest.mark.parametrize(("options", "words"), [(("--order", 2), "order is 2"), (("--kappa", 0.1), "kappa is 0.1")])
def test_a_model_with_a_second_time_is_not_asked_to_leave_its_path(
    run: Run, tiny_model: Path, tmp_path: Path, options: tuple[object, ...], words: str
) -> None:
    model, output = copy_model(tiny_model, tmp_path / "m"), tmp_path / "o"
    second_time.save(second_time.attach(load_backbone(str(model)).transformer), model)
    told = (words, "a model with a second time jumps along the path")
    refused(run("generate", "a star", "--model", model, "--steps", 3, "-o", f"{output}.png", *options), *told)
    how = ("--model", model, "--suite", "mini-geneval", "--steps", 3, "-o", output)
    refused(run("evaluate", *how, *options), *told)
    assert not output.exists()


def test_code_of_a_checkpoint_is_not_run(
    run: Run, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy_model(tiny_model, tmp_path / "m")
    config = model / "tokenizer" / "tokenizer_config.json"
    marker = plant(config, {"AutoTokenizer": ["evil.Evil", None]}, monkeypatch, tokenizer_class="Evil")
    refused(generate(run, model, "-o", tmp_path / "t.png"), f"{model / 'tokenizer'}", "custom code", "runs none")
    assert not marker.exists()


def test_steps_and_sizes_that_cannot_be(
    run: Run, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(run("generate", "a star", "--model", tiny_model, "--steps", 0), "steps")
    refused(run("generate", "a star", "--model", tiny_model, "--steps", 1, "--size", 50), "50")
    refused(run("generate", "a star", "--model", tiny_model, "--steps", 1, "--size", 100000), "--size", "8192")
    refused(run("generate", "\udcff", "--model", tiny_model), "prompt '\\udcff'", "UTF-8")
    refused(run("generate", "a star", "--model", tiny_model, "--steps", "two"), "--steps")
    refused(run("evaluate", "--model", tiny_model, "--suite", "mini-genval"), "mini-genval")
    refused(run("generate"), "prompts")
