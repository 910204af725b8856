"""`apexflow evaluate` and `apexflow convert-detector`. Heavy imports wait until a command needs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apexflow.errors import UserError, going_on, writing
from apexflow.options import (
    MOST_SEED,
    Device,
    Guidance,
    Json,
    Kappa,
    Model,
    Order,
    Rho,
    Seed,
    Size,
    Steps,
    Storage,
    show,
)

if TYPE_CHECKING:
    from apexflow.data.workers import Share
    from apexflow.evaluation.suite import EvaluationSettings, Tools

SCORE = "Scoring"
OF_DRAWING = ("model", "steps", "guidance", "size", "seed", "seeds", "kappa", "rho", "order", "storage")


def evaluate(
    ctx: typer.Context,
    suite: Annotated[
        str, typer.Option(help="mini-geneval, geneval, dpg, wise, mjhq, own, pickscore or mini-geneval-held-out")
    ] = "mini-geneval",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for pictures, rows and report; an interrupted run goes on."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only this many prompts; the report says incomplete.")
    ] = None,
    per_prompt: Annotated[int | None, typer.Option(min=1, help="Pictures a prompt. Default: the suite's own.")] = None,
    model: Model = "mini-student",
    steps: Steps = None,
    guidance: Guidance = None,
    size: Size = None,
    seed: Seed = 0,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds from --seed on, each over the whole suite.")] = 1,
    kappa: Kappa = 0.0,
    rho: Rho = 0.0,
    order: Order = 1,
    score: Annotated[bool, typer.Option("--score/--no-score", help="Or only draw, to score later.")] = True,
    images: Annotated[
        Path | None,
        typer.Option(help="Score this folder, whoever drew it; no model is loaded.", rich_help_panel=SCORE),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="The benchmark's own files (dpg, wise, mjhq), prompts (geneval, pickscore) or captioned pictures (own).",
            rich_help_panel=SCORE,
        ),
    ] = None,
    protocol: Annotated[
        str | None, typer.Option(help="Of dpg, wise, mjhq or own; see docs/evaluation.md.", rich_help_panel=SCORE)
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
            min=1, help="Side at which FID looks at pictures (mjhq, own). Default: theirs.", rich_help_panel=SCORE
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="http://host:port/v1 or a local model's folder (dpg, wise); mplug:FOLDER (dpg).", rich_help_panel=SCORE
        ),
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option(help="The model's name at that address.", rich_help_panel=SCORE)
    ] = None,
    device: Device = "auto",
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Draw a suite's pictures and score them, or score pictures that are there."""
    from apexflow.data.workers import Share
    from apexflow.devices import worker_device
    from apexflow.evaluation.suite import EvaluationSettings, Tools
    from apexflow.progress import console

    if images is not None:
        _refuse_for_images(ctx)
    if seed + seeds - 1 > MOST_SEED:
        raise UserError(
            f"--seeds {seeds} goes from --seed {seed} beyond the last one, {MOST_SEED}: give less of either"
        )
    if output is not None and images is None:
        _check_drawn_into(output)
    share = Share.from_environment()
    console.quiet = not share.leads
    place = str(worker_device(device))
    tools = Tools(data, detector, clip, inception, reference, judge, judge_model, protocol, fid_size, place)
    settings = EvaluationSettings(suite, steps, guidance, kappa, rho, order, per_prompt, seed, limit, size)
    with going_on(partial(_kept, output)), _alone_in(output, share, None if images else range(seed, seed + seeds)):
        if images is not None:
            from apexflow.evaluation.runner import score_folder

            reports = [score_folder(images, settings, output, str(images), tools)] if share.leads else []
        else:
            reports = _draw_and_score(model, storage, settings, seeds, output, tools, score, share)
    if share.leads:
        _show(reports, as_json)


@contextmanager
def _alone_in(output: Path | None, share: Share, seeds: range | None) -> Iterator[None]:
    """Within, no other command draws these seeds into a folder, or scores pictures of others there; UserError if one does."""
    folders = [output] if seeds is None else [_of_seed(output, seed) for seed in seeds]
    with ExitStack() as held:
        for folder in folders:
            if folder is not None:
                held.enter_context(share.alone_in(folder))
        yield


def _check_drawn_into(output: Path) -> None:
    """UserError for a folder that holds something else than drawn seeds: a data set, for one, would be none any more."""
    with writing(output):
        visible = [entry.name for entry in output.iterdir() if entry.name[0] != "."] if output.is_dir() else []
    if visible and not any(name.startswith("seed-") for name in visible):
        raise UserError(f"output {output} exists and holds no seed that evaluate drew: choose another folder")


def _of_seed(output: Path | None, seed: int) -> Path | None:
    return output and output / f"seed-{seed}"


def _kept(output: Path | None) -> str:
    """What a stop leaves, and how to go on."""
    if output is None:
        return "nothing is kept without a folder: name one with -o, and an interrupted run goes on"
    return f"what was drawn, answered and scored is kept in {output}: the same command goes on"


def _refuse_for_images(ctx: typer.Context) -> None:
    """UserError for an option of the drawing where nothing is drawn."""
    sources = {name: ctx.get_parameter_source(name) for name in OF_DRAWING}
    given = [f"--{name}" for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    given += [] if ctx.params["score"] else ["--no-score"]
    if given:
        raise UserError(f"{' and '.join(given)} cannot apply to --images, which draws nothing: leave it out")


def _draw_and_score(
    model: str,
    storage: str | None,
    settings: EvaluationSettings,
    seeds: int,
    output: Path | None,
    tools: Tools,
    score: bool,
    share: Share,
) -> list[dict[str, Any]]:
    from dataclasses import replace

    from apexflow.evaluation.runner import evaluate
    from apexflow.generator import load

    generator = load(model, tools.device, storage=storage)  # type: ignore[arg-type]
    reports = []
    for number in range(settings.seed, settings.seed + seeds):
        this = replace(settings, seed=number)
        reports.append(evaluate(generator, this, _of_seed(output, number), model, tools, share, score))
    return reports


def _show(reports: list[dict[str, Any]], as_json: bool) -> None:
    from apexflow.evaluation.runner import over_seeds
    from apexflow.evaluation.table import score_table

    waiting = [report for report in reports if "pending" in report]
    if not waiting:
        result = over_seeds(reports)
        show(result, as_json, score_table({result["name"]: result}))
        return
    lines = []
    for report in waiting:
        left = report["pending"]
        told = f"{left} pictures are still to be drawn" if left else "all drawn"
        lines.append(f"{report['folder']}: {told}; not scored")
    show(waiting[0], as_json, "\n".join(lines))


def convert_detector(
    checkpoint: Annotated[Path, typer.Argument(help="The official mmdet weights as a safetensors file.")],
    folder: Annotated[Path, typer.Argument(help="Where the transformers folder goes.")],
    as_json: Json = False,
) -> None:
    """Turn GenEval's official Mask2Former weights into a folder for --detector."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from apexflow.evaluation.geneval.convert import save_detector

    if checkpoint.suffix != ".safetensors":
        raise UserError(f"{checkpoint} is no safetensors file: docs/evaluation.md says how to make one of the official")
    if folder.exists():
        raise UserError(f"output {folder} exists: choose another folder")
    try:
        tensors = load_file(checkpoint)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {checkpoint} ({error}): fetch it again") from None
    save_detector(tensors, folder)
    show({"folder": str(folder)}, as_json, f"{folder}: detector converted")
