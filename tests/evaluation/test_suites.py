"""Every suite from prompts to report on tiny random models in folders, with no way to a network."""

from __future__ import annotations

import json
import shutil
import sys
import types
from contextlib import suppress
from pathlib import Path

import little
import numpy as np
import pytest
import torch
import transformers
from little import question, rows_of, settings
from PIL import Image
from planted import plant

from apexflow.errors import UserError
from apexflow.evaluation import wise
from apexflow.evaluation.geneval import ColorClassifier
from apexflow.evaluation.local_judge import LocalJudge, Mplug
from apexflow.evaluation.runner import Tools, evaluate, over_seeds, score_folder
from apexflow.evaluation.suite import Picture
from apexflow.evaluation.suites import SUITES
from apexflow.evaluation.suites.geneval import GenEval
from apexflow.evaluation.table import score_table
from apexflow.generator import Generator

pytestmark = pytest.mark.usefixtures("no_network")


def test_geneval(
    generator: Generator, detector_folder: Path, clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SHORT_SIDE", "LONG_SIDE"):
        monkeypatch.setattr(f"apexflow.evaluation.geneval.detector.{name}", 96)
    tools = Tools(detector=detector_folder, clip=clip_folder)
    report = evaluate(generator, settings("geneval", per_prompt=2), tmp_path / "e", tools=tools)
    assert report["pictures"] == 4 and not report["complete"] and report["official_prompts"]
    assert set(report["tasks"]) == {"single_object", "colors"}
    assert report["scoring"]["comparable"] is False and "other weights" in report["scoring"]["detector"]
    official = ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    assert list(rows_of(tmp_path / "e")[0])[:7] == official
    assert json.loads(rows_of(tmp_path / "e")[0]["metadata"])["include"]
    assert "not comparable" in score_table({"m": report})
    assert "other prompts" not in score_table({"m": report})
    assert "other prompts" in score_table({"m": report | {"official_prompts": False}})
    assert "found nothing" in report["warning"]  # a random detector is sure of nothing


class Planted:
    """A detector that sees one sure thing and one unsure thing, each with its mask, and CLIP's view of their colours."""

    def __init__(self) -> None:
        self.crops: list[tuple[str, tuple[int, int, int]]] = []

    def detect_prepared(self, pixels: object, image_size: object, original: tuple[int, int]) -> tuple[dict, dict]:
        masks = np.zeros((2, *original), dtype=bool)
        masks[0, 2:6, 3:9], masks[1, 20:30, 20:30] = True, True
        boxes = np.array([[20, 20, 30, 30, 0.29], [3, 2, 9, 6, 0.95]], dtype=np.float32)
        return {"bench": boxes, "cow": np.empty((0, 5), np.float32)}, {"bench": masks[::-1], "cow": masks[:0]}

    def encode_images(self, crops: list[Image.Image]) -> torch.Tensor:
        self.crops += [(crop.size, crop.getpixel((0, 0))) for crop in crops]
        return torch.nn.functional.one_hot(torch.tensor([4] * len(crops)), 10).float()  # blue

    def encode_texts(self, texts: list[str]) -> torch.Tensor:
        return torch.eye(10).repeat_interleave(3, dim=0)


def test_geneval_reads_the_colour_of_the_surest_box_under_its_own_mask(tmp_path: Path) -> None:
    planted = Planted()
    suite = GenEval(Tools())
    suite.loaded = planted, ColorClassifier(planted)
    Image.new("RGB", (40, 40), (10, 20, 30)).save(tmp_path / "a.png")
    clause = {"class": "bench", "count": 1, "color": "blue"}
    asked = {"tag": "colors", "include": [clause], "prompt": "a photo of a blue bench"}
    other = {"tag": "colors", "include": [clause | {"color": "red"}], "prompt": "a photo of a red bench"}
    pictures = [Picture("a.png", tmp_path / "a.png", metadata) for metadata in (asked, other)]
    right, wrong = suite.score(pictures, tmp_path)
    assert right["correct"] and right["reason"] == ""
    assert not wrong["correct"] and wrong["reason"] == "expected red bench>=1, found 0 red; and 1 blue"
    assert planted.crops == [((6, 4), (10, 20, 30))] * 2
    (box,) = json.loads(right["details"])["bench"]
    assert box == pytest.approx([3, 2, 9, 6, 0.95])
    assert suite.aggregate([right, wrong], tmp_path)["tasks"] == {"colors": 0.5}


def test_geneval_compares_only_with_the_official_networks(detector_folder: Path, clip_folder: Path) -> None:
    suite = GenEval(Tools(detector=detector_folder, clip=clip_folder))
    finder, colors = suite.load()
    assert suite.settings()["comparable"] is False
    finder.source = "mmdet"
    assert suite.settings()["comparable"] is False  # a small CLIP names other colours
    vision = colors.clip.model.config.vision_config
    for name, value in {"hidden_size": 1024, "num_hidden_layers": 24, "patch_size": 14, "image_size": 224}.items():
        setattr(vision, name, value)
    assert suite.settings()["comparable"] is True


def test_geneval_takes_the_users_prompts(generator: Generator, tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text('{"tag": "colors", "include": [], "prompt": "in many words"}\n')
    evaluate(generator, settings("geneval", limit=None), tmp_path / "e", tools=Tools(data=own), with_scores=False)
    assert len(list((tmp_path / "e" / "pictures").rglob("*.png"))) == 4
    assert "many words" in (tmp_path / "e" / "pictures" / "00000" / "metadata.jsonl").read_text()


@pytest.mark.parametrize(
    ("suite", "data", "file", "text"),
    [
        ("dpg", ".", "prompts/0.txt", "a röd\u2028star"),
        ("geneval", "own.jsonl", "own.jsonl", '\n{"tag": "colors", "include": [], "prompt": "a röd\u2028star"}'),
    ],
)
def test_the_users_prompts_as_other_editors_write_them(
    suite: str, data: str, file: str, text: str, tmp_path: Path
) -> None:
    """With a mark at the beginning, which would stand in the prompt, and a line break that ends no line of JSON."""
    written, tools = little.dpg_folder(tmp_path) / file, Tools(data=tmp_path / data)
    written.write_bytes(f"\ufeff{text}\r\n".encode())
    assert "a röd\u2028star" in [found["prompt"] for found in SUITES[suite](tools).prompts()]
    written.write_bytes(text.replace("\u2028", " ").encode("latin-1"))
    with pytest.raises(UserError, match=rf"cannot read the .* at {written}.*not UTF-8 text"):
        SUITES[suite](tools).prompts()


def test_dpg(generator: Generator, judge_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    data = little.dpg_folder(tmp_path / "data")
    tools = Tools(data=data, judge=str(judge_folder))
    report = evaluate(generator, settings("dpg", limit=None), tmp_path / "e", tools=tools)
    grids = sorted((tmp_path / "e" / "pictures").iterdir())
    assert [grid.name for grid in grids] == ["0.png", "1.png", "2.png", "first.png"]
    assert Image.open(grids[0]).size == (128, 128)
    assert report["overall"] == 100 and report["tasks"].keys() == {"entity", "attribute", "relation"}
    assert report["complete"] and report["dropped"] == ["first"]  # the official script loses the first row
    assert rows_of(tmp_path / "e")[1]["answers"] == {str(number): ["yes"] * 4 for number in (1, 2, 3)}
    replies = (tmp_path / "e" / "replies.jsonl").read_text().splitlines()
    assert len(replies) == 4 * (1 + 3 * 3)
    fixed = score_folder(tmp_path / "e" / "pictures", settings("dpg", limit=None), None, "x", Tools(data, judge=_no))
    assert fixed["overall"] == 0


def _no(messages: object) -> str:
    return "No."


def test_a_local_judge_keeps_to_the_length_asked_for(judge_folder: Path, tmp_path: Path) -> None:
    asked = question("why?", Image.new("RGB", (16, 16)))
    for length in (1, 3):
        assert LocalJudge(judge_folder, {"max_tokens": length})(asked).count("yes") == length
    with pytest.raises(UserError, match="no judge"):
        LocalJudge(tmp_path / "absent", {})
    with pytest.raises(UserError, match="cannot load"):
        LocalJudge(tmp_path, {})


@pytest.mark.parametrize(
    ("name", "auto_map", "said"),
    [
        ("config.json", {"AutoConfig": "evil.Evil"}, {"model_type": "evil"}),
        ("processor_config.json", {"AutoProcessor": "evil.Evil"}, {"processor_class": "Evil"}),
    ],
)
def test_code_beside_a_judge_is_not_run(judge_folder, tmp_path, monkeypatch, name, auto_map, said) -> None:
    folder = Path(shutil.copytree(judge_folder, tmp_path / "judge"))
    marker = plant(folder / name, auto_map, monkeypatch, **said)
    with suppress(UserError):  # what transformers knows itself, it takes instead
        LocalJudge(folder, {})
    assert not marker.exists()


def test_a_judge_whose_processor_needs_torchvision_says_how_to_get_it(judge_folder, monkeypatch) -> None:
    def lacking(*_: object, **__: object) -> None:
        raise ImportError("Qwen2VLVideoProcessor requires the Torchvision library but it was not found")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lacking)
    with pytest.raises(UserError, match=r"Torchvision library.*apexflow\[judge\]"):
        LocalJudge(judge_folder, {})


def test_dpg_grids_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    little.dpg_folder(tmp_path / "data", 2)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (64, 64)).save(pictures / "0.jpg")
    Image.new("RGB", (64, 60)).save(pictures / "1.png")
    Image.new("RGB", (64, 64)).save(pictures / "stranger.png")
    tools = Tools(data=tmp_path / "data" / "dpg_bench.csv", judge=_no)
    report = score_folder(pictures, settings("dpg", limit=None), None, "x", tools)
    assert (report["pictures"], report["missing"], report["extra"]) == (1, ["first.png"], ["stranger.png"])
    assert "samples" in report["failed"]["1.png"] and not report["complete"]


def test_the_official_answering_model_gets_the_bare_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict] = []

    def pipeline(task: str, model: str) -> object:
        assert (task, model) == ("visual-question-answering", str(tmp_path))
        return lambda question: asked.append(question) or {"text": "yes"}

    with pytest.raises(UserError, match="modelscope"):
        Mplug(tmp_path)
    module = types.ModuleType("modelscope.pipelines")
    module.pipeline = pipeline
    monkeypatch.setitem(sys.modules, "modelscope", types.ModuleType("modelscope"))
    monkeypatch.setitem(sys.modules, "modelscope.pipelines", module)
    (tmp_path / "data").mkdir()
    data, pictures = little.dpg_folder(tmp_path / "data", 1), tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (64, 64)).save(pictures / "0.png")
    tools = Tools(data=data, judge=f"mplug:{tmp_path}")
    report = score_folder(pictures, settings("dpg", limit=None), None, "x", tools)
    assert report["scoring"]["comparable"] and report["overall"] == 100
    assert asked[0]["question"] == "Is there a car?" and asked[0]["image"].size == (32, 32)
    assert Mplug(tmp_path)(question("why?", Image.new("RGB", (2, 2)))) == "yes"


