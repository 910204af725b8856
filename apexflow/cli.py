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
data_app = typer.Typer(no_args_is_help=True, help="Make data sets.")
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
    """Tune a text-to-image model into one that answers in one network evaluation, and prove it."""


def export(
    source: Annotated[
        str, typer.Argument(help="A run, one of its checkpoints, a model, or a LoRA file (then with --base).")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Add the LoRA into the weights: a whole model folder.")
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="The model that a LoRA file belongs to, or with --rank a model was tuned from.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Take a LoRA of this rank out of a model that was tuned whole.")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="stock (needs nothing of ours; the default), any-step (ours) or original.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Hand a student to stock diffusers: a LoRA file (of Qwen-Image and FLUX.1 for ComfyUI too) or a folder, with a scheduler."""
    from apexflow.export import export as hand_over
    from apexflow.locking import alone_in
    from apexflow.training.recall import export_checkpoint, is_checkpoint

    if scheduler not in (None, "stock", "any-step", "original"):
        raise UserError(f"unknown scheduler {scheduler!r}: take stock, any-step or original")
    of_run = is_checkpoint(Path(source))
    if of_run and base is not None:
        raise UserError(f"{source} is a checkpoint, whose run knows its base: leave out --base")
    with alone_in(output):
        if of_run:
            result = export_checkpoint(Path(source), output, scheduler, merge, rank)
        else:
            result = hand_over(source, output, scheduler, merge, base, rank)  # type: ignore[arg-type]
    told = [f"{result['kind']}: {result['output']}", result.get("told"), f"how to use it: {output / 'README.md'}"]
    show(result, as_json, "\n".join(filter(None, told)))


def data_scenes(
    folder: Annotated[Path, typer.Argument(help="Where the webdataset shards go.")],
    count: Annotated[int, typer.Option(min=1, help="How many scenes.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same scenes.")] = 1,
    as_json: Json = False,
) -> None:
    """Draw captioned scenes: circles, stars, hearts ... with GenEval-style captions."""
    from apexflow.data.scenes import scenes
    from apexflow.data.shards import write_scenes
    from apexflow.progress import counted

    if is_taken(folder):
        raise UserError(f"output {folder} exists: choose another folder")
    # Its shards are whole, and it would be taken for the set that was asked for.
    with going_on(
        lambda: f"{folder} may hold the first of the scenes alone: delete it, and the same command draws all"
    ):
        written = write_scenes(counted("drawing scenes", scenes(count, seed), count), folder)
    show({"folder": str(folder), "scenes": written}, as_json, f"{folder}: {written} scenes")


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.")] = Path("runs/demo"),
    minutes: Annotated[float, typer.Option(min=0, max=1e6, help="How long to tune the teacher.")] = 2.5,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier demo.")] = False,
    as_json: Json = False,
) -> None:
    """Turn the shipped teacher into a one-step generator, score it before and after, and write a report."""
    from apexflow.demo import run_demo
    from apexflow.evaluation.table import score_table

    try:
        result = run_demo(output, minutes, force)
    except (KeyboardInterrupt, Stopped):
        raise Stopped("a demo does not go on; the same command with --force starts anew") from None
    if speaks():
        show(result, as_json, score_table(result["scores"]) + f"\nreport: {result['report']}")


def compare(
    methods: Annotated[
        list[str] | None, typer.Argument(help="Methods, the one that sets the wall time first. Default: every one.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the comparison; an interrupted one goes on.")
    ] = Path("runs/compare"),
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="Recipe with teacher, data, batch, tuning, and settings of its own method. Default: the miniature on scenes."
        ),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Training pictures that each method sees.")] = 3000,
    runs: Annotated[
        int, typer.Option(min=1, help="Trainings of each, with seeds of their own; a finished folder takes more.")
    ] = 1,
    nfe: Annotated[str, typer.Option(help="Network evaluations a picture, with commas.")] = "1,2,4,8,20",
    rates: Annotated[str, typer.Option(help="Learning rates that are tried for each, with commas.")] = "3e-4,1e-3",
    guidance: Annotated[float, typer.Option(help="Scale that is trained into every method that can.")] = 2.5,
    timed: Annotated[
        bool, typer.Option("--timed/--untimed", help="At equal wall time too; not on a machine with other work.")
    ] = True,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of the evaluation.")] = 3,
    per_prompt: Annotated[int, typer.Option(min=1, help="Pictures a prompt.")] = 2,
    limit: Annotated[int | None, typer.Option(min=2, help="Only this many prompts.")] = None,
    clip: Annotated[
        Path | None, typer.Option(help="Folder of CLIP ViT-L/14: the CLIP score too, where the data are no scenes.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train every method from one teacher at equal budgets, and score them side by side: tables, curves, pictures, one page."""
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
            help="What is timed against the first; steps and guidance may be left out. Default: mini-teacher mini-student.",
        ),
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, help="Pictures at once for the throughput, and rows of a training step.")
    ] = 10,
    size: Size = None,
    train: Annotated[
        Literal["full", "lora"] | None,
        typer.Option(help="Time a training step of the first model too, by this tuning: APEX against flow matching."),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Time models on this machine: seconds for one picture, pictures a second, and what a training step costs."""
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
        narrower = "generate, evaluate, synthesize: or keep its network in fewer bits with --storage fp8 or nf4"
        return f"out of memory: ask for fewer or smaller pictures at a time, or take a smaller model ({narrower})"
    if is_full_disk(error):
        return f"no room to write ({error}): free some space; what was written before is whole"
    return no_path(error)


def _warn(message: Warning | str, *rest: Any, **named: Any) -> None:
    if speaks():
        print(f"apexflow: warning: {printable(str(message))}", file=sys.stderr)


def _fail(message: str, code: int) -> None:
    if message and tells():
        print(f"apexflow: error: {printable(message)}", file=sys.stderr)
    sys.exit(code)
