"""What the commands share: options, and how a result is printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from apexflow.errors import printable

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Model = Annotated[
    str, typer.Option(help="mini-student, mini-teacher, a diffusers folder, a run, or a hub id (owner/name).")
]
Steps = Annotated[int | None, typer.Option(help="Steps of the sampler. Default: what the model was made for.")]
Guidance = Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 is none. Default: the model's own.")]
Size = Annotated[int | None, typer.Option(min=1, max=8192, help="Side in pixels. Default: the model's own.")]
MOST_SEED = 2**63 - 1  # larger ones would be those of smaller ones again
Seed = Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Same seed, same pictures.")]
Kappa = Annotated[float, typer.Option(help="Extrapolation ratio of the any-step sampler (Eq. 21).")]
Rho = Annotated[float, typer.Option(help="Share of fresh noise at each step, 0 to 1.")]
Order = Annotated[int, typer.Option(help="1, or 2 for Heun's correction.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Lora = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE[:STRENGTH]", help="Add a LoRA, or the one in a folder; given again, a further one."),
]
Storage = Annotated[
    str | None, typer.Option(help="Keep the network in fp8, or in nf4 (four bits), for a card too small for it.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="For example steps=100 optimizer.learning_rate=1e-4."),
]


def show(result: Mapping[str, Any], as_json: bool, text: str) -> None:
    """Print a result as one JSON object, or in words as a terminal may show them."""
    lines = "\n".join(printable(line) for line in text.split("\n"))  # file names need not be UTF-8
    coding = getattr(sys.stdout, "encoding", None) or "utf-8"  # which may be narrower, too
    typer.echo(json.dumps(result) if as_json else lines.encode(coding, "backslashreplace").decode(coding))
