"""What the commands share: options, and how a result is printed."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from apexflow.errors import UserError, printable, quoted

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Model = Annotated[
    str, typer.Option(help="mini-student, mini-teacher, a diffusers folder, a run, or a hub id (owner/name).")
]
Steps = Annotated[int | None, typer.Option(help="Sampling steps. Default: the model's own.")]
Guidance = Annotated[
    float | None, typer.Option(help="Classifier-free guidance scale; 1 is off. Default: the model's own.")
]
MOST_SIDE = 8192
Size = Annotated[int | None, typer.Option(min=1, max=MOST_SIDE, help="Side in pixels. Default: the model's own.")]
Sides = Annotated[
    str | None,
    typer.Option(metavar="SIDE|WIDTHxHEIGHT", help="In pixels, such as 64 or 768x512. Default: the model's own."),
]
MOST_SEED = 2**63 - 1  # larger ones would be those of smaller ones again
Seed = Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Same seed, same pictures.")]
Kappa = Annotated[
    float | None, typer.Option(help="Extrapolation ratio of the any-step sampler (Eq. 21). Default: the model's own.")
]
Rho = Annotated[float | None, typer.Option(help="Share of fresh noise at each step, 0 to 1. Default: the model's own.")]
Order = Annotated[int | None, typer.Option(help="1, or 2 for Heun's correction. Default: the model's own.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Lora = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE[:STRENGTH]", help="Add a LoRA file or folder; repeat the option to add several."),
]
Storage = Annotated[str | None, typer.Option(help="Store the network in fp8 or nf4 (four bits), to fit a smaller GPU.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Recipe overrides, such as steps=100 optimizer.learning_rate=1e-4."),
]


def read_numbers(text: str, option: str, kind: type) -> list[Any]:
    """Each once: a number that is written twice is no second rate, and no second column."""
    try:
        return list(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        raise UserError(f"{option} must be numbers separated by commas, got {text!r}") from None


def read_sides(text: str | None) -> int | tuple[int, int] | None:
    """What `--size` says: one side, or (height, width), which is the order in Python, of what is written the other way round.

    UserError for anything else.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text, re.IGNORECASE)
    width, height = (int(side or found[1]) for side in found.groups()) if found else (0, 0)
    if not (1 <= width <= MOST_SIDE and 1 <= height <= MOST_SIDE):
        wanted = f"one side or WIDTHxHEIGHT, such as 64 or 768x512, from 1 to {MOST_SIDE} pixels a side"
        raise UserError(f"--size is {quoted(text)}: give {wanted}")
    return width if width == height else (height, width)


def show(result: Mapping[str, Any], as_json: bool, text: str) -> None:
    """Print a result as one JSON object, or in words as a terminal may show them."""
    lines = "\n".join(printable(line) for line in text.split("\n"))  # file names need not be UTF-8
    coding = getattr(sys.stdout, "encoding", None) or "utf-8"  # which may be narrower, too
    typer.echo(json.dumps(result) if as_json else lines.encode(coding, "backslashreplace").decode(coding))
