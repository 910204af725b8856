"""`apexflow cache` and `apexflow synthesize`. Heavy imports wait until a command needs them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from apexflow.errors import UserError, going_on, in_a_shell, printable
from apexflow.options import (
    Device,
    Guidance,
    Json,
    Kappa,
    Lora,
    Model,
    Order,
    Rho,
    Seed,
    Sides,
    Size,
    Steps,
    Storage,
    read_sides,
    show,
)
from apexflow.torchrun import speaks

SkipLimit = Annotated[
    float,
    typer.Option(min=0, max=1, help="Largest share of unusable records (or pictures) to skip; more is an error."),
]


def cache(
    source: Annotated[
        str,
        typer.Argument(
            help="Captioned pictures in any known format (docs/data.md), hf://datasets/OWNER/NAME, or prompts.",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Cache folder; an interrupted cache resumes.")
    ] = None,
    model: Model = "mini-teacher",
    size: Size = None,
    buckets: Annotated[
        bool, typer.Option("--buckets", help="Keep aspect ratios (1:2 to 2:1). Default: crop to the center square.")
    ] = False,
    caption: Annotated[
        list[str] | None,
        typer.Option(help="Field or column with captions; repeat it to pick one of several per picture."),
    ] = None,
    skip_limit: SkipLimit = 0.05,
    verify: Annotated[bool, typer.Option("--verify", help="Verify the checksums of SOURCE, a finished cache.")] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Encode captioned pictures into latents and text embeddings once; train on them with data.source=FOLDER.

    Under torchrun the processes share the work.
    """
    from apexflow.data.cache import verify as check
    from apexflow.data.caching import WINDOW, CacheSettings
    from apexflow.data.hub import located
    from apexflow.data.jobs import cache_command

    if verify:
        whole = check(Path(source))
        if speaks():
            show(whole, as_json, f"{source}: intact, {whole['rows']} rows in {whole['shards']} shards")
        return
    if output is None:
        raise UserError("the cache folder is missing: give it with -o FOLDER")
    settings = CacheSettings(size, buckets, captions=tuple(caption or ()), skip_limit=skip_limit)
    with going_on(partial(_kept, output, "shard-*.json", f"{WINDOW} records")):
        result = cache_command(located(source), output, model, settings, device)
    if result is not None:
        show(result, as_json, _cache_text(result))


def synthesize(
    prompts: Annotated[
        str,
        typer.Argument(help="A .txt or .jsonl file of prompts, or a dataset whose captions to use."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the webdataset shards; an interrupted command resumes.")
    ],
    model: Model = "mini-teacher",
    lora: Lora = None,
    steps: Steps = None,
    guidance: Guidance = None,
    kappa: Kappa = None,
    rho: Rho = None,
    order: Order = None,
    seed: Seed = 0,
    size: Sides = None,
    caption: Annotated[
        list[str] | None,
        typer.Option(help="Field or column with prompts; repeat it to pick one of several per picture."),
    ] = None,
    skip_limit: SkipLimit = 0.05,
    device: Device = "auto",
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Generate a captioned dataset with a model, as the paper does with its teacher; then cache it or train on it.

    Under torchrun the processes share the work.
    """
    from apexflow.data.hub import located
    from apexflow.data.jobs import synthesize_command
    from apexflow.data.synthesize import SHARD, Synthesis

    settings = Synthesis(steps, guidance, kappa, rho, order, seed, read_sides(size), tuple(caption or ()), skip_limit)
    with going_on(partial(_kept, output, "*.tar", f"{SHARD} pictures")):
        result = synthesize_command(located(prompts), output, model, settings, device, storage, lora)
    if result is None:
        return
    more = "" if result["complete"] else "; this process is done, others are not yet"
    text = f"{output}: {result['pictures']} pictures, skipped {len(result['skipped'])}{more}"
    show(result, as_json, f"{text}{listed(result['skipped'])}\ntrain on it with data.source={in_a_shell(output)}")


def _kept(folder: Path, shards: str, size: str) -> str:
    """What a stop leaves, and how to go on."""
    return (
        f"finished shards of {size} kept in {folder}: {len(list(folder.glob(shards)))}; run the same command to resume"
    )


def _cache_text(result: dict[str, Any]) -> str:
    if not result["complete"]:
        return f"{result['cache']}: this process is done; the cache is finished when all are"
    skipped = {**result["broken"], **result["skipped"]}
    text = f"{result['cache']}: {result['rows']} rows; skipped {len(skipped)} of {result['seen']}"
    return f"{text}{listed(skipped)}\ntrain on it with data.source={in_a_shell(result['cache'])}"


def listed(skipped: Mapping[str, str]) -> str:
    """The first records that were skipped, one a line; --json and cache.json have all."""
    lines = [f"\n  {printable(f'{name}: {reason}')}" for name, reason in list(skipped.items())[:20]]
    return "".join(lines) + (f"\n  and {len(skipped) - 20} more" if len(skipped) > 20 else "")
