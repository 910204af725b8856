"""A network in one file of safetensors, as ComfyUI and Civitai have it, brought into the names of diffusers.

Every tensor is accounted for on shapes, before any weights are read: the converters of diffusers pass over what they do not know.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from apexflow.backbones.family import Backbone
from apexflow.backbones.folder import NAMES
from apexflow.backbones.parts import described_network, unread
from apexflow.backbones.sdxl_file import as_published, encoder_converter, encoders_in
from apexflow.backbones.weights import guarded
from apexflow.errors import UserError, in_a_shell

LDM = "model.diffusion_model."  # of the first single files, and of ComfyUI's of any family
PREFIXES = (LDM, "diffusion_model.", "transformer.", "unet.")
# What the names of a LoRA have, in any program's spelling, and those of no network.
OF_LORA = re.compile(r"lora|hada_|lokr_|oft_blocks|dora_scale|\.alpha$|\.diff(_b)?$")
# Beside weights that mean nothing without them: fp8 with scales, and the four bits of bitsandbytes.
SCALE = re.compile(
    r"(^|\.)(scaled_fp8|scale_weight|scale_input|weight_scale(_2)?|input_scale|comfy_quant|"
    r"absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)$"
)
# What metadata say of a model that does not predict epsilon. Others have an empty tensor of the name "v_pred".
V_PREDICTION = ("v", "v_pred", "v_prediction", "v-prediction")
EIGHT_BITS = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16} | EIGHT_BITS
UNLIKE = "give with --base the model that it was tuned from, or download the file again"

Convert = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Held:
    """A part of a model in a file. convert: brings its names, without the prefix, into those that the libraries read."""

    prefix: str
    convert: Convert
    kept: frozenset[str]  # of the converted names those that the part has: others are constants


@dataclass(frozen=True)
class SingleFile:
    """A network in a file, and of SDXL the encoders that are there too, which have been checked against the model's configs.

    beside: what the file holds beside them, which is not read.
    """

    file: Path
    parts: Mapping[str, Held]
    eight_bits: bool
    beside: tuple[str, ...]

    def write(self, part: Path) -> None:
        """Write the weights of a part into its folder, in the types that they have; eight bits are widened to bfloat16.

        The file is mapped, not read into memory: only what a converter puts together anew, or is widened, stands there.
        """
        held = self.parts[part.name]
        with safe_open(self.file, "pt") as opened:
            names = [name for name in opened.keys() if name.startswith(held.prefix)]  # noqa: SIM118 no mapping
            found = held.convert({name.removeprefix(held.prefix): opened.get_tensor(name) for name in names})
        kept = {name: _widened(tensor) for name, tensor in found.items() if name in held.kept}
        save_file(kept, part / NAMES[part.name.startswith("text_encoder")], {"format": "pt"})

    def told(self, base: str) -> str:
        """What a user should know of the model that is made of it, in a line; empty where there is nothing."""
        groups = list(dict.fromkeys(name.partition(".")[0] for name in self.beside))
        several = ", ".join(groups[:4]) + (", ..." if len(groups) > 4 else "")
        left = f"{self.file.name} also holds {several}, which are left out: all else is that of {base}."
        wide = f"{self.file.name} stores the network in eight bits: widened to bfloat16, it is no more exact than that."
        return " ".join([left] * bool(groups) + [wide] * self.eight_bits)


def holds_network(file: Path) -> bool:
    """Whether a file of safetensors holds a network and no LoRA; UserError for one that cannot be read."""
    names, _ = guarded(file, partial(_header, file))
    return bool(names) and not any(OF_LORA.search(name) for name in names)


def made_a_model(file: Path | str) -> str:
    """What can be done with the file of a network that was given as a model."""
    return (
        f"`apexflow export {in_a_shell(file)} --base MODEL -o FOLDER` makes a model of it, with all else from the MODEL that it "
        "was tuned from"
    )


def read_single_file(file: Path, backbone: Backbone, base: str, model: Path) -> SingleFile:
    """What a file holds for the network of a model, the folder `model` called `base`, of which no weights need be there.

    UserError for a damaged file, one that is stored with scales, one that predicts something else, and for a network of another
    model: the names and shapes of all tensors are compared.
    """
    held, metadata = guarded(file, partial(_header, file))
    prefix = next((one for one in PREFIXES if any(name.startswith(one) for name in held)), "")
    encoders = encoders_in(held, backbone.network_part)
    read = (prefix, *encoders.values())
    kinds = {name: kind for name, (_, kind) in held.items() if name.startswith(read)}
    _check_stored(file, kinds, held)
    said_v = "v_pred" in held or metadata.get("modelspec.prediction_type", "").lower() in V_PREDICTION
    if said_v and not backbone.flow_scheduler:
        raise UserError(f"{file} predicts v: of DDPM models, use one that predicts epsilon")
    parts = {backbone.network_part: _network(file, backbone, base, prefix, _stripped(held, prefix))}
    for part, start in encoders.items():
        network = guarded(model / part, partial(described_network, model / part, backbone.kinds[part]))
        parts[part] = _encoder(file, base, part, network, start, _stripped(held, start))
    eight = any(kind in EIGHT_BITS for kind in kinds.values())
    return SingleFile(file, parts, eight, tuple(name for name in held if not name.startswith(read)))


def _stripped(held: Mapping[str, tuple[tuple[int, ...], str]], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, without it and without their values."""
    own = {name.removeprefix(prefix): entry for name, entry in held.items() if name.startswith(prefix)}
    return {name: torch.empty(shape, dtype=DTYPES.get(kind), device="meta") for name, (shape, kind) in own.items()}


