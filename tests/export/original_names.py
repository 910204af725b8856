"""Networks as their makers and ComfyUI name the tensors: the inverse of what diffusers converts.

Names that come to be the same are one fused tensor, in the order q, k, v and MLP.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

FUSED = ("to_q", "add_q", "to_k", "add_k", "to_v", "add_v", "proj_mlp")
NORMS = [(r"norm_(added_)?q\.weight", r"norm.query_norm.scale"), (r"norm_(added_)?k\.weight", r"norm.key_norm.scale")]
T_EMBEDDER = [
    (r"timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"timestep_embedder\.linear_2", "t_embedder.mlp.2"),
]

JOINT = r"^transformer_blocks\.(\d+)\."
ENDS = [(r"^norm_out\.linear", "final_layer.adaLN_modulation.1"), (r"^proj_out", "final_layer.linear")]
SD3 = [
    (r"^pos_embed\.pos_embed", "pos_embed"),
    (r"^pos_embed\.proj", "x_embedder.proj"),
    *((rf"^time_text_embed\.{rule}", new) for rule, new in T_EMBEDDER),
    (r"^time_text_embed\.text_embedder\.linear_1", "y_embedder.mlp.0"),
    (r"^time_text_embed\.text_embedder\.linear_2", "y_embedder.mlp.2"),
    (JOINT + r"attn\.(add_._proj|norm_added_.|to_add_out)", r"joint_blocks.\1.context_block.attn.\2"),
    (JOINT + r"(attn2?\.|norm1\.|ff\.)", r"joint_blocks.\1.x_block.\2"),
    (JOINT + r"(norm1|ff)_context\.", r"joint_blocks.\1.context_block.\2."),
    (r"_block\.norm1\.linear", "_block.adaLN_modulation.1"),
    (r"\.ff\.net\.0\.proj", ".mlp.fc1"),
    (r"\.ff\.net\.2", ".mlp.fc2"),
    (r"(attn2?)\.(to_[qkv]|add_[qkv]_proj)\.", r"\1.qkv."),
    (r"norm_(added_)?([qk])\.weight", r"ln_\2.weight"),
    (r"to_out\.0|to_add_out", "proj"),
    *ENDS,
]
STREAMS = [
    (JOINT + r"attn\.(add_[qkv]_proj|norm_added_.|to_add_out)", r"double_blocks.\1.txt_attn.\2"),
    (JOINT + r"attn\.", r"double_blocks.\1.img_attn."),
    (JOINT + r"ff\.", r"double_blocks.\1.img_mlp."),
    (JOINT + r"ff_context\.", r"double_blocks.\1.txt_mlp."),
    (r"_attn\.(to_[qkv]|add_[qkv]_proj)\.", "_attn.qkv."),
    (r"to_out\.0|to_add_out", "proj"),
    (r"^single_transformer_blocks", "single_blocks"),
]
INPUTS = [(r"^context_embedder", "txt_in"), (r"^x_embedder", "img_in")]
LAYERS = [(r"_in\.linear_1", "_in.in_layer"), (r"_in\.linear_2", "_in.out_layer")]
FLUX = [
    *(
        (rf"^time_text_embed\.{name}_embedder", new)
        for name, new in (("timestep", "time_in"), ("guidance", "guidance_in"))
    ),
    (r"^time_text_embed\.text_embedder", "vector_in"),
    *LAYERS,
    *INPUTS,
    (JOINT + r"norm1\.linear", r"double_blocks.\1.img_mod.lin"),
    (JOINT + r"norm1_context\.linear", r"double_blocks.\1.txt_mod.lin"),
    *STREAMS,
    (r"_mlp\.net\.0\.proj", "_mlp.0"),
    (r"_mlp\.net\.2", "_mlp.2"),
    (r"^(single_blocks\.\d+)\.norm\.linear", r"\1.modulation.lin"),
    (r"^(single_blocks\.\d+)\.(attn\.to_[qkv]|proj_mlp)", r"\1.linear1"),
    (r"^(single_blocks\.\d+)\.proj_out", r"\1.linear2"),
    (r"^(single_blocks\.\d+)\.attn\.", r"\1."),
    *NORMS,
    *ENDS,
]
FLUX2 = [
    (r"^time_guidance_embed\.timestep_embedder", "time_in"),
    *LAYERS,
    *INPUTS,
    (r"(modulation\w*)\.linear", r"\1.lin"),
    *STREAMS,
    (r"_mlp\.linear_in", "_mlp.0"),
    (r"_mlp\.linear_out", "_mlp.2"),
    (r"^(single_blocks\.\d+)\.attn\.to_qkv_mlp_proj", r"\1.linear1"),
    (r"^(single_blocks\.\d+)\.attn\.to_out", r"\1.linear2"),
    (r"^(single_blocks\.\d+)\.attn\.", r"\1."),
    *NORMS,
    *ENDS,
]
ONE_STREAM = [
    (r"\.to_[qkv]\.", ".qkv."),
    (r"\.to_out\.0\.", ".out."),
    (r"norm_([qk])\.weight", r"\1_norm.weight"),
]
Z_IMAGE = [(r"^all_(final_layer|x_embedder)\.2-1", r"\1"), *ONE_STREAM]
LUMINA2 = [
    (r"^time_caption_embed\.caption_embedder", "cap_embedder"),
    *((rf"^time_caption_embed\.{rule}", new) for rule, new in T_EMBEDDER),
    *ONE_STREAM,
    (r"\.attn\.", ".attention."),
    (r"\.linear_([123])\.weight$", r".w\1.weight"),
    (r"\.norm1\.linear", ".adaLN_modulation.1"),
    (r"\.norm1\.norm", ".attention_norm1"),
    (r"^(context_refiner\.\d+)\.norm1", r"\1.attention_norm1"),
    (r"\.norm2", ".attention_norm2"),
    (r"^norm_out\.(linear_1|w1)", "final_layer.adaLN_modulation.1"),
    (r"^norm_out\.(linear_2|w2)", "final_layer.linear"),
]
SANA = [
    (r"^patch_embed", "x_embedder"),
    *((rf"^time_embed\.emb\.{rule}", new) for rule, new in T_EMBEDDER),
    (r"^time_embed\.linear", "t_block.1"),
    (r"^caption_projection\.linear_", "y_embedder.y_proj.fc"),
    (r"^caption_norm", "attention_y_norm"),
    (r"^scale_shift_table", "final_layer.scale_shift_table"),
    (r"^transformer_blocks", "blocks"),
    (r"attn1\.to_[qkv]", "attn.qkv"),
    (r"attn1\.to_out\.0", "attn.proj"),
    (r"attn2\.to_q", "cross_attn.q_linear"),
    (r"attn2\.to_[kv]", "cross_attn.kv_linear"),
    (r"attn2\.to_out\.0", "cross_attn.proj"),
    (r"ff\.conv_(\w+)\.", r"mlp.\1_conv.conv."),
    (r"^proj_out", "final_layer.linear"),
]
RULES = {
    "SD3Transformer2DModel": SD3,
    "FluxTransformer2DModel": FLUX,
    "Flux2Transformer2DModel": FLUX2,
    "ZImageTransformer2DModel": Z_IMAGE,
    "Lumina2Transformer2DModel": LUMINA2,
    "SanaTransformer2DModel": SANA,
}
# What the makers' networks have beside, and never use.
UNUSED = {
    "ZImageTransformer2DModel": ("norm_final.weight",),
    "Lumina2Transformer2DModel": ("norm_final.weight",),
    "SanaTransformer2DModel": ("pos_embed", "y_embedder.y_embedding"),
}
SWAPPED = ("SD3Transformer2DModel", "FluxTransformer2DModel", "Flux2Transformer2DModel")


def original(network: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a network of diffusers in its makers' names, fused and in their order."""
    kind = type(network).__name__
    pieces: dict[str, list[Tensor]] = {}
    for name in sorted(tensors, key=_place):
        new = _ldm(name, network.config) if kind == "UNet2DConditionModel" else _renamed(name, RULES[kind])
        pieces.setdefault(new, []).append(_halves(tensors[name]) if _swaps(kind, name, network) else tensors[name])
    found = {name: torch.cat(several) for name, several in pieces.items()}
    return found | {name: torch.ones(2) for name in UNUSED.get(kind, ())}


