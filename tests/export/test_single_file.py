"""A network in one file, as ComfyUI and Civitai have it: made a model around its base, or refused."""

from __future__ import annotations

import json
import os
import re
import shutil

import diffusers
import pytest
import torch
from original_names import ENCODED, original
from safetensors.torch import load_file, save_file
from tiny import BUILDERS

from apexflow import load
from apexflow.backbones import load_backbone, read_settings, resolve
from apexflow.backbones.folder import weight_paths
from apexflow.backbones.presets import load_shapes, presets
from apexflow.backbones.sdxl_file import PREFIXES as PARTS
from apexflow.backbones.single_file import LDM, PREFIXES, _converter, read_single_file
from apexflow.errors import UserError
from apexflow.export import export

# Whose makers' names diffusers converts, at any size. Of FLUX.1 and Lumina-2 it splits fused tensors at the published sizes.
CONVERTED = ("sana", "sd3", "flux2", "z_image", "sdxl")
PUBLISHED = {
    "black-forest-labs/FLUX.1-dev",
    "black-forest-labs/FLUX.1-schnell",
    "black-forest-labs/FLUX.2-klein-4B",
    "Alpha-VLLM/Lumina-Image-2.0",
    "Efficient-Large-Model/Sana_600M_512px_diffusers",
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers",
    "stabilityai/stable-diffusion-3-medium-diffusers",
    "stabilityai/stable-diffusion-3.5-medium",
    "stabilityai/stable-diffusion-3.5-large",
    "stabilityai/stable-diffusion-xl-base-1.0",
    "Tongyi-MAI/Z-Image-Turbo",
}


def tuned(folder):
    """Other weights of the network of a folder, its backbone, and the folder that it is in."""
    backbone = load_backbone(str(folder), "meta")
    part = folder / backbone.network_part
    return {name: torch.randn_like(tensor) for name, tensor in load_file(weight_paths(part)[0]).items()}, backbone


def written(tensors, file, prefix="", beside=(), metadata=None):
    save_file({prefix + name: t for name, t in tensors.items()} | {n: torch.ones(2) for n in beside}, file, metadata)
    return str(file)


def same(folder, backbone, tensors):
    found = load_file(weight_paths(folder / backbone.network_part)[0])
    return found.keys() == tensors.keys() and all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", BUILDERS)
def test_names_of_diffusers_come_back_to_the_bit_with_any_prefix(name, folder_of, tmp_path):
    base = folder_of(name)
    tensors, backbone = tuned(base)
    for number, prefix in enumerate(("", *PREFIXES)):
        file = written(tensors, tmp_path / f"{number}.safetensors", prefix)
        result = export(file, tmp_path / str(number), base=str(base))
        assert (result["kind"], result["scheduler"]) == ("model", "original") and "told" not in result
        assert same(tmp_path / str(number), backbone, tensors)


@pytest.mark.parametrize("name", BUILDERS)
def test_it_is_a_model_like_any_other(name, folder_of, tmp_path):
    base = folder_of(name)
    tensors, _ = tuned(base)
    export(written(tensors, tmp_path / "net.safetensors"), tmp_path / "model", base=str(base))
    made = load(str(tmp_path / "model"), device="cpu").backbone
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in made.transformer.state_dict().items())
    old = load_backbone(str(base))
    assert (made.time_shift, made.scheduler.config) == (old.time_shift, old.scheduler.config)
    assert (made.settings.steps, made.settings.guidance) == (old.settings.steps, old.settings.guidance)
    with torch.no_grad():  # all else is the base's
        found, expected = made.encode_prompts(["a red cube"]), old.encode_prompts(["a red cube"])
    assert torch.equal(found.embeds, expected.embeds)


@pytest.mark.parametrize("prefix", ["", LDM])
@pytest.mark.parametrize("name", CONVERTED)
def test_names_of_the_makers_are_converted(name, prefix, folder_of, tmp_path):
    base = folder_of(name)
    tensors, backbone = tuned(base)
    file = written(original(backbone.transformer, tensors), tmp_path / "net.safetensors", prefix)
    export(file, tmp_path / "model", base=str(base))
    assert same(tmp_path / "model", backbone, tensors)


