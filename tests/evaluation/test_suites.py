"""Every suite from prompts to report on tiny random models in folders, with no way to a network."""

from __future__ import annotations

import hashlib
import json
import socket
import sys
import types
from pathlib import Path

import little
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPModel, CLIPTokenizer

from apexflow.errors import UserError
from apexflow.evaluation import features
from apexflow.evaluation.clip import preprocess, tokenize
from apexflow.evaluation.fid import fid_from_features
from apexflow.evaluation.geneval import ColorClassifier
from apexflow.evaluation.judge import question_messages
from apexflow.evaluation.local_judge import LocalJudge, Mplug
from apexflow.evaluation.runner import SUITES, Settings, Tools, evaluate, over_seeds, score_folder
from apexflow.evaluation.suite import Picture
from apexflow.evaluation.suites.geneval import GenEval
from apexflow.evaluation.table import score_table
from apexflow.generator import Generator, load


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError("a suite reached for the network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.fixture(scope="module")
def generator(tiny_model: Path) -> Generator:
    return load(str(tiny_model), "cpu")


def settings(suite: str, **changes: object) -> Settings:
    return Settings(**{"suite": suite, "steps": 1, "guidance": 1.0, "limit": 2, **changes})


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


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
    question = question_messages("why?", Image.new("RGB", (16, 16)))
    for length in (1, 3):
        assert LocalJudge(judge_folder, {"max_tokens": length})(question).count("yes") == length
    with pytest.raises(UserError, match="no judge"):
        LocalJudge(tmp_path / "absent", {})
    with pytest.raises(UserError, match="cannot load"):
        LocalJudge(tmp_path, {})


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
    assert Mplug(tmp_path)(question_messages("why?", Image.new("RGB", (2, 2)))) == "yes"


def test_wise(generator: Generator, judge_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wise").mkdir()
    root = little.wise_checkout(tmp_path / "wise")
    monkeypatch.setitem(_options("verified"), "max_tokens", 4)
    tools = Tools(data=root, judge=str(judge_folder), protocol="verified")
    report = evaluate(generator, settings("wise", limit=3), tmp_path / "e", tools=tools)
    assert report["overall"] is None and not report["complete"] and report["pictures"] == 3
    assert report["scoring"]["protocol"] == "verified" and not report["scoring"]["comparable"]
    rows = rows_of(tmp_path / "e")
    assert [row["prompt_id"] for row in rows] == [1, 334, 667] and {row["score"] for row in rows} <= {0, 1}
    assert "INCOMPLETE (not all prompts), 3 pictures" in score_table({"m": report})


def _options(protocol: str) -> dict:
    from apexflow.evaluation import wise

    return wise.PROTOCOLS[protocol].options


def test_mjhq(
    generator: Generator, inception_file: Path, clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apexflow.evaluation.suites.mjhq.CHUNK", 4)
    (tmp_path / "mjhq").mkdir()
    data = little.mjhq_folder(tmp_path / "mjhq")
    tools = Tools(data=data, inception=inception_file, clip=clip_folder)
    report = evaluate(generator, settings("mjhq", limit=5), tmp_path / "e", tools=tools)
    assert sorted(path.name for path in (tmp_path / "e" / "pictures").iterdir()) == [f"id{i}.jpg" for i in range(5)]
    assert "fid (sana, 64 px, 5 pictures)" in report["tasks"] and report["scoring"]["fid_size"] == 64
    assert report["reference_pictures"] == 5 and report["fid"] > 0
    assert report["reference"] == str(data.resolve()) and len(report["scoring"]["reference_sha256"]) == 64
    assert report["clip"] == pytest.approx(np.mean([row["clip"] for row in rows_of(tmp_path / "e")]))
    # The same from the features themselves, and from statistics in a file.
    kept = {
        name: np.concatenate(list(store.chunks(store.keys())))
        for name in ("features", "reference")
        for store in [features.FeatureStore(tmp_path / "e" / name)]
    }
    assert report["fid"] == pytest.approx(fid_from_features(kept["features"], kept["reference"]), rel=1e-6)
    mu, sigma = kept["reference"].mean(0, dtype=np.float64), np.cov(kept["reference"].astype(np.float64), rowvar=False)
    np.savez(tmp_path / "reference.npz", mu=mu, sigma=sigma)
    again = Tools(inception=inception_file, reference=tmp_path / "reference.npz", data=data)
    scored = score_folder(tmp_path / "e" / "pictures", settings("mjhq", limit=5), None, "x", again)
    assert scored["fid"] == pytest.approx(report["fid"], rel=1e-6) and "clip" not in scored
    file = hashlib.sha256((tmp_path / "reference.npz").read_bytes()).hexdigest()
    assert scored["scoring"]["reference_sha256"] == file and scored["reference"] == str(tmp_path / "reference.npz")
    # A folder holds one way of scoring: its rows would not fit another.
    with pytest.raises(UserError, match="other clip_weights and reference_sha256"):
        score_folder(tmp_path / "e" / "pictures", settings("mjhq", limit=5), tmp_path / "e", "x", again)
    # Another size and other protocols are other numbers.
    for changes in ({"fid_size": 32}, {"protocol": "clean"}, {"protocol": "torch-fidelity"}):
        other = Tools(data=data, inception=inception_file, **changes)
        found = score_folder(tmp_path / "e" / "pictures", settings("mjhq", limit=5), None, "x", other)
        assert found["fid"] != pytest.approx(report["fid"], rel=1e-3)


def test_mjhq_trouble(inception_file: Path, clip_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mjhq").mkdir()
    data, pictures = little.mjhq_folder(tmp_path / "mjhq"), tmp_path / "pictures"
    pictures.mkdir()
    for index in range(4):
        Image.effect_noise((64, 64), 30).convert("RGB").save(pictures / f"id{index}.png")
    (pictures / "id3.png").write_bytes(b"x")
    all_of = settings("mjhq", limit=None)
    report = score_folder(pictures, all_of, None, "x", Tools(data=data, inception=inception_file, clip=clip_folder))
    assert (
        report["pictures"] == 3
        and report["missing"] == ["id4.jpg", "id5.jpg"]
        and list(report["failed"]) == ["id3.png"]
    )
    (data / "imgs" / "logo" / "id0.jpg").unlink()
    with pytest.raises(UserError, match="1 of 6 reference pictures"):
        score_folder(pictures, all_of, None, "x", Tools(data=data, inception=inception_file))
    wrong = tmp_path / "wrong.safetensors"
    tensors = little.inception_tensors(16)
    del tensors["Mixed_5b.branch1x1.conv.weight"]
    save_file(tensors, wrong)
    for tools, word in (
        (Tools(data=data), "--inception"),
        (Tools(data=data, inception=tmp_path / "none"), "--inception"),
        (Tools(data=data, inception=wrong), "Mixed_5b.branch1x1"),
        (Tools(data=data, inception=inception_file, protocol="cleaner"), "cleaner"),
        (Tools(data=data, inception=inception_file, protocol="clean", fid_size=64), "--fid-size"),
        (Tools(data=data, clip=clip_folder, fid_size=64), "--inception"),
        (Tools(data=data, inception=inception_file, reference=wrong), "mu"),
        (Tools(inception=inception_file), "--data"),
    ):
        with pytest.raises(UserError, match=word):
            score_folder(pictures, all_of, None, "x", tools)


def test_pickscore(generator: Generator, clip_folder: Path, tmp_path: Path) -> None:
    model, prompts = little.clip(tmp_path / "pickscore", "gelu"), tmp_path / "prompts.txt"
    prompts.write_text("a red star\n\na blue ring\na green heart\n")
    tools = Tools(data=prompts, clip=model)
    report = evaluate(generator, settings("pickscore", limit=None), tmp_path / "e", tools=tools)
    pictures = sorted((tmp_path / "e" / "pictures").iterdir())
    assert [path.name for path in pictures] == ["00000.png", "00001.png", "00002.png"]
    assert report["complete"] and [row["prompt"] for row in rows_of(tmp_path / "e")][1] == "a blue ring"
    # As transformers' own model scores them, scale included.
    texts = tokenize(CLIPTokenizer.from_pretrained(model), ["a red star", "a blue ring", "a green heart"])
    pixels = torch.stack([preprocess(Image.open(path), 32) for path in pictures])
    with torch.no_grad():
        own = CLIPModel.from_pretrained(model)(input_ids=texts, pixel_values=pixels)
    scores = own.logits_per_image.diag()
    assert [row["pickscore"] for row in rows_of(tmp_path / "e")] == pytest.approx(scores.tolist(), rel=1e-5)
    assert report["overall"] == pytest.approx(scores.mean().item(), rel=1e-5)
    assert report["overall_se"] == pytest.approx(scores.std().item() / 3**0.5, rel=1e-3)
    pictures[0].write_bytes(b"x")
    pictures[1].unlink()
    again = score_folder(pictures[0].parent, settings("pickscore", limit=None), tmp_path / "s", "x", tools)
    assert (list(again["failed"]), again["missing"], again["complete"]) == (["00000.png"], ["00001.png"], False)
    assert again["overall"] == pytest.approx(scores[2].item(), rel=1e-5) and again["overall_se"] is None
    with pytest.raises(UserError, match="hidden_act gelu"):
        score_folder(pictures[0].parent, settings("pickscore"), None, "x", Tools(data=prompts, clip=clip_folder))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"a red star"\n""\n')
    with pytest.raises(UserError, match=r"prompts\.jsonl:2: caption empty"):
        score_folder(pictures[0].parent, settings("pickscore"), None, "x", Tools(data=prompts, clip=model))


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
        ("mini-geneval", Tools(data=Path(".")), "--data cannot apply"),
        ("geneval", Tools(protocol="x"), "--protocol cannot apply"),
        ("dpg", Tools(data=Path("."), judge=_no, clip=Path(".")), "--clip cannot apply"),
        ("wise", Tools(data=Path("."), judge=_no, judge_model="m"), "--judge-model cannot apply"),
        ("mjhq", Tools(data=Path("."), judge=_no), "--judge cannot apply"),
        ("pickscore", Tools(data=Path(".")), "--clip"),
        ("pickscore", Tools(clip=Path(".")), "--data"),
    ],
)
def test_what_a_suite_lacks_is_named(suite: str, tools: Tools, word: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=word):
        score_folder(tmp_path, settings(suite), None, "x", tools)


def test_numbers_of_pictures_that_a_layout_cannot_hold() -> None:
    for suite, count in (("dpg", 3), ("wise", 2), ("mjhq", 4), ("pickscore", 2)):
        with pytest.raises(UserError, match=f"{count} pictures a prompt"):
            SUITES[suite](Tools(), count)


def test_seeds_of_any_suite_are_averaged() -> None:
    base = {"pictures": 3, "complete": True, "missing": [], "extra": [], "failed": {}}
    reports = [base | {"overall": v, "tasks": {"a": v}, "seed": v, "fid": v, "clip": 2 * v} for v in (1, 3)]
    merged = over_seeds(reports)
    assert (merged["overall"], merged["tasks"], merged["pictures"], merged["seed"]) == (2, {"a": 2}, 6, [1, 3])
    assert (merged["fid"], merged["clip"]) == (2, 4)
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
