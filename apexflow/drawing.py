"""The command `generate`: pictures from prompts, as one grid or as a folder of them."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apexflow.errors import UserError, is_taken, writing
from apexflow.files import make_folder, replacing
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
    Steps,
    Storage,
    read_sides,
    show,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from apexflow.generator import Generator


def generate(
    prompts: Annotated[list[str], typer.Argument(help='Prompts, such as "a photo of a red star left of a blue ring".')],
    model: Model = "mini-student",
    lora: Lora = None,
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            help="PNG to write, a grid if there are several pictures; or a folder, such as pictures/, for one PNG each.",
        ),
    ] = "out.png",
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    size: Sides = None,
    count: Annotated[int, typer.Option(min=1, max=1000, help="Pictures per prompt.")] = 1,
    kappa: Kappa = None,
    rho: Rho = None,
    order: Order = None,
    device: Device = "auto",
    storage: Storage = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing pictures.")] = False,
    as_json: Json = False,
) -> None:
    """Generate pictures from prompts."""
    import time

    from apexflow.generator import NOT_FINITE, load

    asked, path, each = read_sides(size), Path(output), _is_folder(output)
    _check_output(path, each, force)
    folder = path if each else path.parent
    make_folder(folder)
    generator = load(model, device, storage=storage, lora=lora)  # type: ignore[arg-type]
    repeated = [prompt for prompt in prompts for _ in range(count)]
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not finite")  # told below, with what comes of it
        pictures = generator.generate(repeated, steps, seed, asked, guidance, kappa, rho, order)
    seconds = time.perf_counter() - began
    if lost := generator.finite.count(False):
        raise UserError(
            f"{lost} of {len(pictures)} pictures are not finite, so {path} was not written: {NOT_FINITE}; restore the model"
            f"{_wider(generator, storage)}, or lower those settings"
        )
    files = _write_each(pictures, repeated, path) if each else _write_grid(pictures, path, count)
    result = {
        "output": str(path),
        "files": [str(file) for file in files],
        "pictures": len(pictures),
        "evaluations": generator.evaluations,
        "seconds": round(seconds, 4),
    }
    show(
        result,
        as_json,
        f"{path}: {len(pictures)} picture(s), {generator.evaluations} evaluation(s) each, {seconds:.2f} s",
    )


def _is_folder(output: str) -> bool:
    """Whether a name asks for a folder of pictures: one that ends in a slash, or in nothing that a picture's does."""
    from PIL import Image

    return output.endswith(("/", os.sep)) or Path(output).suffix.lower() not in Image.registered_extensions()


def _check_output(path: Path, each: bool, force: bool) -> None:
    """UserError for a name that no picture (of `each`: no folder of them) can be written to, before anything is loaded."""
    if not each and path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"cannot write a picture as {str(path)!r}: end the name with .png, or with / for a folder")
    if not each and path.is_dir():
        raise UserError(f"{path} is a folder: end the name with / for one PNG per picture, or choose another with -o")
    if (is_taken(path) if each else path.exists()) and not force:
        raise UserError(f"{path} exists: pass --force to overwrite what is there, or choose another with -o")


def _write_grid(pictures: list[Image], path: Path, count: int) -> list[Path]:
    """One picture alone, or several as a grid with the `count` pictures of a prompt in a row."""
    from PIL.Image import registered_extensions

    from apexflow.generator import picture_grid

    columns = min(len(pictures), 8) if count == 1 else count
    with replacing(path) as partial:
        picture_grid(pictures, columns).save(partial, registered_extensions()[path.suffix.lower()])
    return [path]


def _write_each(pictures: list[Image], prompts: list[str], folder: Path) -> list[Path]:
    """A numbered PNG of each picture, and the prompts beside them as an imagefolder has them: a set that can be trained on."""
    from apexflow.evaluation.files import save_picture, write_rows

    files = [folder / f"{number:04d}.png" for number in range(len(pictures))]
    with writing(folder):
        # Of other pictures under these names: a stop must not leave it.
        (folder / "metadata.jsonl").unlink(missing_ok=True)
        for picture, file in zip(pictures, files, strict=True):
            save_picture(picture, file)
    rows = [{"file_name": file.name, "text": prompt} for file, prompt in zip(files, prompts, strict=True)]
    write_rows(folder / "metadata.jsonl", rows)
    if before := sorted(set(folder.glob("[0-9][0-9][0-9][0-9].png")) - set(files)):
        warnings.warn(
            f"{folder} also holds {len(before)} pictures of an earlier call, from {before[0].name} on, which are not in "
            "metadata.jsonl: delete them if you do not need them",
            stacklevel=2,
        )
    return files


def _wider(generator: Generator, storage: str | None) -> str:
    """How the command line is asked for more precision than it took; nothing where it took all there is."""
    from torch import float32

    from apexflow.backbones.precision import compute_dtype

    if storage is not None:
        return ", leave out --storage"
    # A large model draws in bfloat16 on a GPU.
    full = compute_dtype(generator.backbone.transformer) == float32
    return "" if full else ", use --device cpu (in float32, which is slow)"