def test_wise(generator: Generator, judge_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wise").mkdir()
    root = little.wise_checkout(tmp_path / "wise")
    monkeypatch.setitem(wise.PROTOCOLS["verified"].options, "max_tokens", 4)
    tools = Tools(data=root, judge=str(judge_folder), protocol="verified")
    report = evaluate(generator, settings("wise", limit=3), tmp_path / "e", tools=tools)
    assert report["overall"] is None and not report["complete"] and report["pictures"] == 3
    assert report["scoring"]["protocol"] == "verified" and not report["scoring"]["comparable"]
    rows = rows_of(tmp_path / "e")
    assert [row["prompt_id"] for row in rows] == [1, 334, 667] and {row["score"] for row in rows} <= {0, 1}
    assert "INCOMPLETE (not all prompts), 3 pictures" in score_table({"m": report})


@pytest.mark.parametrize(
    ("suite", "tools", "word"),
    [
        ("dpg", Tools(judge=_no), "--data"),
        ("dpg", Tools(data=Path("."), judge=_no), "dpg_bench.csv"),
        ("dpg", Tools(data=Path(".")), "--judge"),
        ("dpg", Tools(data=Path("."), judge="http://localhost:1/v1"), "--judge-model"),
        ("dpg", Tools(data=Path("."), judge=_no, protocol="x"), "official"),
        ("wise", Tools(judge=_no), "--data"),
        ("wise", Tools(data=Path("."), judge=_no), "checkout"),
        ("wise", Tools(data=Path("."), judge=_no, protocol="x"), "legacy"),
        ("mini-genevall", Tools(), "mini-geneval"),
        ("mini-geneval", Tools(data=Path(".")), "--data cannot be used"),
        ("geneval", Tools(protocol="x"), "--protocol cannot be used"),
        ("dpg", Tools(data=Path("."), judge=_no, clip=Path(".")), "--clip cannot be used"),
        ("wise", Tools(data=Path("."), judge=_no, judge_model="m"), "--judge-model cannot be used"),
        ("mjhq", Tools(data=Path("."), judge=_no), "--judge cannot be used"),
        ("pickscore", Tools(data=Path(".")), "--clip"),
        ("pickscore", Tools(clip=Path(".")), "--data"),
    ],
)
def test_what_a_suite_lacks_is_named(suite: str, tools: Tools, word: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=word):
        score_folder(tmp_path, settings(suite), None, "x", tools)


def test_numbers_of_pictures_that_a_layout_cannot_hold() -> None:
    for suite, count in (("dpg", 3), ("wise", 2), ("mjhq", 4), ("pickscore", 2)):
        with pytest.raises(UserError, match=f"{count} pictures per prompt"):
            SUITES[suite](Tools(), count)


def test_seeds_of_any_suite_are_averaged() -> None:
    base = {"pictures": 3, "complete": True, "missing": [], "extra": [], "failed": {}}
    reports = [base | {"overall": v, "tasks": {"a": v}, "seed": v, "fid": v, "whatever": 2 * v} for v in (1, 3)]
    merged = over_seeds(reports)
    assert (merged["overall"], merged["tasks"], merged["pictures"], merged["seed"]) == (2, {"a": 2}, 6, [1, 3])
    assert (merged["fid"], merged["whatever"]) == (2, 4)
    assert merged["overall_se"] == pytest.approx(1)
    for lacking in (reports, reports[:1]):  # what one seed lacks, all lack
        nothing = over_seeds([report | {"overall": None} for report in lacking] + reports[len(lacking) :])
        assert (nothing["overall"], nothing["overall_se"]) == (None, None)


def test_what_lacks_is_named_for_every_seed() -> None:
    base = {"overall": 1, "tasks": {"a": 1}, "pictures": 3, "complete": False, "extra": []}
    first = base | {"seed": 0, "missing": ["1.png"], "failed": {}}
    second = base | {"seed": 1, "missing": [], "failed": {"2.png": "unreadable"}, "tasks": {"a": 1, "b": 0}}
    merged = over_seeds([first, second])
    assert merged["missing"] == ["seed-0/1.png"] and merged["failed"] == {"seed-1/2.png": "unreadable"}
    assert merged["tasks"] == {"a": 1, "b": 0}  # a task that the first seed lacks