def _place(name: str) -> int:
    return next((place for place, part in enumerate(FUSED) if f".{part}" in name), 0)


def _renamed(name: str, rules: list[tuple[str, str]]) -> str:
    for rule, new in rules:
        name = re.sub(rule, new, name)
    return name


def _swaps(kind: str, name: str, network: Any) -> bool:
    """Whether the makers have the shift before the scale, and diffusers the scale before the shift."""
    last = f"transformer_blocks.{network.config.get('num_layers', 0) - 1}.norm1_context."
    of_sd3 = kind == "SD3Transformer2DModel" and name.startswith(last)
    return kind in SWAPPED and (name.startswith("norm_out.") or of_sd3)


def _halves(tensor: Tensor) -> Tensor:
    return torch.cat(tensor.chunk(2)[::-1])


def _ldm(name: str, config: Any) -> str:
    """A U-Net of SDXL."""
    deep = config.layers_per_block + 1
    ends = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    for old, new in ends.items():
        if name.startswith(f"{old}."):
            return name.replace(old, new)
    block, _, rest = re.match(r"((?:down|up|mid)_blocks?(?:\.\d+)?)(\.)(.+)", name).groups()
    index = int(block.partition(".")[2] or 0)
    kind, number, inner = rest.split(".", 2)
    lane = {"resnets": 0, "attentions": 1}.get(kind)
    if block.startswith("mid"):
        place = f"middle_block.{2 * int(number) + lane}"
    elif kind == "downsamplers":
        return f"input_blocks.{deep * (index + 1)}.0.op.{inner.removeprefix('conv.')}"
    elif kind == "upsamplers":
        attends = config.up_block_types[index].startswith("Cross")
        return f"output_blocks.{deep * (index + 1) - 1}.{2 if attends else 1}.{inner}"
    elif block.startswith("down"):
        place = f"input_blocks.{deep * index + int(number) + 1}.{lane}"
    else:
        place = f"output_blocks.{deep * index + int(number)}.{lane}"
    return f"{place}.{_resnet(inner) if lane == 0 else inner}"


