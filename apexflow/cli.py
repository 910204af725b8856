"""The command line: parses, calls the library, prints. Heavy imports wait until a command needs them."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from apexflow.data.command import cache, synthesize
from apexflow.errors import Stopped, ToldElsewhere, UserError, is_taken, writing
from apexflow.evaluation.command import convert_detector, evaluate

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Tune a text-to-image model into one that answers in one network evaluation, and prove it.",
)
data_app = typer.Typer(no_args_is_help=True, help="Make or look at data sets.")
app.add_typer(data_app, name="data")
for command in (cache, synthesize, evaluate):
    app.command()(command)
app.command("convert-detector")(convert_detector)

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Model = Annotated[str, typer.Option(help="mini-student, mini-teacher, a diffusers folder, or a hub id (owner/name).")]
Steps = Annotated[int | None, typer.Option(help="Network evaluations a picture. Default: what the model was made for.")]
Guidance = Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 is none. Default: the model's own.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(help='What to draw: "a photo of a red star left of a blue ring".')],
    model: Model = "mini-student",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="PNG to write; several pictures become one grid.")
    ] = Path("out.png"),
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Annotated[int, typer.Option(help="Same seed, same picture.")] = 0,
    size: Annotated[int | None, typer.Option(min=1, help="Side in pixels. Default: the model's own.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Pictures of each prompt.")] = 1,
    kappa: Annotated[float, typer.Option(help="Extrapolation ratio of the any-step sampler (Eq. 21).")] = 0.0,
    rho: Annotated[float, typer.Option(help="Share of fresh noise at each step, 0 to 1.")] = 0.0,
    order: Annotated[int, typer.Option(help="1, or 2 for Heun's correction.")] = 1,
    device: Device = "auto",
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing picture.")] = False,
    as_json: Json = False,
) -> None:
    """Draw pictures from prompts."""
    import time

    from apexflow.data.captioned import PICTURES
    from apexflow.generator import load, picture_grid

    if output.suffix.lower() not in PICTURES:
        raise UserError(f"cannot write a picture as {output.name!r}: end the name with .png")
    if output.exists() and not force:
        raise UserError(f"{output} exists: pass --force to overwrite it, or choose another with -o")
    with writing(output.parent):
        output.parent.mkdir(parents=True, exist_ok=True)
    generator = load(model, device)
    repeated = [prompt for prompt in prompts for _ in range(count)]
    began = time.perf_counter()
    pictures = generator.generate(repeated, steps, seed, size, guidance, kappa, rho, order)
    seconds = time.perf_counter() - began
    columns = min(len(pictures), 8) if count == 1 else count
    _save_picture(picture_grid(pictures, columns) if len(pictures) > 1 else pictures[0], output)
    result = {
        "output": str(output),
        "pictures": len(pictures),
        "evaluations": generator.evaluations,
        "seconds": round(seconds, 4),
    }
    _show(
        result,
        as_json,
        f"{output}: {len(pictures)} picture(s), {generator.evaluations} evaluation(s) each, {seconds:.2f} s",
    )


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe; see recipes/.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="For example steps=100 optimizer.learning_rate=1e-4."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint of the recipe's output.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train what a recipe describes: checkpoints, curves, sample grids, a saved model and a report."""
    from apexflow.training.config import load_recipe
    from apexflow.training.loop import train as run

    loaded = load_recipe(recipe, overrides or [])
    try:
        model = run(loaded, resume)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        raise UserError(_no_room(loaded)) from error
    report = model.parent / "report.html"
    _show({"model": str(model), "report": str(report)}, as_json, f"model: {model}\nreport: {report}")


@app.command("export")
def export_command(
    source: Annotated[str, typer.Argument(help="The folder of a run, a model, or a LoRA file (then with --base).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Add the LoRA into the weights: a whole model folder.")
    ] = False,
    base: Annotated[str | None, typer.Option(help="The model that a LoRA file belongs to.")] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="stock (needs nothing of ours), any-step (ours), or original.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Hand a student to stock diffusers and ComfyUI: a LoRA file or a model folder, with a scheduler."""
    from apexflow.export import export

    if scheduler not in (None, "stock", "any-step", "original"):
        raise UserError(f"unknown scheduler {scheduler!r}: take stock, any-step or original")
    result = export(source, output, scheduler, merge, base)  # type: ignore[arg-type]
    _show(result, as_json, f"{result['kind']}: {result['output']}\nhow to use it: {output / 'README.md'}")


@app.command("plan")
def plan_command(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe; see recipes/.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="As for train.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Over how many GPUs.")] = 1,
    memory: Annotated[float, typer.Option(min=0.1, help="GiB of one GPU.")] = 80.0,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Text tokens of the longest prompt. Default: the most that the model reads."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a recipe needs on each GPU before anything is loaded, and what to switch on where it does not fit."""
    from apexflow.training.config import load_recipe
    from apexflow.training.plan import GIB, advise, plan, plan_table

    loaded = load_recipe(recipe, overrides or [])
    found = plan(loaded, gpus, tokens)
    advice = advise(loaded, round(memory * GIB), gpus, tokens)
    fits = found.peak <= memory * GIB
    result = found.to_dict() | {"fits": fits, "switch_on": [[change, then.to_dict()] for change, then in advice]}
    _show(result, as_json, plan_table(found, advice, memory))


