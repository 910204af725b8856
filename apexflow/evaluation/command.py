"""`apexflow evaluate` and `apexflow convert-detector`. Heavy imports wait until a command needs them."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apexflow.errors import UserError, going_on, writing
from apexflow.options import (
    MOST_SEED,
    MOST_SIDE,
    Device,
    Guidance,
    Json,
    Kappa,
    Lora,
    Model,
    Order,
    Rho,
    Seed,
    Size,
    Storage,
    read_numbers,
    show,
)

if TYPE_CHECKING:
    from apexflow.backbones import Backbone
    from apexflow.data.workers import Share
    from apexflow.evaluation.suite import EvaluationSettings, Tools

SCORE = "Scoring"
FAR = 2  # times the side of a scene: a model of larger pictures was not made for them
OF_DRAWING = ("model", "lora", "steps", "guidance", "size", "seed", "seeds", "kappa", "rho", "order", "storage")


def evaluate(
    ctx: typer.Context,
    suite: Annotated[
        str, typer.Option(help="mini-geneval, geneval, dpg, wise, mjhq, own, pickscore or mini-geneval-held-out")
    ] = "mini-geneval",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for pictures, rows and report; an interrupted run resumes."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only this many prompts; the report says incomplete.")
    ] = None,
    per_prompt: Annotated[
        int | None, typer.Option(min=1, help="Pictures per prompt. Default: the suite's own.")
    ] = None,
    model: Model = "mini-student",
    lora: Lora = None,
    steps: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Sampling steps; several, such as 1,2,4,8, are scored side by side. Default: the model's own.",
        ),
    ] = None,
    guidance: Guidance = None,
    size: Size = None,
    seed: Seed = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, from --seed on, each over the whole suite.")] = 1,
    kappa: Kappa = None,
    rho: Rho = None,
    order: Order = None,
    score: Annotated[bool, typer.Option("--score/--no-score", help="Or only generate, to score later.")] = True,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Score the pictures in this folder, whatever made them; no model is loaded.", rich_help_panel=SCORE
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="The benchmark's own files (dpg, wise, mjhq), prompts (geneval, pickscore) or captioned pictures (own).",
            rich_help_panel=SCORE,
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(help="Scoring protocol (dpg, wise, mjhq, own); see docs/evaluation.md.", rich_help_panel=SCORE),
    ] = None,
    detector: Annotated[Path | None, typer.Option(help="Mask2Former folder (geneval).", rich_help_panel=SCORE)] = None,
    clip: Annotated[
        Path | None,
        typer.Option(help="Folder of CLIP ViT-L/14 (geneval, mjhq, own) or PickScore.", rich_help_panel=SCORE),
    ] = None,
    inception: Annotated[
        Path | None, typer.Option(help="FID Inception weights, safetensors (mjhq, own).", rich_help_panel=SCORE)
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Reference statistics or pictures (mjhq, own).", rich_help_panel=SCORE)
    ] = None,
    fid_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_SIDE,
            help="Side to resize pictures to for FID (mjhq, own). Default: their own.",
            rich_help_panel=SCORE,
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="http://host:port/v1 or a local model's folder (dpg, wise); mplug:FOLDER (dpg).", rich_help_panel=SCORE
        ),
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option(help="Model name at the judge's address.", rich_help_panel=SCORE)
    ] = None,
    device: Device = "auto",
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Generate a suite's pictures and score them, or score existing pictures."""
    from apexflow.data.workers import own_share
    from apexflow.devices import worker_device
    from apexflow.evaluation.suite import EvaluationSettings, Tools

    if images is not None:
        _refuse_for_images(ctx)
    if seed + seeds - 1 > MOST_SEED:
        raise UserError(f"--seeds {seeds} from --seed {seed} goes past the largest seed, {MOST_SEED}: lower either")
    homes = _homes(output, read_numbers(steps, "--steps", int) if steps is not None else [None])
    if output is not None and images is None:
        _check_drawn_into(output, homes.values())
    share = own_share()
    place = str(worker_device(device))
    tools = Tools(data, detector, clip, inception, reference, judge, judge_model, protocol, fid_size, place)
    # Not a check of the suite, which also draws for a comparison, and that takes a distance of its own.
    if suite == "own" and score and inception is None and clip is None and (images or per_prompt in (None, 1)):
        raise UserError("nothing would be scored: give --inception, --clip or both, or --per-prompt 2")
    settings = EvaluationSettings(suite, None, guidance, kappa, rho, order, per_prompt, seed, limit, size)
    planned = _planned(settings, homes, seeds)
    folders = [output] if images else [folder for _, folder in planned]
    with going_on(partial(_kept, output)), _alone_in(folders, share):
        if images is not None:
            from apexflow.evaluation.runner import score_folder

            reports = [score_folder(images, settings, output, str(images), tools)] if share.leads else []
        else:
            named = _is_given(ctx, "suite")
            reports = _draw_and_score(model, lora, storage, planned, tools, score, share, named)
    if share.leads:
        _show(reports, seeds, as_json)


def _homes(output: Path | None, numbers: Sequence[int | None]) -> dict[int | None, Path | None]:
    """By the number of steps, where its seeds lie: in the folder itself, or of several numbers each in one of its own."""
    return {steps: output and (output if len(numbers) == 1 else output / f"steps-{steps}") for steps in numbers}