def _resnet(inner: str) -> str:
    layers = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
    layers |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
    first, _, last = inner.partition(".")
    return f"{layers[first]}.{last}"


def _clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}


def _open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    rules = [
        (r"^text_model\.encoder\.layers", "transformer.resblocks"),
        (r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
        (r"^text_model\.embeddings\.token_embedding", "token_embedding"),
        (r"^text_model\.final_layer_norm", "ln_final"),
        (r"\.layer_norm([12])", r".ln_\1"),
        (r"\.fc1\.", ".c_fc."),
        (r"\.fc2\.", ".c_proj."),
        (r"\.self_attn\.out_proj", ".attn.out_proj"),
        (r"\.self_attn\.[qkv]_proj\.", ".attn.in_proj_"),
        (r"^text_projection\.weight", "text_projection"),
    ]
    pieces: dict[str, list[Tensor]] = {}
    order = ("q_proj", "k_proj", "v_proj")
    for name in sorted(tensors, key=lambda name: next((i for i, part in enumerate(order) if part in name), 0)):
        tensor = tensors[name].T.contiguous() if name == "text_projection.weight" else tensors[name]
        pieces.setdefault(_renamed(name, rules), []).append(tensor)
    return {name: torch.cat(several) for name, several in pieces.items()}


def _autoencoder(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of four levels; decoders of the makers count theirs from the other end, and their attention is of convolutions."""
    rules = [
        (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
        (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
        *((rf"up_blocks\.{i}\.resnets", f"up.{3 - i}.block") for i in range(4)),
        *((rf"up_blocks\.{i}\.upsamplers\.0", f"up.{3 - i}.upsample") for i in range(4)),
        *((rf"mid_block\.resnets\.{i}", f"mid.block_{i + 1}") for i in range(2)),
        (r"mid_block\.attentions\.0", "mid.attn_1"),
        (r"group_norm", "norm"),
        (r"to_([qkv])\.", r"\1."),
        (r"to_out\.0", "proj_out"),
        (r"conv_shortcut", "nin_shortcut"),
        (r"conv_norm_out", "norm_out"),
    ]
    kernels = (".to_q.weight", ".to_k.weight", ".to_v.weight", ".to_out.0.weight")
    return {_renamed(name, rules): t[:, :, None, None] if name.endswith(kernels) else t for name, t in tensors.items()}


ENCODED = {"text_encoder": _clip, "text_encoder_2": _open_clip, "vae": _autoencoder}