@data_app.command("scenes")
def data_scenes(
    folder: Annotated[Path, typer.Argument(help="Where the webdataset shards go.")],
    count: Annotated[int, typer.Option(min=1, help="How many scenes.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same scenes.")] = 1,
    as_json: Json = False,
) -> None:
    """Draw captioned scenes: circles, stars, hearts ... with GenEval-style captions."""
    from apexflow.data.scenes import scenes
    from apexflow.data.shards import write_scenes

    if is_taken(folder):
        raise UserError(f"output {folder} exists: choose another folder")
    written = write_scenes(scenes(count, seed), folder)
    _show({"folder": str(folder), "scenes": written}, as_json, f"{folder}: {written} scenes")


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.")] = Path("runs/demo"),
    minutes: Annotated[float, typer.Option(min=0, help="How long to tune the teacher.")] = 2.5,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier demo.")] = False,
    as_json: Json = False,
) -> None:
    """Turn the shipped teacher into a one-step generator, score it before and after, and write a report."""
    from apexflow.demo import run_demo
    from apexflow.evaluation.table import score_table

    result = run_demo(output, minutes, force)
    _show(result, as_json, score_table(result["scores"]) + f"\nreport: {result['report']}")


def _no_room(recipe: Any) -> str:
    """What to do about a run that is out of memory, from its plan."""
    from apexflow.training.plan import out_of_memory

    return out_of_memory(recipe, int(os.environ.get("WORLD_SIZE", "1")))


@app.command()
def compare(
    methods: Annotated[
        list[str] | None, typer.Argument(help="Methods, the one that sets the wall time first. Default: every one.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the comparison; an interrupted one goes on.")
    ] = Path("runs/compare"),
    recipe: Annotated[
        Path | None, typer.Option(help="Recipe with teacher, data, batch and tuning. Default: the miniature on scenes.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Training pictures that each method sees.")] = 6400,
    nfe: Annotated[str, typer.Option(help="Network evaluations a picture, with commas.")] = "1,2,4,8,20",
    rates: Annotated[str, typer.Option(help="Learning rates that are tried for each, with commas.")] = "1e-4,3e-4,1e-3",
    guidance: Annotated[float, typer.Option(help="Scale that is trained into every method that can.")] = 2.5,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of the evaluation.")] = 3,
    per_prompt: Annotated[int, typer.Option(min=1, help="Pictures a prompt.")] = 2,
    limit: Annotated[int | None, typer.Option(min=2, help="Only this many prompts.")] = None,
    as_json: Json = False,
) -> None:
    """Train every method from one teacher at equal budgets, and score them side by side: tables, curves, pictures, one page."""
    from apexflow.comparison.command import compare_command

    given = {"images": images, "seeds": seeds, "per_prompt": per_prompt, "limit": limit, "guidance": guidance}
    result, text = compare_command(tuple(methods or ()), output, recipe, nfe, rates, given)
    _show(result, as_json, text)


def _show(result: dict[str, Any], as_json: bool, text: str) -> None:
    if _speaks():
        typer.echo(json.dumps(result) if as_json else text)


def _speaks() -> bool:
    """Whether this is the process that talks to the user: of those that torchrun started, the first."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def _save_picture(picture: Any, path: Path) -> None:
    """Whole or not at all: a full disk leaves a picture that was there before as it is."""
    partial = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        with writing(path):
            picture.save(partial)
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def main() -> None:
    """Entry point: every mistake of the user is one line and exit code 2."""
    warnings.showwarning = _warn
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)  # the parser turns an unhandled Ctrl-C into a code
    except UserError as error:
        _fail("" if isinstance(error, ToldElsewhere) else str(error), 2)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except Stopped as stop:
        _fail(f"stopped: {stop}" * _speaks(), 130)
    except (KeyboardInterrupt, typer.Abort):
        _fail("stopped", 130)
    except MemoryError:
        _fail("out of memory: use a smaller batch or micro_batch", 2)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):  # usage errors of the argument parser
            _fail(error.format_message() if hasattr(error, "format_message") else str(error), 2)
        if type(error).__name__ == "OutOfMemoryError":
            _fail("out of GPU memory: lower micro_batch, or tune a LoRA (tuning.kind=lora)", 2)
        raise


def _warn(message: Warning | str, *rest: Any, **named: Any) -> None:
    if _speaks():
        print(f"apexflow: warning: {message}", file=sys.stderr)


def _fail(message: str, code: int) -> None:
    if message:
        print(f"apexflow: error: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
