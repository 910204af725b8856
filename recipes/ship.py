"""Put a trained miniature into the package: weights in bfloat16, with a model card.

python recipes/ship.py runs/mini-teacher/model mini-teacher
python recipes/ship.py runs/mini-apex-both/model mini-student
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).parent.parent
from apexflow.backbones import load_backbone


def ship(model: Path, name: str) -> Path:
    """Copy a model folder to apexflow/assets/NAME in bfloat16; its path."""
    target = ROOT / "apexflow" / "assets" / name
    backbone = load_backbone(str(model))
    for part in ("transformer", "vae", "text_encoder"):
        getattr(backbone, part).to(torch.bfloat16)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    backbone.save(target, backbone.settings)
    (target / "README.md").write_text(card(backbone, name))
    return target


def card(backbone: object, name: str) -> str:
    """A model card: what it is, how it was made, and the place of its scores."""
    made = backbone.settings.card
    before = Path(made["recipe"]["model"]).parent.name
    recipe, minutes = yaml.safe_dump(made["recipe"], sort_keys=False), made["seconds"] / 60
    weights = sum(
        p.numel() for part in ("transformer", "vae", "text_encoder") for p in getattr(backbone, part).parameters()
    )
    return f"""# {name}

A miniature SANA ({weights / 1e6:.1f}M parameters with autoencoder and text encoder, bfloat16) that draws 64-pixel scenes of flat
shapes from captions. It exists to prove and to test apexflow, and knows nothing else. Apache-2.0.

The recipe below took {made["steps"]} steps and {minutes:.0f} minutes on {made["device"]}, from what `recipes/{before}.yaml` made.
Scores: mini-GenEval, never comparable to GenEval. python benchmarks/tables.py writes them from `results/scores.json`.

<!-- {name} -->
<!-- /{name} -->

Recipe, with its seed:

```yaml
{recipe}```
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("name")
    given = parser.parse_args()
    target = ship(given.model, given.name)
    size = sum(p.stat().st_size for p in target.rglob("*") if p.is_file())
    print(f"{target}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
