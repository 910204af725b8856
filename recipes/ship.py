"""Put a trained miniature into the package: weights in bfloat16, with a model card.

python recipes/ship.py mini-teacher runs/mini-teacher/model
python recipes/ship.py mini-student runs/mini-apex-deep+mini-apex-deep-2+mini-apex-own+mini-apex-own-2/model \\
    runs/mini-apex-brief/model

Of several models the mean of the weights is taken, and the rest from the last one. A further run goes on from such a mean:

python recipes/ship.py runs/mini-apex-deep+mini-apex-deep-2/model runs/mini-apex-deep/model runs/mini-apex-deep-2/model
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).parent.parent
from apexflow.backbones import Backbone, load_backbone


def ship(models: Sequence[Path], name: str) -> Path:
    """Copy a model folder, or the mean of several, to apexflow/assets/NAME in bfloat16; its path."""
    target, backbone = ROOT / "apexflow" / "assets" / name, rounded(models)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    backbone.save(target, backbone.settings)
    (target / "README.md").write_text(card(backbone, name, [model.as_posix() for model in models]))
    return target


def rounded(models: Sequence[Path]) -> Backbone:
    """A model, or the mean of several, in bfloat16."""
    backbone = mean_of(models)
    for part in ("transformer", "vae", "text_encoder"):
        getattr(backbone, part).to(torch.bfloat16)
    return backbone


def mean_of(models: Sequence[Path]) -> Backbone:
    """The last of some models of one shape, with the mean of all their denoisers' weights."""
    backbones = [load_backbone(str(model)) for model in models]
    states = [backbone.transformer.state_dict() for backbone in backbones]
    mean = {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}
    backbones[-1].transformer.load_state_dict(mean)
    return backbones[-1]


def card(backbone: Backbone, name: str, models: Sequence[str]) -> str:
    """A model card: what it is, how it was made, and the place of its scores."""
    made = backbone.settings.card
    last = [part for model in models for part in parts_of(model)]
    parts = {one: steps for each in last for one, steps in lineage(recipe_of(each)).items()}
    listed = "\n".join(f"- `recipes/{one}.yaml`, {count:,}" for one, count in parts.items())
    told = (
        f"The weights are the mean of those of {', '.join(models)} (A+B: the mean of two).\n" if len(models) > 1 else ""
    )
    recipe, minutes = yaml.safe_dump(made["recipe"], sort_keys=False), made["seconds"] / 60
    teachers = " and ".join(f"`recipes/{one}.yaml`" for one in parts_of(made["recipe"].get("teacher")))
    taught = f" Its teacher is the mean of what {teachers} made." if teachers else ""
    weights = sum(
        p.numel() for part in ("transformer", "vae", "text_encoder") for p in getattr(backbone, part).parameters()
    )
    return f"""# {name}

A miniature SANA ({weights / 1e6:.1f}M parameters with autoencoder and text encoder, bfloat16) that draws 64-pixel scenes of flat
shapes from captions. It exists to prove and to test apexflow, and knows nothing else. Apache-2.0.

Made in {sum(parts.values()):,} steps, by these recipes; each names the model that it goes on from, and its head how long it took:

{listed}

The last, below, took {minutes:.0f} minutes on {made["device"]}.{taught}
{told}Scores: mini-GenEval, never comparable to GenEval. python benchmarks/tables.py writes them from `results/scores.json`.

<!-- {name} -->
<!-- /{name} -->

Recipe, with its seed:

```yaml
{recipe}```
"""


def lineage(recipe: Mapping[str, Any]) -> dict[str, int]:
    """Steps of a recipe, and of those before it from whose models it goes on, first to last."""
    before = {one: steps for earlier in parts_of(recipe["model"]) for one, steps in lineage(recipe_of(earlier)).items()}
    return before | {Path(recipe["output"]).name: recipe["steps"]}


def parts_of(model: str | None) -> list[str]:
    """The recipes that made a model in runs/: none, one, or those of a mean, whose folder is called A+B."""
    names = Path(model or "").parent.name.split("+")
    return [name for name in names if name and recipe_file(name).is_file()]


def recipe_of(name: str) -> dict[str, Any]:
    return yaml.safe_load(recipe_file(name).read_text())


def recipe_file(name: str) -> Path:
    return ROOT / "recipes" / f"{name}.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="mini-teacher, mini-student, or a folder to write the mean to")
    parser.add_argument("models", type=Path, nargs="+")
    given = parser.parse_args()
    if "/" in given.name:
        target, backbone = Path(given.name), rounded(given.models)
        target.mkdir(parents=True)
        backbone.save(target, backbone.settings)
    else:
        target = ship(given.models, given.name)
    size = sum(p.stat().st_size for p in target.rglob("*") if p.is_file())
    print(f"{target}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