def _planned(
    settings: EvaluationSettings, homes: Mapping[int | None, Path | None], seeds: int
) -> list[tuple[EvaluationSettings, Path | None]]:
    """What is drawn with each number of steps and each seed, and the folder of it."""
    return [
        (replace(settings, steps=steps, seed=seed), home and home / f"seed-{seed}")
        for steps, home in homes.items()
        for seed in range(settings.seed, settings.seed + seeds)
    ]


@contextmanager
def _alone_in(folders: Sequence[Path | None], share: Share) -> Iterator[None]:
    """Within, no other command draws into these folders, or scores pictures of others there; UserError if one does."""
    with ExitStack() as held:
        for folder in folders:
            if folder is not None:
                held.enter_context(share.alone_in(folder))
        yield


def _check_drawn_into(output: Path, homes: Collection[Path | None]) -> None:
    """UserError for a folder that holds something else than what was drawn: a data set, for one, would be none any more."""
    for folder in filter(None, (output, *homes)):
        kind = "seed" if folder in homes else "steps"
        with writing(folder):
            visible = [entry.name for entry in folder.iterdir() if entry.name[0] != "."] if folder.is_dir() else []
        if visible and not any(name.startswith(f"{kind}-") for name in visible):
            raise UserError(f"output {folder} exists and holds no {kind}-* folder of evaluate: choose another folder")


def _kept(output: Path | None) -> str:
    """What a stop leaves, and how to go on."""
    if output is None:
        return "nothing is kept without an output folder: give -o FOLDER, and an interrupted run resumes"
    return f"pictures, answers and scores so far are kept in {output}: run the same command to resume"


def _is_given(ctx: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _refuse_for_images(ctx: typer.Context) -> None:
    """UserError for an option of the drawing where nothing is drawn."""
    given = [f"--{name}" for name in OF_DRAWING if _is_given(ctx, name)]
    given += [] if ctx.params["score"] else ["--no-score"]
    if given:
        raise UserError(f"{' and '.join(given)} cannot be used with --images, which generates nothing: leave it out")


def _draw_and_score(
    model: str,
    lora: list[str] | None,
    storage: str | None,
    planned: Sequence[tuple[EvaluationSettings, Path | None]],
    tools: Tools,
    score: bool,
    share: Share,
    suite_named: bool,
) -> list[dict[str, Any]]:
    from apexflow.evaluation.runner import evaluate
    from apexflow.generator import load

    generator = load(model, tools.device, storage=storage, lora=lora)  # type: ignore[arg-type]
    if not suite_named:
        _warn_of_scenes(model, generator.backbone)
    name = " + ".join([model, *(lora or ())])
    for settings, _ in planned:
        generator.times(settings.steps)  # what cannot be is told before the first of several is drawn
    return [evaluate(generator, this, folder, name, tools, share, score) for this, folder in planned]


def _warn_of_scenes(model: str, backbone: Backbone) -> None:
    """Warn of the suite that is taken unless another is named, where its score would mean nothing after long drawing."""
    from apexflow.data.scenes import SIZE

    if backbone.default_size > FAR * SIZE:
        told = (
            f"mini-geneval knows only the miniature's scenes, and {model} generates at {backbone.default_size} pixels"
        )
        warnings.warn(f"{told}: for a meaningful score choose a suite, such as --suite geneval", stacklevel=2)


def _show(reports: list[dict[str, Any]], seeds: int, as_json: bool) -> None:
    """One result of all seeds; where there are several, by the number of steps, a table and a list of them."""
    from apexflow.data.shards import groups
    from apexflow.evaluation.runner import over_seeds
    from apexflow.evaluation.table import score_table

    waiting = [report for report in reports if "pending" in report]
    by_steps = list(groups(reports, seeds))
    if not waiting:
        results = [over_seeds(group) for group in by_steps]
        names = [result["name"] + f", steps {result.get('steps')}" * (len(results) > 1) for result in results]
        found = {"results": results} if len(results) > 1 else results[0]  # what a command prints is one object
        show(found, as_json, score_table(dict(zip(names, results, strict=True))))
        return
    lines = []
    for report in waiting:
        left = report["pending"]
        told = f"{left} pictures left to generate" if left else "all generated"
        lines.append(f"{report['folder']}: {told}; not scored")
    show({"results": waiting} if len(by_steps) > 1 else waiting[0], as_json, "\n".join(lines))


def convert_detector(
    checkpoint: Annotated[Path, typer.Argument(help="The official mmdet weights as a safetensors file.")],
    folder: Annotated[Path, typer.Argument(help="Output folder, in the transformers layout.")],
    as_json: Json = False,
) -> None:
    """Convert GenEval's official Mask2Former weights into a folder for --detector."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from apexflow.evaluation.geneval.convert import save_detector

    if checkpoint.suffix != ".safetensors":
        raise UserError(
            f"{checkpoint} is not a safetensors file: docs/evaluation.md says how to convert the official one"
        )
    if folder.exists():
        raise UserError(f"output {folder} exists: choose another folder")
    try:
        tensors = load_file(checkpoint)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {checkpoint} ({error}): download it again") from None
    save_detector(tensors, folder)
    show({"folder": str(folder)}, as_json, f"{folder}: detector converted")