def _network(file: Path, backbone: Backbone, base: str, prefix: str, shapes: dict[str, Tensor]) -> Held:
    network = backbone.transformer
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    convert, found = _as_named(shapes, network, wanted)
    unexpected = unread(network, found.keys() - wanted.keys())
    if fault := _fault(wanted, found, unexpected):
        strange = 2 * len(wanted.keys() & found.keys()) < len(wanted) and _converter(network) is None
        only = f"; of {backbone.family} only the names of diffusers are read" * strange
        raise UserError(f"{file} does not fit the network of {base} ({backbone.family}): {fault}{only}; {UNLIKE}")
    return Held(prefix, convert, frozenset(wanted))


def _encoder(file: Path, base: str, part: str, network: Any, prefix: str, shapes: dict[str, Tensor]) -> Held:
    convert = encoder_converter(part, network)
    wanted = {as_published(part, name): tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = _converted(convert, shapes)
    unexpected = [name for name in found.keys() - wanted.keys() if not name.endswith("position_ids")]
    if fault := _fault(wanted, found, unexpected):
        raise UserError(f"{file} does not fit the {part} of {base}: {fault}; {UNLIKE}")
    return Held(prefix, convert, frozenset(wanted))


def _header(file: Path) -> tuple[dict[str, tuple[tuple[int, ...], str]], dict[str, str]]:
    """Shape and type of each tensor of a file, in the names of safetensors, and its metadata."""
    with file.open("rb"), safe_open(file, "pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 no mapping
        return {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}, opened.metadata() or {}


def _check_stored(file: Path, kinds: Mapping[str, str], names: Iterable[str]) -> None:
    """UserError for weights that are not plain numbers: the types of those that are read, the names of all."""
    use = "use the file in bf16, fp16 or plain fp8"
    if scales := [name for name in names if SCALE.search(name)]:
        raise UserError(
            f"{file} is stored in fewer bits with scales ({scales[0]}), which apexflow does not read: {use}"
        )
    if odd := [name for name, kind in kinds.items() if kind not in DTYPES and not name.endswith("position_ids")]:
        raise UserError(f"{file} stores {odd[0]} as {kinds[odd[0]]}, which is no type of plain weights: {use}")


def _as_named(shapes: dict[str, Tensor], network: Any, wanted: Mapping[str, Any]) -> tuple[Convert, dict[str, Tensor]]:
    """How a file's names become those of diffusers, and what comes of it: the better of as they are and as converted."""
    converter = _converter(network)
    if converter is None or wanted.keys() <= shapes.keys():
        return dict, shapes
    found = _converted(converter, shapes)
    better = len(wanted.keys() & found.keys()) > len(wanted.keys() & shapes.keys())
    return (converter, found) if better else (dict, shapes)


def _converted(convert: Convert, shapes: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a converter makes of a file's tensors; nothing where it cannot."""
    try:
        return convert(shapes)
    except Exception:  # of many kinds: converters expect the tensors of the family, and the published sizes
        return {}


def _converter(network: Any) -> Convert | None:
    """That of diffusers from the names that the family's makers gave; None where it has none."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    name = type(network).__name__
    table: Mapping[str, Any] = SINGLE_FILE_LOADABLE_CLASSES
    function = table.get(name, {}).get("checkpoint_mapping_fn")
    # Of Qwen-Image there are no other names, and its function does nothing.
    if function is None or name == "QwenImageTransformer2DModel":
        return None
    prefix = LDM if name == "UNet2DConditionModel" else ""  # this one asks for it, others trip over it

    def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        given = {prefix + key: tensor for key, tensor in tensors.items()}
        found = function(checkpoint=given, config=network.config)
        # Some take what they use out of what they are given, others do not; what is left unused either way is no one's.
        used = {id(tensor) for tensor in found.values()}
        return found | {key.removeprefix(prefix): value for key, value in given.items() if id(value) not in used}

    return convert


def _fault(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor], unexpected: Iterable[str]) -> str:
    """What of a file is not as a part has it, with an example of each; empty where nothing is."""
    missing, more = sorted(wanted.keys() - found.keys()), sorted(unexpected)
    wrong = [name for name in wanted.keys() & found.keys() if tuple(found[name].shape) != wanted[name]]
    told = []
    if missing:
        told.append(f"it lacks {len(missing)} of {len(wanted)} tensors, such as {missing[0]}")
    if more:
        told.append(f"it has {len(more)} that the model does not, such as {more[0]}")
    if wrong:
        name = min(wrong)
        shapes = f"{tuple(found[name].shape)} and not {wanted[name]}"
        told.append(f"{len(wrong)} have another shape, such as {name}, which is {shapes}")
    return ", ".join(told)


def _widened(tensor: Tensor) -> Tensor:
    wide = tensor.to(torch.bfloat16) if tensor.dtype in EIGHT_BITS.values() else tensor
    return wide.contiguous()
