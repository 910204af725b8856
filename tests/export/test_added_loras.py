"""LoRAs that are added as a model is loaded: the sums of `export --merge`, weighted and stacked, and what is refused."""

from __future__ import annotations

import json
import shutil
import warnings
from copy import deepcopy
from dataclasses import replace

import four_bit
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stock import load_stock
from test_foreign_lora import lightning, shapes_in
from tiny import BUILDERS

from apexflow import load
from apexflow.backbones import BUILT_IN, load_backbone, read_settings, write_settings
from apexflow.backbones.lora_targets import target_modules
from apexflow.backbones.storage import stored_kind
from apexflow.errors import UserError
from apexflow.export import export
from apexflow.export.folder import find_source
from apexflow.lora.added import Lora, read_loras
from apexflow.lora.merge import FILE

RANK = 3


def lora_for(base, folder, seed=1, settings=None):
    """The folder of a random LoRA on all that a family tunes, in diffusers' names."""
    backbone, random = load_backbone(str(base), "meta"), torch.Generator().manual_seed(seed)
    tensors = {}
    for module, shape in target_modules(backbone).items():
        name, points = f"{backbone.network_part}.{module}", (1,) * (len(shape) - 2)
        tensors[f"{name}.lora_A.weight"] = 0.3 * torch.randn(RANK, *shape[1:], generator=random)
        tensors[f"{name}.lora_B.weight"] = 0.3 * torch.randn(shape[0], RANK, *points, generator=random)
    folder.mkdir()
    save_file(tensors, folder / FILE)
    if settings is not None:
        write_settings(folder, settings)
    return folder


def weights(generator):
    return generator.backbone.transformer.state_dict()


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(tensor, other[name].to(tensor.dtype)) for name, tensor in one.items())


def near(one, other, by=1e-5):
    return all(torch.allclose(tensor, other[name], rtol=0, atol=by) for name, tensor in one.items())


@pytest.mark.parametrize("name", BUILDERS)
def test_a_lora_draws_as_the_model_that_it_is_merged_into(name, folder_of, tmp_path):
    base = folder_of(name)
    own = load_backbone(str(base), "meta").settings
    lora = lora_for(base, tmp_path / "lora", settings=replace(own, steps=2, size=32))
    export(str(lora), tmp_path / "merged", merge=True, base=str(base))
    merged, added = load(tmp_path / "merged", "cpu"), load(base, "cpu", lora=lora)
    assert same(weights(added), weights(merged))
    assert added.backbone.settings == merged.backbone.settings and added.backbone.settings.steps == 2
    ours, theirs = (one.generate("a red cube", None)[0] for one in (added, merged))
    assert ours.size == (32, 32) and ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("name", BUILDERS)
def test_strengths_scale_and_stacked_loras_are_summed(name, folder_of, tmp_path):
    base = str(folder_of(name))
    backbone = load_backbone(base)
    network = backbone.transformer
    plain = deepcopy(network.state_dict())
    first, second = (str(lora_for(base, tmp_path / str(seed), seed)) for seed in (1, 2))

    def added(*given):
        network.load_state_dict(plain)
        read_loras(given, base).add_to(backbone)
        return {key: tensor - plain[key] for key, tensor in network.state_dict().items()}

    one, other = added(first), added(second)
    assert not near(one, other, 1e-2)
    assert same(added(f"{first}:0"), {key: torch.zeros_like(tensor) for key, tensor in plain.items()})
    assert near(added(f"{first}:0.5"), {key: tensor / 2 for key, tensor in one.items()})
    stacked = {key: tensor - 2 * other[key] for key, tensor in one.items()}
    assert near(added(first, f"{second}:-2"), stacked) and near(added(f"{second}:-2", first), stacked)


def test_a_lora_in_other_names_is_added_as_it_is_merged(folder_of, tmp_path):
    base, file = folder_of("qwen_image"), tmp_path / "rival.safetensors"
    save_file(lightning(shapes_in(base)), file)
    export(str(file), tmp_path / "merged", merge=True, base=str(base))
    assert same(weights(load(base, "cpu", lora=file)), weights(load(tmp_path / "merged", "cpu")))


