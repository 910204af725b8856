"""Reading the parts of a diffusers folder, with errors that name the part."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from apexflow.backbones.folder import INDEX, components, copy_part, read_object, refuse_pickles, write_index
from apexflow.backbones.precision import autoencoder_dtype
from apexflow.backbones.scheduler import SCHEDULER, load_scheduler
from apexflow.backbones.settings import Settings, write_settings
from apexflow.backbones.weights import guarded, weight_shapes
from apexflow.errors import UserError

# Asked of every reader of transformers: unless told, it asks on the terminal whether to run code of the checkpoint.
SAFELY: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def quiet() -> None:
    """Silence the libraries' own bars, notices and errors: what a user must know, apexflow says."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity(logging.CRITICAL)
        library.utils.logging.disable_progress_bar()


def load_part(
    folder: Path, part: str, kind: Any, device: torch.device, dtype: torch.dtype | None = None, hollow: bool = False
) -> Any:
    """`kind.from_pretrained` on one sub-folder, local files and safetensors only; UserError when it cannot be read.

    On the device "meta" a network is made from its config alone: no weights are read, and no tokenizer (dtype None). A `hollow`
    network has its buffers, no weights, and says in `weights_from` where they are.
    """
    quiet()
    path = folder / part
    if dtype is None and device.type == "meta":
        return SimpleNamespace()
    if not path.is_dir():
        raise UserError(f"{folder} is incomplete: the folder {part}/ is missing")
    if dtype is None:
        return guarded(path, lambda: kind.from_pretrained(path, **SAFELY))
    check_part(path, kind, device)
    if device.type == "meta":
        model = guarded(path, lambda: described_network(path, kind)).to(dtype)
    elif hollow:
        model = guarded(path, lambda: described_network(path, kind, buffers=True))
        model.weights_from = path
        return _cast(model, dtype).eval().requires_grad_(False)
    else:
        options = {"local_files_only": True, "use_safetensors": True, "dtype": dtype}
        model = guarded(path, lambda: _weights(path, kind, options))
    # Not to a dtype once more: in float16 the libraries keep in float32 what overflows (layers of T5).
    return model.to(device).eval().requires_grad_(False)


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """In place, all that its files hold: what a network computes for itself stays in float32, as in one that is read whole."""
    saved = model.state_dict().keys()
    own = {name: buffer for name, buffer in model.named_buffers() if name not in saved}
    model.to(dtype)
    for name, buffer in own.items():
        module, _, last = name.rpartition(".")
        model.get_submodule(module).register_buffer(last, buffer, persistent=False)
    return model


def check_part(path: Path, kind: Any, device: torch.device) -> None:
    """UserError where the config of a network says nothing, or its weights are missing, cut short or far too few for it.

    Cheap, since no weights are read: the libraries would build a network of their own default size first.
    """
    says = "model_type" if is_of_transformers(kind) else "_class_name"
    config = path / "config.json"
    if not config.is_file():
        raise UserError(f"{path.parent} is incomplete: {path.name}/config.json is missing")
    if says not in read_object(config):
        raise UserError(f"{config} does not say which network it is ({says} is missing): restore it from the original")
    if device.type == "meta":
        return
    shapes, network = weight_shapes(path), guarded(path, lambda: described_network(path, kind))
    held, described = sum(map(math.prod, shapes.values())), sum(p.numel() for p in network.parameters())
    if described > 2 * held:  # a few missing tensors are named when they are read
        raise UserError(
            f"{config} describes {described:,} parameters, but the weights beside it have {held:,}, of another network: "
            "restore both from the original checkpoint"
        )
    if beyond := [name for name in shapes if _is_beyond(network, name)]:
        raise UserError(
            f"{config} describes fewer layers than the weights beside it have, which hold {beyond[0]}: restore both from the "
            "original checkpoint"
        )


def _is_beyond(network: nn.Module, name: str) -> bool:
    """Whether a tensor is that of a layer past the end of one of the network's lists, which the libraries would pass over."""
    module = network
    for part in name.split(".")[:-1]:
        if part not in module._modules:
            return isinstance(module, nn.ModuleList | nn.Sequential) and part.isdecimal()
        module = module.get_submodule(part)
    return False


def _weights(path: Path, kind: Any, options: dict[str, Any]) -> nn.Module:
    """A network with its weights; ValueError where some are missing, which the libraries would leave random or empty."""
    model, info = kind.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    wrong = {
        "are missing": info["missing_keys"],
        "have a different shape": info["mismatched_keys"],
        "are unexpected": unread(model, info["unexpected_keys"]),
    }
    for what, found in wrong.items():
        if found:
            names = sorted(entry if isinstance(entry, str) else entry[0] for entry in found)
            raise ValueError(f"the weights are of another network: {len(names)} tensors {what}, such as {names[0]}")
    return model


def unread(network: nn.Module, unexpected: Iterable[str]) -> list[str]:
    """Of the tensors that a network has no place for, those that tell of another network.

    Not so the constants that older versions saved (a table beside the weights of a module), and what of a text encoder's
    checkpoint is another network (a language head, the eyes of a CLIP).
    """
    modules, own = dict(network.named_modules()), dict(network.named_children())

    def passed_over(name: str) -> bool:
        module, _, last = name.rpartition(".")
        beside = is_of_transformers(type(network)) and name.partition(".")[0] not in own
        return beside or (module in modules and last not in ("weight", "bias"))

    return [name for name in unexpected if not passed_over(name)]