@pytest.mark.parametrize("model", sorted(PUBLISHED))
def test_names_of_the_makers_at_published_depth(model):
    """All names and rows of the published network, with a column each: converters cut and swap rows alone."""
    network = load_shapes(model).transformer
    shapes = {name: (*t.shape[:1], *(1 for _ in t.shape[1:])) for name, t in network.state_dict().items()}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    found = _converter(network)(original(network, tensors))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_every_published_family_is_accounted_for():
    """Which ones diffusers converts, as docs/models.md says."""
    converts = {load_shapes(model).family for model in presets() if _converter(load_shapes(model).transformer)}
    assert converts == {"sana", "sana-sprint", "sd3", "flux", "flux2-klein", "z-image", "lumina2", "sdxl"}
    assert {load_shapes(model).family for model in PUBLISHED} == converts - {"sana-sprint"}


def test_what_is_beside_the_network_is_left_out_and_told(folder_of, tmp_path):
    base = folder_of("sd3")
    tensors, backbone = tuned(base)
    beside = ("first_stage_model.encoder.conv_in.weight", "text_encoders.clip_l.transformer.x", "alphas_cumprod")
    file = written(original(backbone.transformer, tensors), tmp_path / "all.safetensors", LDM, beside)
    told = export(file, tmp_path / "model", base=str(base))["told"]
    for group in ("first_stage_model", "text_encoders", "alphas_cumprod", str(base)):
        assert group in told
    assert told in (tmp_path / "model" / "README.md").read_text()
    assert same(tmp_path / "model", backbone, tensors)


ENCODERS = ("text_encoder", "text_encoder_2", "vae")


def whole_sdxl(base):
    """A file of SDXL with all its parts, other weights than the base's, and those by part in the names of the folder."""
    tensors, backbone = tuned(base)
    parts = {
        part: {n: torch.randn_like(t) for n, t in load_file(weight_paths(base / part)[0]).items()} for part in ENCODERS
    }
    held = {LDM + name: tensor for name, tensor in original(backbone.transformer, tensors).items()}
    for part, names in parts.items():
        held |= {PARTS[part] + name: tensor for name, tensor in ENCODED[part](names).items()}
    held[PARTS["text_encoder"] + "text_model.embeddings.position_ids"] = torch.arange(77)[None]
    held[PARTS["text_encoder_2"] + "logit_scale"] = torch.ones(())
    return held, {"unet": tensors} | parts


def test_a_file_of_sdxl_brings_its_text_encoders_and_autoencoder(folder_of, tmp_path):
    base = folder_of("sdxl")
    held, parts = whole_sdxl(base)
    save_file(held, tmp_path / "all.safetensors")
    assert "told" not in export(str(tmp_path / "all.safetensors"), tmp_path / "model", base=str(base))
    made = load(str(tmp_path / "model"), device="cpu").backbone
    networks = {"unet": made.transformer, "vae": made.vae} | {part: made.encoder(part) for part in ENCODERS[:2]}
    for part, tensors in parts.items():
        found = networks[part].state_dict()
        assert found.keys() == tensors.keys() and all(torch.equal(found[name], t) for name, t in tensors.items())
    diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "model")


def test_encoders_of_another_model_are_refused(folder_of, tmp_path):
    held, _ = whole_sdxl(folder_of("sdxl"))
    lost = PARTS["text_encoder_2"] + "ln_final.weight"
    save_file({name: tensor for name, tensor in held.items() if name != lost}, tmp_path / "all.safetensors")
    with pytest.raises(
        UserError, match=r"does not fit the text_encoder_2 of .* such as text_model.final_layer_norm.weight;"
    ):
        export(str(tmp_path / "all.safetensors"), tmp_path / "model", base=str(folder_of("sdxl")))
    lost = PARTS["vae"] + "decoder.up.3.upsample.conv.bias"  # which the converter trips over
    save_file({name: tensor for name, tensor in held.items() if name != lost}, tmp_path / "all.safetensors")
    with pytest.raises(UserError, match="does not fit the vae of"):
        export(str(tmp_path / "all.safetensors"), tmp_path / "model", base=str(folder_of("sdxl")))
    assert not (tmp_path / "model").exists()