@pytest.mark.parametrize("storage", ["fp8", "nf4"])
def test_a_lora_goes_in_before_the_network_is_stored_narrower(storage, tmp_path, monkeypatch):
    four_bit.use(monkeypatch)
    shipped = load_backbone("mini-student")
    shipped.save(tmp_path / "base", shipped.settings)  # in float32
    lora = lora_for(tmp_path / "base", tmp_path / "lora")
    export(str(lora), tmp_path / "merged", merge=True, base=str(tmp_path / "base"))
    cases = ((tmp_path / "base", lora), (tmp_path / "merged", None))
    added, merged = (load(model, "cpu", storage=storage, lora=file) for model, file in cases)
    assert stored_kind(added.backbone.transformer) == storage
    assert same(*({name: tensor.float() for name, tensor in weights(one).items()} for one in (added, merged)))


def test_the_last_lora_that_says_so_decides_how_the_model_is_drawn(folder_of, tmp_path):
    base = folder_of("sd3")
    own = load_backbone(str(base), "meta").settings
    said = [replace(own, steps=steps, guidance=guidance) for steps, guidance in ((1, 1.0), (4, 2.5))]
    folders = [lora_for(base, tmp_path / str(i), settings=one) for i, one in enumerate((*said, None))]

    def drawn(*order):
        return read_loras([folders[i] for i in order], str(base)).settings

    assert [drawn(*order) for order in ((2,), (0, 1), (1, 0), (1, 2))] == [own, said[1], said[0], said[1]]


def test_the_size_that_a_lora_was_tuned_at_brings_its_time_shift(folder_of, tmp_path):
    base = folder_of("flux_dev")
    own = load_backbone(str(base))
    lora = lora_for(base, tmp_path / "lora", settings=replace(own.settings, size=32))
    added = load(base, "cpu", lora=lora).backbone
    own.draw_at(32)
    assert added.default_size == 32 and added.time_shift == own.time_shift


def test_a_path_with_a_colon_is_a_path(tmp_path):
    for folder in ("of", "of:2"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / FILE).touch()
    of, other = (tmp_path / folder / FILE for folder in ("of:2", "of"))
    named = {
        "of:2": (of, 1),
        f"of:2/{FILE}": (of, 1),
        "of:2:0.5": (of, 0.5),
        "of": (other, 1),
        "of:-3e-1": (other, -0.3),
    }
    assert {name: Lora.named(f"{tmp_path}/{name}") for name in named} == {
        name: Lora(*one) for name, one in named.items()
    }


@pytest.mark.parametrize("said", ["nan", "inf", "-inf", "x", "", "1e999", "0,5"])
def test_a_strength_that_is_no_number(said, tmp_path):
    lora = lora_for("mini-student", tmp_path / "lora")
    refused(f"{lora}:{said}", f"the strength of the LoRA {lora}", repr(said), "give a number")


def test_what_is_no_lora(folder_of, tmp_path):
    lora = lora_for("mini-student", tmp_path / "lora")
    mend = "give a LoRA file"
    refused(tmp_path / "none.safetensors", "none.safetensors does not exist", mend)
    refused(f"{tmp_path / 'none.safetensors'}:0.5", "none.safetensors:0.5 does not exist", mend)
    refused(tmp_path, f"{tmp_path} holds no {FILE}", mend)
    refused([lora, ""], "the name of a LoRA is empty", mend)
    refused(":0.5", "LoRA :0.5 does not exist", mend)
    refused(0.5, "LoRA 0.5 does not exist", mend)
    refused(next((folder_of("sana") / "transformer").glob("*.safetensors")), "not a LoRA")
    (tmp_path / "lora.bin").touch()
    refused(tmp_path / "lora.bin", "is a pickle")
    (tmp_path / "short.safetensors").write_bytes(b"x")
    refused(tmp_path / "short.safetensors", "cannot read")
    refused(lora_for(folder_of("sd3"), tmp_path / "sd3"), "LoRA for another model", "no such weight")
    tensors = load_file(lora / FILE)
    tensors = {key: value[:, :-1].contiguous() if ".lora_A." in key else value for key, value in tensors.items()}
    save_file(tensors, lora / FILE)
    refused(lora, "LoRA for another model", "shape")
    save_file(tensors | {"text_encoder.x.lora_A.weight": torch.ones(1, 1)}, lora / FILE)
    refused(lora, "of a text encoder")


