"""What is compared, and at which budget."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from apexflow.comparison.prompts import HELD_OUT, shows_scenes
from apexflow.data.cache import is_cache
from apexflow.errors import UserError, suggest
from apexflow.objectives import guided, objectives
from apexflow.training.config import WARMUP, Data, Optimizer, Recipe, parse, short_recipe
from apexflow.training.prepare import finished_cache

# Readings of a method that are compared beside its defaults: method, and fields of its dataclass.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "apex-printed": (
        "apex",
        {
            "pairing": "printed",
            "real": "reference",
            "path_velocity": "sample",
            "path_rows": "all",
            "reference": "reference",
            "guidance": 1.0,
        },
    ),
    "apex-endpoint": ("apex", {"path_weight": 0.0, "share": 1.0}),  # as the shipped student's training begins
    "meanflow-distilled": ("meanflow", {"velocity": "teacher"}),
    "rcgm-distilled": ("rcgm", {"velocity": "teacher"}),
    "twinflow-distilled": ("twinflow", {"base": {"velocity": "teacher"}}),
    "pcm-one-phase": ("pcm", {"phases": 1}),  # for one step: the authors train a model for each number of steps
}
EVERYONE = ("apex", "apex-endpoint", "apex-printed", *(name for name in objectives() if name != "apex"))
BASIS = "flow_matching"  # what step costs are relative to
TEACHER = "teacher"
IMAGES, TIME = "images", "time"


def comparison_recipe() -> Recipe:
    """What all methods share when no recipe is given: the shipped teacher on drawn scenes, short runs."""
    # Rate and warm-up are each run's own: what stands here names the folders of comparisons.
    data = Data(source="scenes", count=10000, seed=2)
    return short_recipe("", data=data, optimizer=Optimizer(), checkpoint_every=100)


@dataclass(frozen=True)
class Plan:
    """One comparison. `recipe` says teacher, data, batch, tuning and seed; methods differ in nothing but themselves.

    images: how many training pictures each method sees; the other budget, if `timed`, is the wall time that the first method
    needs for them. runs: how many trainings of each method, with seeds from the recipe's on; a folder may get more of them later.
    rates: learning rates that are tried for every method, each on all of the images, with the first seed: a rate that is best
    early need not last. nfe, seeds, per_prompt, limit: of the evaluation. guidance: trained into every method that can.
    clip: a folder of CLIP, for the CLIP score where the data are no scenes.
    """

    output: Path
    recipe: Recipe = field(default_factory=comparison_recipe)
    methods: tuple[str, ...] = EVERYONE
    images: int = 3000
    runs: int = 1
    rates: tuple[float, ...] = (3e-4, 1e-3)
    nfe: tuple[int, ...] = (1, 2, 4, 8, 20)
    seeds: int = 3
    per_prompt: int = 2
    limit: int | None = None
    guidance: float = 2.5
    timed: bool = True
    clip: Path | None = None

    def __post_init__(self) -> None:
        for name in ("images", "runs", "seeds", "per_prompt"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if len(self.recipe.data.parts) > 1:
            raise UserError(f"a comparison takes one dataset, and its recipe has {self.recipe.data.told}: keep one")
        if self.limit is not None and self.limit < 2:
            raise UserError(f"limit must be at least 2, since a distance needs several pictures; got {self.limit}")
        if not self.rates or not all(0 < rate < math.inf for rate in self.rates):
            raise UserError(f"rates must be finite and above 0, got {self.rates}")
        if not math.isfinite(self.guidance):
            raise UserError(f"guidance must be a number, got {self.guidance}")
        if not self.nfe or min(self.nfe) < 1:
            raise UserError(f"nfe must be at least 1 each, got {self.nfe}")
        known = (*EVERYONE, *(name for name in VARIANTS if name not in EVERYONE))
        for name in self.methods:
            if name not in known:
                raise UserError(f"unknown method {name!r}{suggest(name, known)}; methods: {', '.join(known)}")

    @property
    def budgets(self) -> tuple[str, ...]:
        """What is made equal: the images, and the wall time unless the machine is not to be timed."""
        return (IMAGES, TIME) if self.timed else (IMAGES,)

    @property
    def trained(self) -> list[str]:
        """The methods in order; with them, where steps are timed, the one that their time is measured against."""
        return list(dict.fromkeys([*self.methods, BASIS] if self.timed else self.methods))

    @property
    def steps(self) -> int:
        """Steps of the budget in images."""
        return max(1, self.images // self.recipe.batch)

    @property
    def cache(self) -> Path:
        """Where the training pictures lie as latents: the finished cache that the recipe names, else one of the folder's own."""
        return finished_cache(self.recipe.data) or self.output / "cache"

    @cached_property
    def scenes(self) -> bool:
        """Whether mini-GenEval scores it. It would find nothing in other pictures, which are scored by their distance alone."""
        return shows_scenes(self.recipe.data)

    @property
    def held_out(self) -> int:
        """Pictures that no run trains on, whose captions are the prompts."""
        return self.recipe.data.held_out or (0 if self.scenes else HELD_OUT)

    @property
    def training_seeds(self) -> range:
        return range(self.recipe.seed, self.recipe.seed + self.runs)

    def of_seed(self, folder: Path, seed: int) -> Path:
        """Where a seed keeps what the first seed keeps in `folder`."""
        return folder if seed == self.recipe.seed else folder / f"seed-{seed}"

    def entry(self, name: str) -> tuple[str, dict[str, Any]]:
        """The method of a name and the fields of its dataclass that the comparison sets, and those of a recipe of that method."""
        own = self.recipe.objective if name == self.recipe.method else {}
        method, given = VARIANTS.get(name, (name, own))
        suited: dict[str, Any] = guided(objectives()[method](), self.guidance)
        found = {one: asdict(value) if is_dataclass(value) else value for one, value in suited.items()}  # type: ignore[arg-type]
        whole = {key: found[key] | value if isinstance(value, dict) else value for key, value in given.items()}
        return method, found | whole

    def nested(self, name: str, steps: Collection[int]) -> bool:
        """Whether the longest of runs of these lengths passes through the shorter ones: nothing in it depends on its length."""
        method, given = self.entry(name)
        timed = parse(objectives()[method], given, name).scheduled
        warmed = len({min(WARMUP, count) for count in steps}) == 1
        return warmed and not timed and self.recipe.optimizer.schedule == "constant"

    def recipe_for(self, name: str, folder: Path, rate: float, steps: int, seed: int | None = None) -> Recipe:
        """The run of one method at one learning rate; the first seed where none is given."""
        method, objective = self.entry(name)
        cache = self.cache
        source = None if is_cache(cache) else self.recipe.data.source  # drawn and cached once
        settings = replace(self.recipe.optimizer, learning_rate=rate, warmup=min(WARMUP, steps))
        return replace(
            self.recipe,
            output=str(folder),
            method=method,
            objective=objective,
            data=replace(self.recipe.data, source=source, cache=str(cache), held_out=self.held_out),
            optimizer=settings,
            steps=steps,
            seed=self.recipe.seed if seed is None else seed,
        )

    def identity(self) -> dict[str, Any]:
        """All that moves a result, as JSON has it; methods and runs apart, since further ones may join later."""
        plain = asdict(self)
        del plain["output"], plain["methods"], plain["runs"], plain["clip"]
        if not self.scenes:  # of scenes, what it has always been
            plain |= {"prompts": "held out", "clip": self.clip and str(self.clip)}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}
