"""LoRA files in other programs' names: read as the stock pipelines read them, or refused with what cannot be."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from stock import largest_difference, load_stock, one_step
from stock_runs import PROMPTS, SIZE, noise, our_latents

from apexflow.backbones import load_backbone
from apexflow.backbones.presets import load_shapes
from apexflow.errors import UserError
from apexflow.export import export
from apexflow.lora.merge import FILE, Pair, read_lora
from apexflow.sampler import time_grid

RANK = 4


def pair_of(name, shapes, fused=(), alpha=None, rank=RANK, seed=0):
    """The tensors of a pair for the weights of `shapes`, one below the other, in the names of kohya."""
    random = torch.Generator().manual_seed(seed)
    rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
    made = {
        f"{name}.lora_down.weight": 0.3 * torch.randn(rank, columns, generator=random),
        f"{name}.lora_up.weight": 0.3 * torch.randn(rows, rank, generator=random),
    }
    return made | ({f"{name}.alpha": torch.tensor(float(alpha))} if alpha is not None else {})


def shapes_in(folder, part="transformer"):
    tensors = load_file(next((folder / part).glob("*.safetensors")))
    return {name.removesuffix(".weight"): tuple(tensor.shape) for name, tensor in tensors.items()}


def kohya_flux(shapes):
    """The double blocks and the ends of the single ones, with the fused projections of the original FLUX, as kohya names them."""
    block, single = "transformer_blocks.0", "single_transformer_blocks"
    images, texts = (f"{block}.attn.to_{x}" for x in "qkv"), (f"{block}.attn.add_{x}_proj" for x in "qkv")
    named = {
        "double_blocks_0_img_attn_qkv": images,
        "double_blocks_0_txt_attn_qkv": texts,
        "double_blocks_0_img_attn_proj": [f"{block}.attn.to_out.0"],
        "double_blocks_0_txt_mlp_2": [f"{block}.ff_context.net.2"],
        "double_blocks_0_img_mod_lin": [f"{block}.norm1.linear"],
        "single_blocks_1_linear2": [f"{single}.1.proj_out"],
        "single_blocks_1_modulation_lin": [f"{single}.1.norm.linear"],
    }
    tensors = {}
    for seed, (name, modules) in enumerate(named.items()):
        alpha = None if seed == 2 else seed + 1
        tensors |= pair_of(f"lora_unet_{name}", [shapes[module] for module in modules], alpha=alpha, seed=seed)
    return tensors


def comfy_flux(shapes):
    """The same in ComfyUI's names, with dots."""
    dots = {"double_blocks_0_": "double_blocks.0.", "single_blocks_1_": "single_blocks.1."}
    dots |= {"img_attn_": "img_attn.", "txt_attn_": "txt_attn.", "_mlp_": "_mlp.", "mod_": "mod."}
    renamed = {}
    for name, tensor in kohya_flux(shapes).items():
        for old, new in dots.items():
            name = name.replace(old, new)
        renamed[name.replace("lora_unet_", "diffusion_model.").replace("modulation_lin", "modulation.lin")] = tensor
    return renamed


def mixture_flux(shapes):
    """Diffusers' modules in kohya's underscores, the fused projections of single blocks being apart there."""
    modules = [f"single_transformer_blocks.{i}.attn.to_{x}" for i in (0, 1) for x in "qkv"]
    modules.append("transformer_blocks.0.attn.to_add_out")
    tensors = {}
    for seed, module in enumerate(modules):
        name = f"lora_transformer_{module.replace('.', '_')}"
        tensors |= pair_of(name, [shapes[module]], alpha=seed + 1, seed=seed)
    return tensors


def targets_of(shapes):
    return [name for name in shapes if name.endswith(("attn.to_q", "to_out.0", "img_mlp.net.2", "img_mod.1"))]


def lightning(shapes):
    """Bare names of the modules, as Qwen-Image-Lightning has them, each rank and alpha its own."""
    tensors = {}
    for seed, module in enumerate(targets_of(shapes)):
        tensors |= pair_of(module, [shapes[module]], alpha=8, rank=2 + seed % 3, seed=seed)
    return tensors


def comfy_qwen(shapes):
    return {f"diffusion_model.{name}": tensor for name, tensor in lightning(shapes).items()}


def kohya_qwen(shapes):
    def flat(name):
        module, _, ending = name.partition(".lora_") if ".lora_" in name else name.rpartition(".")
        return f"lora_unet_{module.replace('.', '_')}.{'lora_' if '.lora_' in name else ''}{ending}"

    return {flat(name): tensor for name, tensor in lightning(shapes).items()}


def peft_qwen(shapes):
    """With the adapter's name within the tensor's, as the first Lightning has it."""
    sides = {"lora_down": "lora_A.default", "lora_up": "lora_B.default"}
    renamed = {}
    for name, tensor in lightning(shapes).items():
        for old, new in sides.items():
            name = name.replace(old, new)
        if not name.endswith(".alpha"):
            renamed[name] = tensor
    return renamed


