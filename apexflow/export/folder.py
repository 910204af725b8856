"""`apexflow export`: a run or a model as what stock diffusers loads, a LoRA file or a whole folder, with its scheduler."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from apexflow.backbones import (
    BUILT_IN,
    Backbone,
    Settings,
    built_in,
    load_backbone,
    read_settings,
    resolve,
    second_time,
    without_second_time,
    write_settings,
)
from apexflow.backbones.folder import (
    CHECKPOINTS,
    INDEX,
    RECIPE,
    is_run,
    model_of,
    read_index,
    write_index,
)
from apexflow.backbones.lora_targets import target_modules
from apexflow.backbones.parts import index_entry
from apexflow.backbones.single_file import SingleFile, holds_network, made_a_model, read_single_file
from apexflow.errors import UserError
from apexflow.export.copying import copy_model
from apexflow.export.factors import Factors, factor
from apexflow.export.lora import check_loadable, is_loadable, save_pairs
from apexflow.export.network import provenance, write_around
from apexflow.export.scheduler import AnyStepScheduler
from apexflow.export.stock import Scheduler, call_options, samples_as, stock_scheduler_config
from apexflow.files import new_folder
from apexflow.generator import suited_on_gpu
from apexflow.lora.added import MEND, warn_of_own
from apexflow.lora.foreign import is_foreign
from apexflow.lora.merge import FILE, check_lora, file_of, merge_into, read_lora


@dataclass(frozen=True)
class Source:
    """What is exported. `model` is a folder, called `name`; with a LoRA its base, or the run's model, which has it merged
    already."""

    name: str
    model: Path
    backbone: Backbone  # shapes only
    settings: Settings
    lora: Path | None = None
    base: str = ""  # what a user of the LoRA loads it into, and what a model was tuned from
    merged: bool = False
    network: SingleFile | None = None  # which takes the place of that of the model

    @property
    def jumps(self) -> bool:
        """Whether the model has a second time."""
        return (self.model / second_time.FILE).is_file()

    @property
    def elsewhere(self) -> Settings:
        """How it is drawn by those who know no second time."""
        return without_second_time(self.settings) if self.jumps else self.settings


def export(
    source: str,
    output: Path,
    scheduler: Scheduler | None = None,
    merge: bool = False,
    base: str | None = None,
    rank: int | None = None,
    moving: bool = False,
) -> dict[str, Any]:
    """Write `output`, whole or not at all: a LoRA file, or a diffusers folder, with a scheduler and a README.

    source: the folder of a run; a model (folder, built-in name, hub id); a LoRA file or its folder, then `base` names
    its model; or the file of a network, then `base` names the model that all else is taken from. merge: add the LoRA into
    the weights. rank: take a LoRA of that rank out of a model that was tuned whole, from `base` where it is no run.
    scheduler: "stock" (FlowMatchEuler, needs nothing of ours), "any-step" (`AnyStepScheduler`) or "original"; by default
    "stock" where the family's pipeline can run it and it samples as the model does, else "any-step" where that does; around
    a network's file the original. moving: the source is a run that is not needed any more, and its model is moved, not copied.

    Returns the output, its kind and how to call the pipeline; of a LoRA that was taken out also the shares of its `Factors`;
    and `told`, what a user should know, where there is anything. UserError for an output that `check_output` refuses, a
    source that is none of these, and a LoRA or network of another model.
    """
    check_output(output)
    found = find_source(source, base)
    _check_fits(found, source, base, merge, rank)
    backbone = found.backbone
    # Around another network the model is to be what it was: its scheduler may tell one of a family from another.
    chosen = _scheduler(backbone, found.elsewhere, scheduler or ("original" if found.network else None))
    kind = "lora" if rank is not None or (found.lora and not merge) else "model"
    factors, told = None, ""
    # What our own loader takes, read before the weights are moved; and the name of the output need not be UTF-8.
    dtype = None if found.network else suited_on_gpu(found.model, found.name, found.settings.card)
    with new_folder(output) as partial:
        if rank is not None:
            factors = _factored(found, rank, partial, base)
            told = factors.told
        elif found.network is not None:
            settings = replace(found.settings, card=provenance(found.network, found.base))
            write_around(found.network, found.model, backbone, settings, partial)
            told = found.network.told(found.base)
            dtype = suited_on_gpu(partial, found.name, found.settings.card)
        elif kind == "model":
            _whole(found, partial, moving)
        else:
            _lora(found, partial)
        _write_scheduler(partial, backbone, found.elsewhere, chosen)
        options = call_options(backbone, found.elsewhere, chosen == "stock")
        lines = [_usage(found, kind, chosen, options, output, dtype), *_cautions(found, chosen), told]
        text = "\n".join(line.rstrip("\n") + "\n" for line in lines if line)
        (partial / "README.md").write_text(text, "utf-8", "backslashreplace")  # names of folders need not be UTF-8
    shares = {"kept": factors.kept, "outside": factors.outside} if factors else {}
    result = {"output": str(output), "kind": kind, "scheduler": chosen, "call": options}
    return result | shares | ({"told": told} if told else {})


def _check_fits(found: Source, source: str, base: str | None, merge: bool, rank: int | None) -> None:
    """UserError where what was asked for cannot be had of what was found."""
    check_asked(source, found.lora is not None, _tuned_text_encoder(found.settings), merge, rank)
    if rank is None:
        if base is not None and found.lora is None and found.network is None:
            raise UserError(f"{source} is not a LoRA file, so it has no base: leave out --base")
        return
    if found.network is not None:
        raise UserError(f"{source} is one file: {made_a_model(source)}, of which --rank then extracts a LoRA")
    if not found.base:
        raise UserError(
            f"--rank extracts a LoRA from what tuning changed: give the model that {source} was tuned from with --base"
        )
    check_loadable(found.backbone)


def check_output(output: Path) -> None:
    """UserError for an output that exists, or lies among the checkpoints of a run, where it would not last."""
    if output.exists():
        raise UserError(f"output {output} exists: choose another folder with -o")
    around = [folder.parent for folder in output.resolve().parents if folder.name == CHECKPOINTS]
    if runs := [folder for folder in around if is_run(folder)]:
        raise UserError(
            f"output {output} lies among the checkpoints of the run {runs[0]}, which deletes old ones: choose a folder outside "
            "with -o"
        )


def check_asked(source: str, is_lora: bool, text_encoder: bool, merge: bool, rank: int | None) -> None:
    """UserError where there is no LoRA to merge, or none can be taken out; text_encoder: whether that was tuned too."""
    if merge and not is_lora:
        raise UserError(f"{source} has no LoRA to merge: leave out --merge")
    if rank is not None and is_lora:
        raise UserError(f"{source} is a LoRA already: leave out --rank")
    if rank is not None and text_encoder:
        raise UserError(
            f"the text encoder of {source} was tuned too, which a LoRA of its denoiser cannot hold: leave out --rank"
        )


def find_source(source: str, base: str | None) -> Source:
    """What a name given to `apexflow export` stands for; UserError if it is nothing that can be exported."""
    if not source:
        raise UserError("the source to export is empty: give the folder of a run, a model, or a LoRA file")
    path = Path(source)
    of_run = is_run(path)
    is_lora = not of_run and (path.suffix == ".safetensors" or (path / FILE).is_file())
    if base is not None and of_run:
        raise UserError(f"{source} is a run, which records its base: leave out --base")
    if of_run:
        return _run(path)
    if is_lora:
        file = file_of(path)
        if not file.is_file():
            raise UserError(f"{file} does not exist: {MEND}; or the file of a network")
        if holds_network(file):
            return _around(file, base)
        if base is None:
            raise UserError(f"{source} is a LoRA: give its base model with --base")
        model, backbone = resolve(base), load_backbone(base, "meta")
        warn_of_own(file, backbone.settings, base)
        backbone.follow(read_settings(file.parent, backbone.settings))
        return Source(str(model_of(Path(base))), model, backbone, backbone.settings, file, base)
    if path.is_dir() and not (path / INDEX).is_file():
        raise UserError(f"{source} is not a run, a model folder or a LoRA: give the output folder of a training run")
    backbone = load_backbone(source, "meta")
    return Source(source, resolve(source), backbone, backbone.settings, base=base or "")


def _around(file: Path, base: str | None) -> Source:
    """The network of a file, and all else of the model that it was tuned from."""
    if base is None:
        raise UserError(
            f"{file} holds a network alone: give the model that it was tuned from with --base, for all else that a model has"
        )
    model = resolve(base, network=False)
    backbone = load_backbone(str(model), "meta")
    if (model / second_time.FILE).is_file():
        raise UserError(f"{base} takes a second time, which the network in {file} does not: give another --base")
    network = read_single_file(file, backbone, base, model)
    settings = replace(backbone.settings, card={})  # the base's is of another model
    return Source(str(file), model, backbone, settings, base=base, network=network)


def _run(folder: Path) -> Source:
    model, file = model_of(folder), folder / "lora" / FILE
    if model == folder:
        raise UserError(
            f"the run {folder} is not finished: export one of its checkpoints ({folder / 'checkpoints' / 'step-...'}), or "
            "resume it with `apexflow train` and --resume"
        )
    try:
        recipe = json.loads((folder / RECIPE).read_text())
        kind, named = recipe["tuning"]["kind"], recipe["model"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{folder / RECIPE} is damaged ({error}): `apexflow train` with the recipe and --resume writes it again"
        ) from error
    backbone = load_backbone(str(model), "meta")
    base = named if named != "miniature" else str(folder / "base")
    lora = file if kind == "lora" else None
    return Source(str(model), model, backbone, backbone.settings, lora, base, merged=lora is not None)


def _scheduler(backbone: Backbone, settings: Settings, asked: Scheduler | None) -> Scheduler:
    if not backbone.flow_scheduler and asked in ("stock", "any-step"):
        raise UserError(
            f"the stock pipeline of {backbone.family} cannot use a flow scheduler: use --scheduler original"
        )
    if asked or not backbone.flow_scheduler:
        return asked or "original"
    return "any-step" if samples_as(settings, "any-step") and not samples_as(settings, "stock") else "stock"


def _whole(found: Source, partial: Path, moving: bool) -> None:
    """What is read of the model's folder, moved or copied, with the LoRA added where there is one that is not in it yet."""
    model, pairs = found.model, None
    if found.lora is not None and not found.merged:
        pairs = read_lora(found.lora, found.backbone)
        check_lora(found.lora, pairs, model / found.backbone.network_part)
    second_time.load(found.backbone.transformer, model)
    copy_model(model, found.backbone.kinds, partial, copy=shutil.move if moving else shutil.copy2)
    if pairs is not None:
        merge_into(partial / found.backbone.network_part, pairs)
    write_settings(partial, found.settings)


