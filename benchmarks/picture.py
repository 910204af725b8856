"""Draw the README's picture: the first prompts of a seed, not picked, by teacher and student with the same noise.

python benchmarks/picture.py
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from apexflow.data.scenes import scenes
from apexflow.generator import load
from apexflow.reporting.pictures import labelled_sheet

TARGET = Path(__file__).parent.parent / "docs" / "images" / "student.png"
PROMPTS, SEED, SIDE = 10, 11, 96
CASES = (  # model, steps, guidance
    ("mini-teacher", 1, 1.0),
    ("mini-student", 1, 1.0),
    ("mini-student", 2, 1.0),
    ("mini-student", 4, 1.0),
    ("mini-teacher", 50, 2.5),
)


def main() -> None:
    prompts = [scene.caption for scene in scenes(PROMPTS, seed=SEED)]
    models = {name: load(name) for name in ("mini-teacher", "mini-student")}
    columns = [models[name].generate(prompts, steps, SEED, guidance=guidance) for name, steps, guidance in CASES]
    rows = {
        prompt: [column[index].resize((SIDE, SIDE), Image.Resampling.BICUBIC) for column in columns]
        for index, prompt in enumerate(prompts)
    }
    heads = [f"{name.removeprefix('mini-')}, {steps} step{'s' * (steps > 1)}" for name, steps, _ in CASES]
    labelled_sheet(rows, heads).save(TARGET, optimize=True)
    print(TARGET)


if __name__ == "__main__":
    main()
