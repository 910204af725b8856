"""The command line: parses, calls the library, prints. Heavy imports wait until a command needs them."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from apexflow import __version__
from apexflow.data.command import cache, synthesize
from apexflow.drawing import generate
from apexflow.errors import (
    Stopped,
    ToldElsewhere,
    UserError,
    going_on,
    is_full_disk,
    is_out_of_memory,
    is_taken,
    no_path,
    printable,
)
from apexflow.evaluation.command import convert_detector, evaluate
from apexflow.options import (
    Device,
    Json,
    Size,
    show,
)
from apexflow.torchrun import speaks, tells
from apexflow.training.command import plan, train

STOPPED = 130  # exit code after Ctrl-C

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
data_app = typer.Typer(no_args_is_help=True, help="Create datasets.")
app.add_typer(data_app, name="data")


def _tell_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Turn a text-to-image model into a one-step generator, and measure the result."""


def export(
    source: Annotated[
        str,
        typer.Argument(help="A run, one of its checkpoints, a model, a LoRA file or a network's file (with --base)."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Output folder.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge the LoRA into the weights and write a model folder.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(help="Base model of a LoRA or a network's file or, with --rank, of a fully tuned model."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Extract a LoRA of this rank from a fully tuned model.")
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(help="stock (plain diffusers), any-step (apexflow's) or original. Default: what suits the model."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Export a model for stock diffusers: a LoRA file (for Qwen-Image and FLUX.1, ComfyUI too) or a folder, with a scheduler.

    A network in one .safetensors file (ComfyUI, Civitai) becomes a folder that every command takes, with all else from --base.
    """
    from apexflow.export import export as hand_over
    from apexflow.locking import alone_in
    from apexflow.training.recall import export_checkpoint, is_checkpoint

    if scheduler not in (None, "stock", "any-step", "original"):
        raise UserError(f"unknown scheduler {scheduler!r}: use stock, any-step or original")
    of_run = is_checkpoint(Path(source))
    if of_run and base is not None:
        raise UserError(f"{source} is a checkpoint, whose run records its base: leave out --base")
    with alone_in(output):
        if of_run:
            result = export_checkpoint(Path(source), output, scheduler, merge, rank)
        else:
            result = hand_over(source, output, scheduler, merge, base, rank)  # type: ignore[arg-type]
    told = [f"{result['kind']}: {result['output']}", result.get("told"), f"how to use it: {output / 'README.md'}"]
    show(result, as_json, "\n".join(filter(None, told)))


def data_scenes(
    folder: Annotated[Path, typer.Argument(help="Output folder for the webdataset shards.")],
    count: Annotated[int, typer.Option(min=1, help="Number of scenes.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same scenes.")] = 1,
    as_json: Json = False,
) -> None:
    """Draw scenes of circles, stars, hearts ... with GenEval-style captions."""
    from apexflow.data.scenes import scenes
    from apexflow.data.shards import write_scenes
    from apexflow.progress import counted

    if is_taken(folder):
        raise UserError(f"output {folder} exists: choose another folder")
    # Its shards are whole, and it would be taken for the set that was asked for.
    with going_on(lambda: f"{folder} may hold only some of the scenes: delete it and run the same command again"):
        written = write_scenes(counted("drawing scenes", scenes(count, seed), count), folder)
    show({"folder": str(folder), "scenes": written}, as_json, f"{folder}: {written} scenes")


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Output folder.")] = Path("runs/demo"),
    minutes: Annotated[float, typer.Option(min=0, max=1e6, help="Minutes of tuning.")] = 2.5,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier demo.")] = False,
    as_json: Json = False,
) -> None:
    """Turn the bundled teacher into a one-step generator, score it before and after, and write a report."""
    from apexflow.demo import run_demo
    from apexflow.evaluation.table import score_table

    try:
        result = run_demo(output, minutes, force)
    except (KeyboardInterrupt, Stopped):
        raise Stopped("a demo cannot be resumed; run the same command with --force to start over") from None
    if speaks():
        show(result, as_json, score_table(result["scores"]) + f"\nreport: {result['report']}")


def compare(
    methods: Annotated[
        list[str] | None, typer.Argument(help="Methods; the first one sets the wall time. Default: all.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Output folder; an interrupted comparison resumes.")
    ] = Path("runs/compare"),
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="Recipe with teacher, data, batch, tuning, and its own method's settings. Default: the miniature on scenes."
        ),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Training pictures per method.")] = 3000,
    runs: Annotated[
        int, typer.Option(min=1, help="Training runs per method, each with its own seed; more can be added later.")
    ] = 1,
    nfe: Annotated[str, typer.Option(help="Network evaluations per picture, separated by commas.")] = "1,2,4,8,20",
    rates: Annotated[str, typer.Option(help="Learning rates to try per method, separated by commas.")] = "3e-4,1e-3",
    guidance: Annotated[float, typer.Option(help="Guidance scale to train into each method that supports it.")] = 2.5,
    timed: Annotated[
        bool, typer.Option("--timed/--untimed", help="Compare at equal wall time too; needs an otherwise idle machine.")
    ] = True,
    seeds: Annotated[int, typer.Option(min=1, help="Number of evaluation seeds.")] = 3,
    per_prompt: Annotated[int, typer.Option(min=1, help="Pictures per prompt.")] = 2,
    limit: Annotated[int | None, typer.Option(min=2, help="Use only this many prompts.")] = None,
    clip: Annotated[
        Path | None, typer.Option(help="Folder of CLIP ViT-L/14, for a CLIP score where the data is not scenes.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train every method from one teacher at equal budgets, and score them on one page of tables, curves and pictures."""
    from apexflow.comparison.command import compare_command

    given: dict[str, Any] = {"images": images, "runs": runs, "guidance": guidance, "timed": timed}
    given |= {"seeds": seeds, "per_prompt": per_prompt, "limit": limit, "clip": clip}
    result, text = compare_command(tuple(methods or ()), output, recipe, nfe, rates, given)
    show(result, as_json, text)


def bench(
    cases: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL:STEPS:GUIDANCE",
            help="Models to time against the first; steps and guidance are optional. Default: mini-teacher mini-student.",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Batch size for the throughput and the training step.")] = 10,
    size: Size = None,
    train: Annotated[
        Literal["full", "lora"] | None,
        typer.Option(help="Also time a training step of the first model with this tuning: APEX against flow matching."),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Benchmark models on this machine: latency, throughput, and the cost of a training step."""
    from apexflow.bench import Case, bench_table
    from apexflow.bench import bench as measure

    read = [Case.read(case) for case in cases or ("mini-teacher", "mini-student")]
    result = measure(read, batch, size, device, train)
    show(result, as_json, bench_table(result))


for command in (generate, train, evaluate, compare, export, bench, plan, cache, synthesize, demo):
    app.command()(command)
app.command("convert-detector")(convert_detector)
data_app.command("scenes")(data_scenes)


def main() -> None:
    """Entry point: every mistake of the user is one line and exit code 2."""
    # Read when torch loads: its threads then sleep soon while they wait for one another. By default they spin, which beside
    # another busy program made a training run on two cores six times slower (docs/log.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    warnings.showwarning = _warn
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        code = app(prog_name="apexflow", standalone_mode=False)
        if code == STOPPED:  # what the parser makes of a Ctrl-C that no command heard
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except UserError as error:
        _fail("" if isinstance(error, ToldElsewhere) else str(error), 2)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except Stopped as stop:
        _fail(f"stopped: {stop}" * speaks(), STOPPED)
    except (KeyboardInterrupt, typer.Abort):
        _fail("stopped", STOPPED)
    except Exception as error:
        if (told := _told(error)) is None:
            raise
        _fail(told, 2)


def _told(error: Exception) -> str | None:
    """What a user can do about an error; None where it is a fault of apexflow's."""
    if type(error).__module__.startswith(("click", "typer")):  # usage errors of the argument parser
        return error.format_message() if hasattr(error, "format_message") else str(error)
    if is_out_of_memory(error):
        narrower = "in generate, evaluate and synthesize, or store it in fewer bits with --storage fp8 or nf4"
        return f"out of memory: generate fewer or smaller pictures at a time, or use a smaller model ({narrower})"
    if is_full_disk(error):
        return f"no space left to write ({error}): free some; files written before are intact"
    return no_path(error)


def _warn(message: Warning | str, *rest: Any, **named: Any) -> None:
    if speaks():
        print(f"apexflow: warning: {printable(str(message))}", file=sys.stderr)


def _fail(message: str, code: int) -> None:
    if message and tells():
        print(f"apexflow: error: {printable(message)}", file=sys.stderr)
    sys.exit(code)
