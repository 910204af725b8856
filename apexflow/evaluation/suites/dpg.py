"""DPG-Bench: dense prompts, four samples in one grid, yes/no questions about each.

Needs --data (ELLA's dpg_bench folder, or its dpg_bench.csv) and --judge. --protocol is one of the modes in
`apexflow.evaluation.dpg`. Only the overall of the official mode with mPLUG answering compares with published scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

from apexflow.data.cache import checksum
from apexflow.data.readers import text_of
from apexflow.errors import UserError
from apexflow.evaluation import dpg
from apexflow.evaluation.files import Unreadable, open_picture
from apexflow.evaluation.judge import picture_url, strip_thinking
from apexflow.evaluation.judging import MPLUG, Panel, ask_about, check_judge, make_panel
from apexflow.evaluation.replies import Request
from apexflow.evaluation.suite import OneFileEach, Picture, Prompt, Row, needs

CSV = "dpg_bench.csv"
CHUNK = 8  # pictures, each with some 60 questions
OPTIONS = {"temperature": 0, "max_tokens": 16, "chat_template_kwargs": {"enable_thinking": False}}


class DpgBench(OneFileEach):
    """One picture file a prompt: a grid of 4 samples, or 1 with --per-prompt 1."""

    allowed = (1, 4)
    takes = ("data", "judge", "judge_model", "protocol")

    @property
    def mode(self) -> str:
        return self.tools.protocol or dpg.MODES[0]

    @property
    def official_answers(self) -> bool:
        return isinstance(self.tools.judge, str) and self.tools.judge.startswith(MPLUG)

    @cached_property
    def csv(self) -> Path:
        data = needs(self.tools.data, "--data", f"ELLA's dpg_bench folder with {CSV}")
        return data / CSV if data.is_dir() else data

    @cached_property
    def questions(self) -> list[dict[str, str]]:
        return dpg.read_csv(self.csv)

    @cached_property
    def items(self) -> dict[str, dpg.Item]:
        return dpg.read_items(self.questions, "fixed")

    @cached_property
    def panel(self) -> Panel:
        return make_panel(self.tools, OPTIONS)

    def check(self) -> None:
        if self.mode not in dpg.MODES:
            raise UserError(f"--protocol {self.mode!r} is unknown: DPG-Bench has {', '.join(dpg.MODES)}")
        check_judge(self.tools)

    def prompts(self) -> list[dict[str, Any]]:
        texts = {row["item_id"]: row.get("text") or "" for row in reversed(self.questions)}
        prompts = []
        for item in self.items:
            file = self.csv.parent / "prompts" / f"{item}.txt"
            text = _read_text(file) if file.is_file() else texts[item]
            if not text:
                raise UserError(f"the DPG item {item} has no prompt: put ELLA's prompts folder beside {self.csv}")
            prompts.append({"item_id": item, "prompt": text})
        return prompts

    def name_of(self, prompt: Prompt) -> str:
        return f"{prompt.metadata['item_id']}.png"

    def settings(self) -> dict[str, Any]:
        digest = checksum(self.csv)
        comparable = self.official_answers and self.mode == dpg.MODES[0]
        return {**self.panel.identity, "mode": self.mode, "questions_sha256": digest, "comparable": comparable}

    def score(self, pictures: Sequence[Picture], work: Path) -> Iterator[Row]:
        accept: Callable[[str], bool] = bool if self.official_answers else _is_answer
        asked = ask_about(pictures, self._requests, self.panel, accept, work / "replies.jsonl", CHUNK)
        for picture, replies in asked:
            if isinstance(replies, str):
                yield {"filename": picture.name, "error": replies}
                continue
            answers: dict[str, list[str]] = {}
            for key, reply in replies.items():  # crop by crop, so each question's replies come in crop order
                plain = reply if self.official_answers else dpg.plain_reply(strip_thinking(reply))
                answers.setdefault(key.rsplit("/", 1)[1], []).append(plain)
            yield {"filename": picture.name, "item_id": picture.metadata["item_id"], "answers": answers}

    def aggregate(self, rows: Sequence[Mapping[str, Any]], work: Path) -> dict[str, Any]:
        answers = {row["item_id"]: row["answers"] for row in rows}
        result = dpg.score(self.questions, answers, [row["filename"] for row in rows], self.per_prompt, self.mode)
        overall = result["overall"] if result["items"] else None
        return {"tasks": result["l1"], "overall": overall, "l2": result["l2"], "dropped": result["failed"]}

    def _requests(self, picture: Picture) -> list[Request]:
        """Every question about every sample, sample by sample."""
        item = picture.metadata["item_id"]
        samples = _cut(picture, self.per_prompt)
        questions = self.items[item].questions
        address = cache(lambda crop: picture_url(samples[crop]))
        return [
            Request(f"{item}/{crop}/{number}", partial(self._messages, question, address, crop))
            for crop in range(len(samples))
            for number, question in questions.items()
        ]

    def _messages(self, question: str, address: Callable[[int], str], crop: int) -> list[dict[str, Any]]:
        text = question if self.official_answers else f"{question} Answer with yes or no only."
        image = {"type": "image_url", "image_url": {"url": address(crop)}}
        return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]


def _read_text(file: Path) -> str:
    try:
        return text_of(file.read_bytes()).strip()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the DPG prompt at {file} ({error}): restore it, or save it as UTF-8") from None


def _cut(picture: Picture, count: int) -> list[Any]:
    """The samples of a grid. A picture that is no such grid cannot be scored."""
    try:
        return dpg.crops(open_picture(picture.path), count)
    except UserError as error:
        raise Unreadable(str(error)) from None


def _is_answer(reply: str) -> bool:
    return dpg.plain_reply(strip_thinking(reply)) in (dpg.YES, "no")