def _lora(found: Source, partial: Path) -> None:
    if found.lora is None:
        raise ValueError("no LoRA to write")
    if not is_loadable(found.backbone):
        raise UserError(f"diffusers' {found.backbone.pipeline} cannot load a LoRA: pass --merge")
    pairs = read_lora(found.lora, found.backbone)
    check_lora(found.lora, pairs, found.model / found.backbone.network_part)
    with safe_open(found.lora, "pt") as opened:
        foreign = is_foreign(opened.keys())
    if foreign:  # ComfyUI and our own readers then find what they know
        save_pairs(pairs, found.backbone, partial)
    else:
        shutil.copyfile(found.lora, partial / FILE)
    # The base's card tells of how the base was made.
    card = found.settings.card if found.merged else read_settings(found.lora.parent).card
    write_settings(partial, replace(found.elsewhere, card=card))


def _tuned_text_encoder(settings: Settings) -> bool:
    """Whether a model's card says that its text encoder was tuned too."""
    recipe = settings.card.get("recipe")
    tuning = recipe.get("tuning") if isinstance(recipe, dict) else None
    return isinstance(tuning, dict) and bool(tuning.get("text_encoder"))


def _factored(found: Source, rank: int, partial: Path, given: str | None) -> Factors:
    """A LoRA taken out of the whole model. given: the base that was asked for; a run takes none, it has its own."""
    mend = "leave out --rank for the whole model" if given is None else "give the model it was tuned from with --base"
    part = found.backbone.network_part
    factors = factor(found.model / part, resolve(found.base) / part, target_modules(found.backbone), rank, mend)
    save_pairs(factors.pairs, found.backbone, partial)
    write_settings(partial, found.elsewhere)
    return factors