def test_the_card_says_what_it_is_made_of_and_forgets_what_the_base_was(folder_of, tmp_path):
    base = shutil.copytree(folder_of("sana"), tmp_path / "base")
    (base / "apexflow.json").write_text(json.dumps({"steps": 3, "card": {"recipe": {"model": "x"}}}))
    tensors, _ = tuned(base)
    export(written(tensors, tmp_path / "net.safetensors"), tmp_path / "model", base=str(base))
    settings = read_settings(tmp_path / "model")
    assert settings.steps == 3 and settings.card.keys() == {"network"}
    said = settings.card["network"]
    assert (said["file"], said["base"]) == ("net.safetensors", str(base)) and len(said["sha256"]) == 64


def test_the_base_needs_no_weights_of_its_network_and_keeps_its_files(folder_of, tmp_path):
    base = shutil.copytree(folder_of("sana"), tmp_path / "base")
    tensors, backbone = tuned(base)
    weight_paths(base / "transformer")[0].unlink()
    before = {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
    export(written(tensors, tmp_path / "net.safetensors"), tmp_path / "model", base=str(base))
    assert same(tmp_path / "model", backbone, tensors)
    assert before == {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
    for part in ("vae", "text_encoder"):  # no room on the disk for what is there already
        (old,), (new,) = weight_paths(base / part), weight_paths(tmp_path / "model" / part)
        assert os.path.samefile(old, new)
    assert not os.path.samefile(base / "vae" / "config.json", tmp_path / "model" / "vae" / "config.json")


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("name", ["qwen_image", "sd3"])
def test_plain_eight_bits_are_widened(name, kind, folder_of, tmp_path):
    base = folder_of(name)
    tensors, backbone = tuned(base)
    narrow = {name: tensor.to(kind) for name, tensor in tensors.items()}
    given = narrow if name == "qwen_image" else original(backbone.transformer, narrow)
    result = export(written(given, tmp_path / "net.safetensors"), tmp_path / "model", base=str(base))
    assert "eight bits" in result["told"]
    assert same(tmp_path / "model", backbone, {name: tensor.bfloat16() for name, tensor in narrow.items()})


def lacks(tensors):
    return {name: tensor for name, tensor in tensors.items() if name != "proj_out.weight"}


def wider(tensors):
    return tensors | {"proj_out.weight": torch.zeros(2, 3)}


BAD = {
    "missing": (lacks, {}, "it lacks 1 of .* tensors, such as proj_out.weight; give with --base the model"),
    "unexpected": (
        lambda t: t | {"more.weight": torch.ones(2)},
        {},
        "it has 1 that the model does not, such as more.w",
    ),
    "shape": (wider, {}, r"1 have another shape, such as proj_out.weight, which is \(2, 3\) and not \("),
    "further layer": (
        lambda t: t | {"transformer_blocks.9.attn.to_q.weight": torch.ones(2)},
        {},
        "does not, such as transformer_blocks.9",
    ),
    "fp8 scaled": (
        lambda t: t | {"proj_out.scale_weight": torch.ones(())},
        {},
        r"fewer bits with scales \(proj_out.scale_weight\).* use the file in bf16",
    ),
    "marked scaled": (lambda t: t | {"scaled_fp8": torch.ones(2)}, {}, "fewer bits with scales"),
    "whole numbers": (
        lambda t: t | {"proj_out.weight": torch.ones(2, 2, dtype=torch.int8)},
        {},
        "as I8, .* use the file",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_file_that_does_not_fit_is_refused_in_a_line(fault, folder_of, tmp_path):
    change, metadata, told = BAD[fault]
    base = folder_of("qwen_image")
    file = written(change(tuned(base)[0]), tmp_path / "net.safetensors", metadata=metadata)
    with pytest.raises(UserError, match=told) as caught:
        export(file, tmp_path / "model", base=str(base))
    assert file in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.safetensors"]


@pytest.mark.parametrize("of", [name for name in BUILDERS if name not in ("sdxl_lcm", "pixart_sigma", "flux_schnell")])
def test_the_network_of_another_family_is_refused(of, folder_of, tmp_path):
    other = "flux_dev" if of != "flux_dev" else "sd3"
    tensors, backbone = tuned(folder_of(of))
    given = original(backbone.transformer, tensors) if of in CONVERTED else tensors
    file = written(given, tmp_path / "net.safetensors", LDM)
    with pytest.raises(UserError, match=r"does not fit the network of .*it lacks .*it has") as caught:
        read_single_file(tmp_path / "net.safetensors", load_backbone(str(folder_of(other)), "meta"), "BASE", tmp_path)
    assert file in str(caught.value)


@pytest.mark.parametrize(
    ("marks", "metadata"), [({"v_pred": torch.ones(0)}, None), ({}, {"modelspec.prediction_type": "v"})]
)
def test_a_file_that_says_it_predicts_v_is_refused(marks, metadata, folder_of, tmp_path):
    file = written(tuned(folder_of("sdxl"))[0] | marks, tmp_path / "net.safetensors", metadata=metadata)
    with pytest.raises(UserError, match=re.escape(f"{file} predicts v: of DDPM models, use one that predicts epsilon")):
        export(file, tmp_path / "model", base=str(folder_of("sdxl")))


def test_a_guided_network_is_not_taken_for_one_that_takes_no_guidance(folder_of, tmp_path):
    for one, other, told in (("flux_dev", "flux_schnell", "it has 4"), ("flux_schnell", "flux_dev", "it lacks 4")):
        file = written(tuned(folder_of(one))[0], tmp_path / "net.safetensors")
        with pytest.raises(UserError, match=told):
            export(file, tmp_path / "model", base=str(folder_of(other)))


def test_names_that_diffusers_does_not_convert_are_told_so(folder_of, tmp_path):
    file = written({"blocks.0.attn.qkv.weight": torch.ones(2)}, tmp_path / "net.safetensors")
    with pytest.raises(UserError, match="of pixart only the names of diffusers are read"):
        export(file, tmp_path / "model", base=str(folder_of("pixart_alpha")))


def test_damaged_missing_and_pickled_files(tmp_path):
    tensors, _ = tuned(resolve("mini-teacher"))
    file = tmp_path / "net.safetensors"
    written(tensors, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=re.escape(f"cannot read {file}: ")):
        export(str(file), tmp_path / "model", base="mini-teacher")
    with pytest.raises(UserError, match=r"does not exist: .* the file of a network"):
        export(str(tmp_path / "none.safetensors"), tmp_path / "model", base="mini-teacher")
    for ending in ("ckpt", "pt", "bin"):
        pickled = tmp_path / f"net.{ending}"
        pickled.write_bytes(b"anything")
        with pytest.raises(UserError, match=f"net.{ending} is a pickle.*convert it to safetensors first"):
            export(str(pickled), tmp_path / "model", base="mini-teacher")


def test_what_was_asked_must_suit_a_network(tmp_path):
    file = written(tuned(resolve("mini-teacher"))[0], tmp_path / "net.safetensors")
    with pytest.raises(UserError, match="holds a network alone: give the model that it was tuned from with --base"):
        export(file, tmp_path / "model")
    with pytest.raises(UserError, match="no LoRA to merge"):
        export(file, tmp_path / "model", base="mini-teacher", merge=True)
    with pytest.raises(UserError, match=r"makes a model of it.*--rank then"):
        export(file, tmp_path / "model", base="mini-teacher", rank=4)
    with pytest.raises(UserError, match=r"net.safetensors holds a network alone: `apexflow export .* -o FOLDER`"):
        load(file)
    with pytest.raises(UserError, match="is a whole network, not a LoRA: `apexflow export"):
        load("mini-teacher", device="cpu", lora=file)
