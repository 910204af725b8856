"""`apexflow export`: what it writes, loaded by the stock pipelines, and what it refuses."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from stock import largest_difference, load_stock
from stock_runs import noise, our_latents, stock_latents, student
from test_lora import tuned
from tiny import BUILDERS

from apexflow import generator
from apexflow.backbones import BUILT_IN, load_backbone
from apexflow.errors import UserError
from apexflow.export import export, save_lora
from apexflow.export.folder import find_source
from apexflow.export.stock import call_options
from apexflow.lora.merge import FILE, Pair, read_lora


@pytest.mark.parametrize("name", ["sana", "qwen_image", "sdxl"])
def test_a_lora_file_and_its_merge(name, folder_of, tmp_path):
    roles = tuned(folder_of(name), alpha=6)
    file = save_lora(roles, tmp_path / "lora")
    base = str(folder_of(name))
    result = export(str(file.parent), tmp_path / "copy", base=base)
    assert result["kind"] == "lora" and (tmp_path / "copy" / FILE).read_bytes() == file.read_bytes()
    assert "load_lora_weights" in (tmp_path / "copy" / "README.md").read_text()
    assert export(str(file), tmp_path / "merged", merge=True, base=base)["kind"] == "model"
    part = "unet" if name == "sdxl" else "transformer"
    expected = dict(roles.final().state_dict())
    found = load_file(tmp_path / "merged" / part / "diffusion_pytorch_model.safetensors")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.allclose(found[key], tensor, atol=1e-6), key
    original = load_file(next((folder_of(name) / part).glob("*.safetensors")))
    assert any(not torch.equal(found[key], tensor) for key, tensor in original.items())


@pytest.mark.parametrize(
    ("said", "scales"),
    [
        ({}, (1, 1)),
        ({"r": 4, "lora_alpha": 8, "rank_pattern": None}, (2, 2)),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, (4, 4)),
        ({"r": 4, "lora_alpha": 8, "rank_pattern": {"to_q": 16}, "alpha_pattern": {r"0\.to_k": 2}}, (0.5, 0.5)),
        ({"r": 1, "rank_pattern": {"^blocks.0.to_q": 4}, "alpha_pattern": {"q": 9}}, (0.25, 1)),
    ],
)
def test_the_scale_of_a_lora_is_what_peft_makes_of_its_config(said, scales, tmp_path):
    file = with_metadata(tmp_path, {f"transformer.{key}": value for key, value in said.items()})
    pairs = read_lora(file, load_backbone("mini-teacher", "meta"))
    assert tuple(pairs[f"blocks.0.to_{name}"].scale for name in "qk") == scales


def with_metadata(folder, metadata):
    names = [f"transformer.blocks.0.to_{name}.lora_{side}.weight" for name in "qk" for side in "AB"]
    save_file(
        {name: torch.ones(1, 1) for name in names}, folder / FILE, {"lora_adapter_metadata": json.dumps(metadata)}
    )
    return folder / FILE


def test_the_readme_of_a_lora_for_a_shipped_model_names_its_folder(tmp_path):
    file = save_lora(tuned(BUILT_IN / "mini-teacher"), tmp_path / "lora")
    export(str(file), tmp_path / "copy", base="mini-teacher")
    named = re.search(r"from_pretrained\('([^']+)'", (tmp_path / "copy" / "README.md").read_text())
    assert named is not None and (Path(named[1]) / "model_index.json").is_file()


def test_the_readme_of_a_model_called_as_a_shipped_one_names_the_copy(folder_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export(str(student(folder_of, "sana", tmp_path)), Path("mini-student"))
    assert "from_pretrained('mini-student'" in (tmp_path / "mini-student" / "README.md").read_text()


def test_the_readme_of_a_folder_whose_name_is_not_utf8(tmp_path):
    output = tmp_path / os.fsdecode(b"l\xe4uft")
    export("mini-student", output)
    assert (output / "README.md").read_text("utf-8").startswith("# l\\udce4uft\n")


@pytest.mark.parametrize("lora", [True, False])
def test_the_lines_of_a_readme_are_python_whatever_the_output_is_called(lora, folder_of, tmp_path):
    source, base = str(folder_of("sana")), None
    if lora:
        source, base = str(save_lora(tuned(folder_of("sana")), tmp_path / "lora")), str(folder_of("sana"))
    output = tmp_path / "my \"best\"\n'model'"
    export(source, output, base=base)
    text = (output / "README.md").read_text()
    code = re.fullmatch(r"# my \"best\" 'model'\n\n.*```python\n(.*)\n```\n", text, re.DOTALL)
    assert code is not None
    calls = [node for node in ast.walk(ast.parse(code[1])) if isinstance(node, ast.Constant)]
    assert str(output) in [call.value for call in calls]


@pytest.mark.parametrize("name", list(BUILDERS))
def test_the_call_of_a_readme_hands_over_the_prompt_whatever_comes_first(name, folder_of, tmp_path):
    export(str(folder_of(name)), tmp_path / "out")
    code = (tmp_path / "out" / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    (call,) = (node for node in ast.walk(ast.parse(code)) if getattr(getattr(node, "func", None), "id", None) == "pipe")
    pipeline = getattr(diffusers, json.loads((tmp_path / "out" / "model_index.json").read_text())["_class_name"])
    given = [ast.literal_eval(value) for value in call.args], {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    bound = inspect.signature(pipeline.__call__).bind(None, *given[0], **given[1])
    assert bound.arguments["prompt"] == "a red cube"


def test_a_folder_of_licenses_is_passed_over(folder_of, tmp_path):
    model = Path(shutil.copytree(folder_of("sana"), tmp_path / "m"))
    (model / "LICENSES").mkdir()
    (model / "LICENSE.txt").write_text("free")
    export(str(model), tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE.txt").is_file() and not (tmp_path / "out" / "LICENSES").exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_readme_of_a_lora_for_sana_names_the_precision_that_it_was_trained_in(
    precision, folder_of, tmp_path, monkeypatch
):
    monkeypatch.setattr(generator, "LARGE", 1000)
    run, base = tmp_path / "run", folder_of("sana")
    roles = tuned(base)
    backbone = roles.backbone
    recipe = {"model": str(base), "tuning": {"kind": "lora"}, "precision": precision}
    save_lora(roles, run / "lora")
    backbone.transformer = roles.final()
    (run / "model").mkdir()
    backbone.save(run / "model", replace(backbone.settings, card={"recipe": recipe}))
    (run / "recipe.json").write_text(json.dumps(recipe))
    export(str(run), tmp_path / "out")
    # The exported file alone, with the card beside it, says the same.
    export(str(tmp_path / "out"), tmp_path / "again", base=str(base))
    named = {"fp32": "float32", "bf16": "bfloat16"}[precision]
    for folder in ("out", "again"):
        assert f"torch_dtype=torch.{named})" in (tmp_path / folder / "README.md").read_text()
    export(str(folder_of("sd3")), tmp_path / "sd3")
    assert "torch_dtype=torch.bfloat16)" in (tmp_path / "sd3" / "README.md").read_text()


def test_a_pair_adds_to_convolutions_of_any_kernel():
    x = torch.randn(2, 3, 8, 8)
    pair = Pair(torch.randn(2, 3, 3, 3), torch.randn(5, 2, 1, 1), 0.5)
    delta = pair.delta((5, 3, 3, 3))
    two = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, pair.down), pair.up)
    assert torch.allclose(torch.nn.functional.conv2d(x, delta), 0.5 * two, atol=1e-5)
    assert pair.fits((5, 3, 3, 3)) and not pair.fits((5, 4, 3, 3)) and not pair.fits((4, 3, 3, 3))
    assert not replace(pair, up=torch.randn(5, 2, 3, 3)).fits((5, 3, 3, 3))


# -- What is refused ---------------------------------------------------------------------------------------------------


def refused(tmp_path, words, *arguments, **named):
    with pytest.raises(UserError) as caught:
        export(*arguments, **named)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value
    assert not list(tmp_path.glob(".partial-*"))


def test_a_lora_for_another_model(folder_of, tmp_path):
    file = save_lora(tuned(folder_of("sd3")), tmp_path / "lora")
    for merge in (False, True):
        words = ("LoRA for another model", "no such weight")
        refused(tmp_path, words, str(file), tmp_path / "o", merge=merge, base=str(folder_of("sana")))
    tensors = {key: value[:, :-1] if ".lora_A." in key else value for key, value in load_file(file).items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, file)
    refused(tmp_path, ("LoRA for another model", "shape"), str(file), tmp_path / "o", base=str(folder_of("sd3")))
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "said",
    [
        [],
        {"r": None},
        {"r": 0},
        {"r": True},
        {"r": "4"},
        {"rank_pattern": [1]},
        {"rank_pattern": {"(": 4}},
        {"rank_pattern": {"(x+x+)+y": 4}},
        {"lora_alpha": -1},
        {"lora_alpha": True},
        {"lora_alpha": 1e400},
    ],
)
def test_a_lora_that_does_not_say_its_scale(folder_of, tmp_path, said):
    metadata = {f"transformer.{key}": value for key, value in said.items()} if said else said
    file, output = with_metadata(tmp_path, metadata), tmp_path / "o"
    refused(
        tmp_path,
        ("does not give a readable scale", str(file)),
        str(file),
        output,
        merge=True,
        base=str(folder_of("sana")),
    )


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.tensor(1.0), "shape ()"),
        (torch.ones(1), "shape (1,)"),
        (torch.ones(0, 1), "shape (0, 1)"),
        (torch.ones(1, 1, dtype=torch.int8), "int8"),
        (torch.tensor([[float("nan")]]), "a value that is not finite"),
    ],
    ids=str,
)
def test_a_lora_whose_tensors_are_none(folder_of, tmp_path, tensor, words):
    tensors = load_file(with_metadata(tmp_path, {})) | {"transformer.blocks.0.to_k.lora_A.weight": tensor}
    save_file(tensors, tmp_path / FILE)
    arguments = (str(tmp_path / FILE), tmp_path / "o")
    refused(tmp_path, (FILE, "blocks.0.to_k", words), *arguments, merge=True, base=str(folder_of("sana")))


def test_the_model_of_a_run_is_what_a_lora_of_it_is_loaded_into(folder_of, tmp_path):
    shutil.copytree(folder_of("sana"), tmp_path / "run" / "model")
    (tmp_path / "run" / "recipe.json").write_text("{}")
    file = save_lora(tuned(folder_of("sana")), tmp_path / "lora")
    export(str(file), tmp_path / "o", base=str(tmp_path / "run"))
    assert find_source(str(file), str(tmp_path / "run")).name == str(tmp_path / "run" / "model")  # as of generate
    assert f"from_pretrained({str(tmp_path / 'run' / 'model')!r}" in (tmp_path / "o" / "README.md").read_text()


def test_a_model_with_a_recipe_beside_it_is_exported_as_the_model_that_it_is(folder_of, tmp_path):
    model = shutil.copytree(folder_of("sana"), tmp_path / "model")
    (model / "recipe.json").write_text("{}")
    assert export(str(model), tmp_path / "o")["kind"] == "model"


def test_the_pattern_of_a_lora_is_no_search_without_end(tmp_path):
    names = [f"transformer.{'x' * 60}.lora_{side}.weight" for side in "AB"]
    metadata = {"transformer.alpha_pattern": {"(x+x+)+y": 2}}
    tensors = {name: torch.ones(1, 1) for name in names}
    save_file(tensors, tmp_path / FILE, {"lora_adapter_metadata": json.dumps(metadata)})
    with pytest.raises(UserError, match="is not a module name"):
        read_lora(tmp_path / FILE, load_backbone("mini-teacher", "meta"))


def test_sources_that_are_none(folder_of, tmp_path):
    output, empty = tmp_path / "o", tmp_path / "empty"
    empty.mkdir()
    refused(tmp_path, ("not a run", "a model folder"), str(empty), output)
    refused(tmp_path, ("not found",), "nosuch", output)
    refused(tmp_path, ("is empty",), "", output)
    refused(tmp_path, ("not a LoRA file", "leave out --base"), str(folder_of("sana")), output, base="mini-teacher")
    (empty / "recipe.json").write_text(json.dumps({"model": "x", "tuning": {"kind": "full"}}))
    refused(tmp_path, ("not finished", "--resume"), str(empty), output)
    (empty / "model").mkdir()
    (empty / "model" / "model_index.json").write_text("{}")
    for content in ("{", "[]", '{"model": "x"}'):
        (empty / "recipe.json").write_text(content)
        refused(tmp_path, ("recipe.json is damaged", "--resume"), str(empty), output)
    refused(tmp_path, ("exists", "-o"), str(folder_of("sana")), empty)
    file = save_lora(tuned(folder_of("sana")), tmp_path / "lora")
    refused(tmp_path, ("--base",), str(file), output)
    refused(tmp_path, ("does not exist",), str(tmp_path / "none.safetensors"), output, base="x")
    refused(tmp_path, ("no LoRA to merge",), str(folder_of("sana")), output, merge=True)
    for content in (b"short", file.read_bytes()[:-9]):
        file.write_bytes(content)
        refused(tmp_path, ("cannot read", FILE), str(file), output, base=str(folder_of("sana")))
    save_file({}, file)
    refused(tmp_path, ("holds no LoRA",), str(file), output, base=str(folder_of("sana")))


def test_families_with_schedulers_of_their_own(folder_of, tmp_path):
    for name in ("sdxl", "pixart_sigma", "sana_sprint"):
        refused(tmp_path, ("cannot use a flow scheduler",), str(folder_of(name)), tmp_path / "o", "stock")
        result = export(str(folder_of(name)), tmp_path / name)
        assert result["scheduler"] == "original" and "sigmas" not in result["call"]
        one, other = (folder / "scheduler" / "scheduler_config.json" for folder in (tmp_path / name, folder_of(name)))
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("name", ["sdxl", "sdxl_lcm", "pixart_sigma", "sana_sprint"])
def test_a_one_step_student_is_asked_at_pure_noise_by_a_scheduler_of_its_own(name, folder_of, tmp_path):
    backbone = load_backbone(str(folder_of(name)))
    if name != "sana_sprint":  # those of the published models
        kind = diffusers.DPMSolverMultistepScheduler if name == "pixart_sigma" else diffusers.EulerDiscreteScheduler
        backbone.scheduler = kind.from_config(backbone.scheduler.config, timestep_spacing="leading", steps_offset=1)
    source, output = tmp_path / "student", tmp_path / "out"
    backbone.save(source, replace(backbone.settings, steps=1, guidance=1.0))
    call = export(str(source), output)["call"]
    assert call.get("timesteps") == (None if name == "sana_sprint" else [999])
    ours = ("num_inference_steps", "max_sequence_length", "height", "width")
    options = {key: call[key] for key in call if key not in ours}
    z = noise(backbone)
    latents = stock_latents(name, load_stock(output), z, 1, **options)
    assert largest_difference(latents, our_latents(backbone, z, torch.tensor([1.0, 0.0]))) < 1e-4
    if name == "sana_sprint":
        assert call["intermediate_timesteps"] is None  # else its pipeline refuses any number of steps but two
        assert "intermediate_timesteps" not in call_options(backbone, replace(backbone.settings, steps=2), stock=False)
    else:
        four = call_options(backbone, replace(backbone.settings, steps=4), stock=False)["timesteps"]
        assert four[0] == 999 and all(later > earlier > 0 for later, earlier in itertools.pairwise(four))


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer"])
def test_a_model_without_one_of_its_parts_is_not_exported(part, folder_of, tmp_path):
    model = Path(shutil.copytree(folder_of("sana"), tmp_path / "m"))
    index = json.loads((model / "model_index.json").read_text())
    for entry in (None, [None, None]):
        (model / "model_index.json").write_text(json.dumps(index | {part: entry}))
        refused(tmp_path, (f"names no {part}",), str(model), tmp_path / "o")
    (model / "model_index.json").write_text(json.dumps(index))
    for weights in (model / part).glob("*.safetensors"):
        weights.unlink()
        refused(tmp_path, ("incomplete", f"{part}/"), str(model), tmp_path / "o")
    shutil.rmtree(model / part)
    refused(tmp_path, ("incomplete", f"{part}/"), str(model), tmp_path / "o")


def test_a_second_time_that_does_not_fit_is_not_exported(folder_of, tmp_path):
    model = Path(shutil.copytree(folder_of("sana"), tmp_path / "m"))
    (model / "second_time.safetensors").write_bytes(b"nothing")
    refused(tmp_path, ("second_time.safetensors does not fit",), str(model), tmp_path / "o")


def test_a_truncated_model_and_a_full_disk(folder_of, tmp_path, monkeypatch):
    model = tmp_path / "m"
    shutil.copytree(folder_of("sana"), model)
    weights = next((model / "vae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-10])
    refused(tmp_path, ("vae", "restore"), str(model), tmp_path / "o")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("apexflow.export.folder.shutil.copytree", full)
    refused(tmp_path, ("No space left",), str(folder_of("sana")), tmp_path / "o")
    assert not (tmp_path / "o").exists()