def kohya_sdxl(shapes):
    """The U-Net as Stability's own code names it, a convolution among its layers."""
    named = {
        "input_blocks_3_1_transformer_blocks_0_attn1_to_q": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "middle_block_1_proj_in": "mid_block.attentions.0.proj_in",
        "output_blocks_0_1_transformer_blocks_0_attn2_to_out_0": (
            "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"
        ),
    }
    tensors = {}
    for seed, (name, module) in enumerate(named.items()):
        tensors |= pair_of(f"lora_unet_{name}", [shapes[module]], alpha=2, seed=seed)
    out, into = shapes["down_blocks.0.resnets.0.conv1"][:2]
    tensors["lora_unet_input_blocks_1_0_in_layers_2.lora_down.weight"] = 0.3 * torch.randn(RANK, into, 3, 3)
    tensors["lora_unet_input_blocks_1_0_in_layers_2.lora_up.weight"] = 0.3 * torch.randn(out, RANK, 1, 1)
    tensors["lora_unet_input_blocks_1_0_in_layers_2.alpha"] = torch.tensor(2.0)
    return tensors


def kohya_z_image(shapes):
    tensors = {}
    for seed, module in enumerate(name for name in shapes if name.endswith(("attention.to_k", "feed_forward.w2"))):
        tensors |= pair_of(f"lora_unet_{module.replace('.', '_')}", [shapes[module]], alpha=seed + 1, seed=seed)
    return tensors


CASES = [
    ("flux_schnell", kohya_flux),
    ("flux_dev", comfy_flux),
    ("flux_dev", mixture_flux),
    ("qwen_image", lightning),
    ("qwen_image", comfy_qwen),
    ("qwen_image", kohya_qwen),
    ("qwen_image", peft_qwen),
    ("z_image", kohya_z_image),
    ("sdxl", kohya_sdxl),
]


@pytest.mark.parametrize(("name", "make"), CASES, ids=lambda one: getattr(one, "__name__", one))
def test_a_foreign_lora_draws_as_the_stock_pipeline_that_loaded_it(name, make, folder_of, tmp_path):
    base, part = folder_of(name), "unet" if name == "sdxl" else "transformer"
    file = tmp_path / "rival.safetensors"
    save_file(make(shapes_in(base, part)), file)
    pipeline, plain = load_stock(base), load_backbone(str(base))
    z = noise(plain)
    before = one_step(name, pipeline, PROMPTS, z, SIZE, "latent")
    pipeline.load_lora_weights(file)
    after = one_step(name, pipeline, PROMPTS, z, SIZE, "latent")
    assert largest_difference(after, before) > 1e-3
    export(str(file), tmp_path / "merged", merge=True, base=str(base))
    merged = load_backbone(str(tmp_path / "merged"))
    assert largest_difference(our_latents(merged, z, time_grid(1)), after) < 1e-5

    # Without --merge it comes out in diffusers' names, and is the same LoRA.
    export(str(file), tmp_path / "renamed", base=str(base))
    assert all(key.startswith(f"{part}.") and ".lora_" in key for key in load_file(tmp_path / "renamed" / FILE))
    again = load_stock(base)
    again.load_lora_weights(tmp_path / "renamed")
    assert largest_difference(one_step(name, again, PROMPTS, z, SIZE, "latent"), after) < 1e-5


def test_alphas_are_heard_where_diffusers_converter_does_not(folder_of, tmp_path):
    """Its own names with an alpha beside them, and the last layer of the original FLUX."""
    backbone = load_backbone(str(folder_of("flux_dev")), "meta")
    shape = shapes_in(folder_of("flux_dev"))["proj_out"]
    for name in ("lora_unet_final_layer_linear", "transformer.proj_out"):
        tensors = pair_of(name, [shape], alpha=1)
        save_file(tensors, tmp_path / "rival.safetensors")
        pairs = read_lora(tmp_path / "rival.safetensors", backbone)
        down, up = (tensors[f"{name}.lora_{side}.weight"] for side in ("down", "up"))
        assert torch.allclose(pairs["proj_out"].delta(shape), Pair(down, up, 1 / RANK).delta(shape))


