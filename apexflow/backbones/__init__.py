"""Backbones: one file a family, which hides sign, time scale, packing, masks and guidance inputs behind a contract."""

from __future__ import annotations

from pathlib import Path

import torch

from apexflow.backbones import hub, second_time
from apexflow.backbones.family import Backbone
from apexflow.backbones.folder import CHECKPOINTS, INDEX, PICKLES, is_run, model_of, read_index, with_lora
from apexflow.backbones.settings import Settings, read_settings, without_second_time, write_settings
from apexflow.backbones.single_file import holds_network, made_a_model
from apexflow.errors import UserError, check_built_in, in_a_shell

__all__ = [
    "BUILT_IN",
    "Backbone",
    "Settings",
    "backbones",
    "built_in",
    "check_shift",
    "load_backbone",
    "read_settings",
    "resolve",
    "without_second_time",
    "write_settings",
]


def backbones() -> dict[str, type[Backbone]]:
    """The table of families by the pipeline class that `model_index.json` names: one line each."""
    from apexflow.backbones.flux import Flux
    from apexflow.backbones.flux2 import Flux2Klein
    from apexflow.backbones.lumina2 import Lumina2
    from apexflow.backbones.pixart import PixArt
    from apexflow.backbones.qwen_image import QwenImage
    from apexflow.backbones.sana import Sana
    from apexflow.backbones.sana_sprint import SanaSprint
    from apexflow.backbones.sd3 import StableDiffusion3
    from apexflow.backbones.sdxl import StableDiffusionXL
    from apexflow.backbones.z_image import ZImage

    return {
        "SanaPipeline": Sana,
        "SanaSprintPipeline": SanaSprint,
        "QwenImagePipeline": QwenImage,
        "StableDiffusion3Pipeline": StableDiffusion3,
        "FluxPipeline": Flux,
        "Flux2KleinPipeline": Flux2Klein,
        "ZImagePipeline": ZImage,
        "Lumina2Pipeline": Lumina2,
        "StableDiffusionXLPipeline": StableDiffusionXL,
        "PixArtAlphaPipeline": PixArt,
        "PixArtSigmaPipeline": PixArt,
    }


def check_shift(backbone: Backbone, a: float, b: float) -> None:
    """UserError for a shift (Eq. 16) that this model cannot see: a > 0 with b = 0 where it normalises the text."""
    if backbone.normalizes_text and a > 0 and b == 0:
        best = backbone.shift_defaults
        raise UserError(
            f"the shift a={a}, b=0 gives no contrast: {backbone.family} normalises the text, so F(a c) = F(c) for "
            f"a > 0; use a < 0 or b other than 0, such as a={best[0]}, b={best[1]}"
        )


BUILT_IN = Path(__file__).parent.parent / "assets"


def built_in() -> list[str]:
    """The names of the models that ship."""
    return sorted(path.parent.name for path in BUILT_IN.glob(f"*/{INDEX}"))


def resolve(path_or_id: str, network: bool = True) -> Path:
    """The folder of a model: a built-in name ("mini-teacher", "mini-student"), a local folder, that of a finished run, or a
    hub id.

    The network is touched only for a hub id, that is a name of the form owner/name which is no local path. UserError for
    what is none of these, or both the first and the second. Without `network` a hub id is fetched without the weights of that.
    """
    if not path_or_id:
        raise UserError("the model name is empty: give a diffusers folder, a hub id or a built-in name")
    if path_or_id in built_in():
        check_built_in(path_or_id, "the model that ships with apexflow")
        return BUILT_IN / path_or_id
    folder = Path(path_or_id)
    if folder.exists():
        return model_of(folder)
    if path_or_id.count("/") == 1 and not path_or_id.startswith((".", "/", "~")):
        return hub.download(path_or_id, network)
    names = ", ".join(built_in())
    raise UserError(
        f"model {path_or_id!r} not found: give a diffusers folder, a hub id (owner/name) or one of: {names}"
    )


def _no_model(folder: Path) -> str:
    """What a folder without an index is, and how to get a model of it: all of these are left by our own commands."""
    if (folder / "model" / INDEX).is_file():
        return f"{folder} is not a model but holds one: use {folder / 'model'}"
    what = "an unfinished run" if is_run(folder) else "not a model"
    saved = folder if (folder / "state.json").is_file() else max((folder / CHECKPOINTS).glob("step-*"), default=None)
    if saved is not None:
        command = f"apexflow export {in_a_shell(saved)} -o MODEL"
        return f"{folder} is {what}: make one from its checkpoint with `{command}` (for a LoRA add --merge)"
    if is_run(folder):
        return f"{folder} is {what} without a checkpoint: resume it with `apexflow train` and --resume"
    if loras := sorted(folder.glob("*lora*.safetensors")):
        return f"{folder} is a LoRA, not a full model: {with_lora(loras[0])}"
    return f"{folder} is not a diffusers checkpoint: {INDEX} is missing"


def _no_folder(file: Path) -> str:
    """What a file is that was given as a model, and how to get a model of it."""
    if file.name == INDEX:
        return f"{file} is the index of a diffusers checkpoint: give the folder that it is in"
    if file.suffix == ".safetensors" and holds_network(file):
        return f"{file} holds a network alone: {made_a_model(file)}"
    pickled = file.suffix in PICKLES
    what = "a pickle, which can run code: convert it to safetensors first" if pickled else "a file"
    loose = file.with_suffix(".safetensors")
    network = "" if loose == file else f"; if it is a network, {made_a_model(loose)}"
    return f"{file} is {what}; give the folder of a diffusers checkpoint; if it is a LoRA, {with_lora(loose)}{network}"


def load_backbone(
    path_or_id: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, hollow: bool = False
) -> Backbone:
    """Load a model folder by the family that its `model_index.json` names. Never unpickles, never runs its code.

    With `hollow` the transformer's weights are left on disk, for processes that each read a share of them.
    """
    folder = resolve(path_or_id)
    if folder.is_file():
        raise UserError(_no_folder(folder))
    if not (folder / INDEX).is_file():
        raise UserError(_no_model(folder))
    pipeline = read_index(folder).get("_class_name")
    if not isinstance(pipeline, str):
        raise UserError(f"{folder / INDEX} names no pipeline (_class_name): restore it from the original checkpoint")
    table = backbones()
    if pipeline not in table:
        raise UserError(f"{folder} is a {pipeline}, which is not supported: use one of {', '.join(table)}")
    backbone = table[pipeline].load(folder, torch.device(device), dtype, hollow)
    if torch.device(device).type != "meta":
        second_time.load(backbone.transformer, folder)
    return backbone