def test_a_lora_of_a_model_with_fewer_layers_is_warned_of(tmp_path):
    file = lora_for("mini-teacher", tmp_path / "lora") / FILE  # six layers, and mini-student has eight
    tensors = load_file(file)

    def told(model, **said):
        config = {f"transformer.{key}": value for key, value in said.items()}
        save_file(tensors, file, {"lora_adapter_metadata": json.dumps(config)})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            read_loras(file, model)
        return [str(one.message) for one in caught]

    targets = list(load_backbone("mini-teacher", "meta").lora_targets)
    [line] = told("mini-student", target_modules=targets)
    assert "for a smaller model than" in line and "transformer_blocks.6." in line and "\n" not in line
    assert told("mini-teacher", target_modules=targets) == []
    assert told("mini-student", target_modules=targets, layers_to_transform=[0, 1, 2, 3, 4, 5]) == []
    assert told("mini-student", target_modules="all-linear") == told("mini-student") == []


def test_a_lora_that_is_in_the_weights_already_is_warned_of(tmp_path):
    base = shutil.copytree(BUILT_IN / "mini-student", tmp_path / "model")
    own, lora = load_backbone(str(base), "meta").settings, lora_for(base, tmp_path / "lora")

    def told(kind, of="run"):
        recipe = {"output": "run", "tuning": {"kind": kind}}  # "full": it was taken out by --rank
        write_settings(base, replace(own, card={"recipe": recipe}))
        write_settings(lora, replace(own, card={"recipe": recipe | {"output": of}}))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            read_loras(lora, str(base))
            find_source(str(lora), str(base))
        return [str(one.message) for one in caught]

    for kind in ("lora", "full"):
        lines = told(kind)
        assert len(lines) == 2 and all(f"{base} already has" in line and "added again" in line for line in lines)
        assert told(kind, "another") == []


def test_a_renamed_lora_names_its_targets_and_is_not_taken_for_its_base(folder_of, tmp_path):
    base = shutil.copytree(folder_of("qwen_image"), tmp_path / "base")
    backbone = load_backbone(str(base), "meta")
    write_settings(base, replace(backbone.settings, card={"recipe": {"output": "run"}}))
    tensors = load_file(lora_for(base, tmp_path / "lora") / FILE)
    file = tmp_path / "comfy.safetensors"
    save_file({key.replace("transformer.", "diffusion_model.", 1): value for key, value in tensors.items()}, file)
    export(str(file), tmp_path / "out", base=str(base))
    with safe_open(tmp_path / "out" / FILE, "pt") as opened:
        said = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert said["transformer.target_modules"] == sorted(backbone.lora_targets)
    assert said["transformer.r"] == said["transformer.lora_alpha"] == RANK
    assert read_settings(tmp_path / "out").card == {}
    load_stock(base).load_lora_weights(tmp_path / "out")


def test_a_mistake_is_told_before_the_model_is_read(folder_of, tmp_path, monkeypatch):
    def read(*_, **__):
        raise AssertionError("the weights were read")

    monkeypatch.setattr("apexflow.backbones.parts._weights", read)
    refused(lora_for(folder_of("sd3"), tmp_path / "sd3"), "LoRA for another model")


def refused(lora, *words):
    with pytest.raises(UserError) as caught:
        load("mini-student", "cpu", lora=lora)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value