def without_weights(kind: Any, config: Any, buffers: bool = True) -> nn.Module:
    """A network of diffusers or transformers with its parameters on the meta device; its `buffers` are real, or there too."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=not buffers):
        return kind(config) if is_of_transformers(kind) else kind.from_config(config)


def described_network(path: Path, kind: Any, buffers: bool = False) -> Any:
    """The network without weights that the config in `path` describes."""
    read = kind.config_class.from_pretrained if is_of_transformers(kind) else kind.load_config
    return without_weights(kind, read(path, local_files_only=True), buffers)


def is_of_transformers(kind: Any) -> bool:
    """Whether a class of networks is one of transformers; else it is of diffusers."""
    return hasattr(kind, "config_class")


class Later:
    """A network of a folder that is read when it is first called for, onto `device`; `config` is known before."""

    def __init__(self, folder: Path, part: str, kind: Any, device: torch.device, dtype: torch.dtype) -> None:
        """UserError where the part is missing or cannot be what its folder says; see `check_part`."""
        self.path, self.kind, self.device, self.dtype = folder / part, kind, device, dtype
        if not self.path.is_dir():
            raise UserError(f"{folder} is incomplete: the folder {part}/ is missing")
        check_part(self.path, kind, device)

    @cached_property
    def config(self) -> Any:
        return guarded(self.path, lambda: described_network(self.path, self.kind)).config

    @property
    def bytes(self) -> int:
        """What its weights take in its dtype, from the headers of its files."""
        return sum(map(math.prod, weight_shapes(self.path).values())) * self.dtype.itemsize

    def read(self) -> Any:
        return load_part(self.path.parent, self.path.name, self.kind, self.device, self.dtype)

    def save_pretrained(self, folder: Path) -> None:
        """Copy what is read of the part."""
        copy_part(self.path, folder)


def load_parts(
    folder: Path, kinds: Mapping[str, Any], device: torch.device, dtype: torch.dtype, hollow: bool
) -> dict[str, Any]:
    """The named sub-folders (tokenizers, and models with weights) and the scheduler; UserError names a missing one.

    Text encoders and the autoencoder are read when they are first called for; the denoiser's weights are left out if `hollow`.
    """
    refuse_pickles(folder, [*kinds, SCHEDULER])
    if device.type != "meta":
        check_named(folder, [*kinds, SCHEDULER])
    parts: dict[str, Any] = {}
    for name, kind in kinds.items():
        if name.startswith("tokenizer"):
            parts[name] = load_part(folder, name, kind, device)
        elif name.startswith(("text_encoder", "vae")):
            parts[name] = Later(folder, name, kind, device, autoencoder_dtype(dtype) if name == "vae" else dtype)
        else:
            parts[name] = load_part(folder, name, kind, device, dtype, hollow)
    if device.type != "meta":
        check_vocabularies(parts)
    return parts | {SCHEDULER: load_scheduler(folder)}


def check_vocabularies(parts: Mapping[str, Any]) -> None:
    """UserError where a tokenizer gives ids that its text encoder has no embedding of."""
    for name, tokenizer in parts.items():
        encoder = parts.get(name.replace("tokenizer", "text_encoder")) if name.startswith("tokenizer") else None
        if not isinstance(encoder, Later):
            continue
        config = guarded(encoder.path, partial(encoder.kind.config_class.from_pretrained, encoder.path, **SAFELY))
        known = config.get_text_config().vocab_size
        if len(tokenizer) > known:
            raise UserError(
                f"{encoder.path.parent / name} has {len(tokenizer)} words, and the text encoder beside it embeds {known}: "
                "restore both from the original checkpoint"
            )


def check_factors(part: str, config: Mapping[str, Any], names: Iterable[str]) -> None:
    """UserError for what a network's config has among `names` and is not the number, other than 0, that others multiply by."""
    for name in names:
        value = config.get(name, 1.0)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not (number and value):
            raise UserError(
                f"{part}/config.json of the model says {name} = {value!r}, not a usable factor: restore the original"
            )


def check_named(folder: Path, names: Iterable[str]) -> None:
    """UserError where the index does not name a part: stock diffusers would not load it, the hub's copy does not hold it."""
    named = components(folder)
    for name in names:
        if name not in named:
            raise UserError(f"{folder / INDEX} names no {name}, which the model needs: restore the original")


def check_whole(folder: Path, kinds: Mapping[str, Any]) -> None:
    """UserError unless all parts are there that `load_parts` reads of a folder, as its copy must have. Weights are not read."""
    from transformers import AutoTokenizer

    check_named(folder, kinds)
    for name, kind in kinds.items():
        if name.startswith("tokenizer"):
            load_part(folder, name, AutoTokenizer, torch.device("cpu"))
        elif name != SCHEDULER:  # which is read wherever a folder is
            check_part(folder / name, kind, torch.device("cpu"))


def save_folder(
    folder: Path, pipeline: str, parts: Mapping[str, Any], settings: Settings, extra: Mapping[str, Any]
) -> None:
    """Write parts, the index (with `extra` entries) and `apexflow.json`: what the stock `pipeline` loads."""
    import diffusers

    quiet()  # of a model that was built, and not loaded, nothing has been silenced yet
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__, **extra}
    for name in sorted(parts):
        parts[name].save_pretrained(folder / name)
        index[name] = index_entry(getattr(parts[name], "kind", type(parts[name])))
    write_index(folder, index)
    write_settings(folder, settings)


def index_entry(kind: type) -> list[str]:
    """How `model_index.json` names a class: by its library, or by its module if it is ours."""
    library = kind.__module__.split(".")[0]
    return [kind.__module__ if library == "apexflow" else library, kind.__name__]
