"""`apexflow train` and `apexflow plan`. Heavy imports wait until a command needs them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apexflow.errors import UserError, going_on, is_out_of_memory
from apexflow.options import Json, Overrides, show
from apexflow.torchrun import rank_and_world, speaks

if TYPE_CHECKING:
    from apexflow.training.config import Recipe


def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe; see recipes/.")],
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the last checkpoint in the recipe's output folder.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a model from a recipe, with checkpoints, curves, sample grids and a report."""
    from apexflow.files import read_json
    from apexflow.training.config import load_recipe
    from apexflow.training.journal import COST
    from apexflow.training.loop import train as run
    from apexflow.training.spent import spent_line

    loaded = load_recipe(recipe, overrides or [])

    def kept() -> str:
        if not Path(loaded.output).exists():
            return "nothing was written yet"
        return f"cache and checkpoints so far are kept in {loaded.output}: resume with the same command and --resume"

    try:
        with going_on(kept):
            model = run(loaded, resume)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(_no_room(loaded)) from error
    report = model.parent / "report.html"
    if speaks():
        cost = read_json(model.parent / COST, "cost of the run")
        told = f"cost: {spent_line(cost)}\nmodel: {model}\nreport: {report}"
        show({"model": str(model), "report": str(report), "cost": cost}, as_json, told)


def plan(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe; see recipes/.")],
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")] = 1,
    memory: Annotated[float, typer.Option(min=0.1, max=1e6, help="Memory of each GPU in GiB.")] = 80.0,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens in the longest prompt. Default: the model's maximum."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Estimate a recipe's memory per GPU before anything is loaded, say what to switch on if it does not fit, and list its
    data."""
    from apexflow.training.check import check_rank, check_rows, check_tokens
    from apexflow.training.config import load_recipe
    from apexflow.training.plan import GIB, advise, plan_table, settled, shapes_of
    from apexflow.training.plan import plan as count
    from apexflow.training.sources import foreseen, source_line

    limit = round(memory * GIB)
    loaded = load_recipe(recipe, overrides or [])
    check_rows(loaded)
    check_rank(loaded, shapes_of(loaded))
    check_tokens(tokens, shapes_of(loaded))
    loaded = settled(loaded, gpus, limit)
    found = count(loaded, gpus, tokens)
    advice = advise(loaded, limit, gpus, tokens)
    fits = found.peak <= limit
    data = foreseen(loaded.data)
    switched = [[change, then.to_dict()] for change, then in advice]
    result = found.to_dict() | {"fits": fits, "switch_on": switched, "data": data}
    told = map(source_line, data) if len(data) > 1 else ()
    show(result, as_json, "\n".join([plan_table(found, advice, memory), *told]))


def _no_room(recipe: Recipe) -> str:
    """What to do about a run that is out of memory, from its plan."""
    from apexflow.training.distributed import own_device
    from apexflow.training.engine import memory_of
    from apexflow.training.plan import out_of_memory, settled

    gpus = rank_and_world()[1]
    try:
        return out_of_memory(settled(recipe, gpus, memory_of(own_device(recipe.device))), gpus)
    except UserError as error:  # such as a hub id whose configs are not known here: that is not what stopped the run
        mend = "set tuning.checkpointing=true, lower micro_batch, or tune a LoRA (tuning.kind=lora)"
        return f"out of memory: {mend}; `apexflow plan` cannot say which is enough ({str(error).partition(': ')[0]})"