def test_fused_projections_of_the_published_flux_come_apart(tmp_path):
    """The converter takes them to be of its size, so no tiny model has them."""
    tensors, file = (
        pair_of("lora_unet_single_blocks_37_linear1", [(7 * 3072, 3072)], alpha=1),
        tmp_path / "rival.safetensors",
    )
    tensors |= pair_of("lora_unet_img_in", [(3072, 64)])  # which its pipeline passes over
    save_file(tensors, file)
    pairs = read_lora(file, load_shapes("black-forest-labs/FLUX.1-dev", torch.bfloat16))
    block, up = "single_transformer_blocks.37", tensors["lora_unet_single_blocks_37_linear1.lora_up.weight"]
    parts = [f"{block}.attn.to_q", f"{block}.attn.to_k", f"{block}.attn.to_v", f"{block}.proj_mlp"]
    assert set(pairs) == {*parts, "x_embedder"}
    for module, rows in zip(parts, up.split([3072, 3072, 3072, 4 * 3072]), strict=True):
        assert torch.equal(pairs[module].scale * pairs[module].up, rows / RANK)
        assert torch.equal(pairs[module].down, tensors["lora_unet_single_blocks_37_linear1.lora_down.weight"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 4)}, ("lora_te1_", "text encoder")),
        ({"text_encoder.layers.0.mlp.fc1.lora_A.weight": (4, 4)}, ("text_encoder.", "text encoder")),
        ({"transformer_blocks.0.attn.to_q.dora_scale": (1, 32)}, ("dora_scale", "DoRA")),
        ({"transformer_blocks.0.attn.to_q.lora_magnitude_vector": (32,)}, ("magnitude", "DoRA")),
        ({"transformer_blocks.0.attn.to_k.hada_w1_a": (4, 4)}, ("hada_w1_a", "LoHa")),
        ({"transformer_blocks.0.attn.to_k.lokr_w1": (4, 4)}, ("lokr_w1", "LoKr")),
        ({"transformer_blocks.0.attn.norm_q.diff": (4,)}, ("norm_q.diff", "whole weight")),
        ({"transformer_blocks.0.attn.to_q.diff_b": (4,)}, ("to_q.diff_b", "whole weight")),
        ({"model.diffusion_model.x.lora_A.weight": (4, 4)}, ("model.diffusion_model.x.lora has only one side",)),
        (
            {"transformer_blocks.0.attn.to_k.weight": (4, 4)},
            ("to_k.weight", "not part of a lora_down and lora_up pair"),
        ),
        ({"transformer_blocks.0.attn.to_k.alpha": ()}, ("to_k.alpha", "not part of a lora_down and lora_up pair")),
        ({"transformer_blocks.0.attn.to_k.lora_down.weight": (4, 32)}, ("to_k.lora", "only one side")),
        ({"transformer_blocks.0.attn.to_q.lora_A.weight": (4, 32)}, ("holds both", "lora_A")),
        ({"transformer_blocks.0.attn.to_q.alpha": (2,)}, ("to_q.alpha", "not a positive number")),
        ({"transformer_blocks.0.attn.to_q.lora_down.weight": (0, 32)}, ("to_q", "(0, 32)")),
    ],
    ids=lambda one: "",
)
def test_what_cannot_be_understood_is_named(change, words, folder_of, tmp_path):
    tensors = lightning(shapes_in(folder_of("qwen_image"))) | {k: torch.ones(v) for k, v in change.items()}
    refused(tensors, words, folder_of("qwen_image"), tmp_path)


def test_numbers_of_eight_bits(folder_of, tmp_path):
    """Real ones are read, though nothing can be multiplied in them; integers are the codes of something else."""
    backbone = load_backbone(str(folder_of("flux_dev")), "meta")
    tensors, file = kohya_flux(shapes_in(folder_of("flux_dev"))), tmp_path / "rival.safetensors"
    narrow = {k: v if k.endswith(".alpha") else v.to(torch.float8_e4m3fn) for k, v in tensors.items()}
    save_file(narrow, file)
    found = read_lora(file, backbone)
    save_file({name: tensor.float() for name, tensor in narrow.items()}, file)
    for module, pair in read_lora(file, backbone).items():
        assert torch.equal(found[module].up, pair.up) and torch.equal(found[module].down, pair.down)
    codes = {k: v if k.endswith(".alpha") else v.to(torch.int8) for k, v in tensors.items()}
    refused(codes, ("int8", "not real numbers"), folder_of("flux_dev"), tmp_path)


def test_names_of_another_model_are_refused(folder_of, tmp_path):
    qwen, flux = (shapes_in(folder_of(name)) for name in ("qwen_image", "flux_dev"))
    refused(kohya_flux(flux), ("another model",), folder_of("qwen_image"), tmp_path)
    refused(kohya_qwen(qwen), ("FluxPipeline", "does not understand", "Incompatible"), folder_of("flux_dev"), tmp_path)
    beyond = {name.replace("blocks_1", "blocks_7"): tensor for name, tensor in kohya_qwen(qwen).items()}
    refused(beyond, ("another model", "transformer_blocks.7"), folder_of("qwen_image"), tmp_path)
    lost = kohya_flux(flux) | pair_of("other.name", [(8, 8)])  # which the converter passes over
    refused(lost, ("only part",), folder_of("flux_dev"), tmp_path)
    refused(comfy_qwen(qwen), ("PixArtSigmaPipeline", "cannot convert"), folder_of("pixart_sigma"), tmp_path)


def test_a_scale_said_twice_is_refused(folder_of, tmp_path):
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 4})}
    tensors = lightning(shapes_in(folder_of("qwen_image")))
    refused(tensors, ("scale twice",), folder_of("qwen_image"), tmp_path, metadata)


def refused(tensors, words, base, tmp_path, metadata=None):
    file = tmp_path / "rival.safetensors"
    save_file(tensors, file, metadata)
    with pytest.raises(UserError) as caught:
        export(str(file), tmp_path / "merged", merge=True, base=str(base))
    told = str(caught.value)
    assert "\n" not in told and str(file) in told and all(word in told for word in words), told
    assert not (tmp_path / "merged").exists()