def _write_scheduler(folder: Path, backbone: Backbone, settings: Settings, chosen: Scheduler) -> None:
    """`folder/scheduler`, and in a whole model its line in the index."""
    import diffusers

    if chosen == "original":
        return
    if chosen == "any-step":
        ratios = {"kappa": settings.kappa, "rho": settings.rho}
        scheduler: Any = AnyStepScheduler(shift=backbone.time_shift, times=settings.times, **ratios)
    else:
        config = stock_scheduler_config(settings, backbone.time_shift)["scheduler"]
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    shutil.rmtree(folder / "scheduler", ignore_errors=True)
    scheduler.save_pretrained(folder / "scheduler")
    if (folder / INDEX).is_file():
        write_index(folder, read_index(folder) | {"scheduler": index_entry(type(scheduler))})


def _usage(found: Source, kind: str, chosen: Scheduler, options: dict[str, Any], output: Path, dtype: object) -> str:
    """A README: the lines that draw a picture with stock diffusers."""
    loaded = found.base if kind == "lora" else str(output)
    if kind == "lora" and loaded in built_in():
        loaded = str(BUILT_IN / loaded)  # diffusers knows neither our names
    loaded = str(model_of(Path(loaded)))  # nor our runs
    lines = ["import torch, diffusers"]
    if chosen == "any-step":
        lines.append("import apexflow.export  # the scheduler's class")
    pipeline = found.backbone.pipeline
    lines.append(f'pipe = diffusers.{pipeline}.from_pretrained({loaded!r}, torch_dtype={dtype}).to("cuda")')
    if kind == "lora":
        lines.append(f"pipe.load_lora_weights({str(output)!r})")
        if chosen != "original":
            own = chosen == "any-step"
            name = "apexflow.export.AnyStepScheduler" if own else "diffusers.FlowMatchEulerDiscreteScheduler"
            lines.append(f'pipe.scheduler = {name}.from_pretrained({str(output)!r}, subfolder="scheduler")')
    call = ", ".join(f"{name}={value!r}" for name, value in options.items())
    lines.append(f'picture = pipe(prompt="a red cube", {call}).images[0]')
    code = "\n".join(lines)
    return f"# {' '.join(output.name.split())}\n\nMade by `apexflow export`. With stock diffusers:\n\n```python\n{code}\n```\n"


def _cautions(found: Source, chosen: Scheduler) -> list[str]:
    """What a README says of several steps, where they are not those of `apexflow generate`."""
    settings, cautions = found.settings, []
    if found.jumps and settings.rho == 0:
        cautions.append(
            "Use one step: the model takes a second time, which stock pipelines do not pass. They ask it for data at every step, "
            "so several steps there differ from those of `apexflow generate`."
        )
    if not samples_as(found.elsewhere, chosen):
        cautions.append(
            f"`apexflow generate` takes {settings.steps} steps with kappa {settings.kappa:g}, rho {settings.rho:g} and order "
            f"{settings.order}. The scheduler here steps in its own way, so its pictures may differ."
        )
    return cautions
