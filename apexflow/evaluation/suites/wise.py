"""WISE: prompts that take world knowledge, one picture each, graded by a judge.

Needs --data (a checkout of PKU-YuanGroup/WISE: prompts and rubric are read there) and --judge. --protocol is "legacy",
the paper's, or "verified". Legacy compares with published scores only with GPT-4o-2024-05-13 as the judge.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from apexflow.errors import UserError
from apexflow.evaluation import wise
from apexflow.evaluation.files import open_picture
from apexflow.evaluation.judging import Panel, ask_about, check_judge, make_panel
from apexflow.evaluation.replies import Request
from apexflow.evaluation.suite import OneFileEach, Picture, Prompt, Row, needs

CHUNK = 32  # pictures asked about before their rows are written
JUDGES = {"legacy": "gpt-4o-2024-05-13", "verified": "Qwen3.5-35B-A3B"}  # the published scores'


class Wise(OneFileEach):
    """One picture a prompt, named after its prompt_id."""

    pictures_a_prompt = 1
    allowed = (1,)
    takes = ("data", "judge", "judge_model", "protocol")

    @property
    def protocol(self) -> str:
        return self.tools.protocol or "legacy"

    @cached_property
    def root(self) -> Path:
        return needs(self.tools.data, "--data", "a checkout of PKU-YuanGroup/WISE", Path.is_dir)

    @cached_property
    def panel(self) -> Panel:
        return make_panel(self.tools, wise.PROTOCOLS[self.protocol].options)

    def check(self) -> None:
        if self.protocol not in wise.PROTOCOLS:
            raise UserError(f"--protocol {self.protocol!r} is unknown: WISE has {', '.join(wise.PROTOCOLS)}")
        check_judge(self.tools)
        self._template()

    def prompts(self) -> list[dict[str, Any]]:
        records = wise.records(self.root, self.protocol)
        without = [record["prompt_id"] for record in records if not isinstance(record.get("Prompt"), str)]
        if without:
            raise UserError(
                f"{len(without)} WISE prompts in {self.root} have no text (such as {without[0]}): check it out again"
            )
        return [record | {"prompt": record["Prompt"]} for record in records]

    def name_of(self, prompt: Prompt) -> str:
        return f"{prompt.metadata['prompt_id']}.png"

    def settings(self) -> dict[str, Any]:
        comparable = str(self.panel.identity["judge"]).split("/")[-1] == JUDGES[self.protocol]
        template = {"protocol": self.protocol, "template_sha256": self._template(), "comparable": comparable}
        return {**self.panel.identity, **template}

    def score(self, pictures: Sequence[Picture], work: Path) -> Iterator[Row]:
        asked = ask_about(pictures, self._requests, self.panel, self._parses, work / "replies.jsonl", CHUNK)
        for picture, replies in asked:
            if isinstance(replies, str):
                yield {"filename": picture.name, "error": replies}
                continue
            (reply,) = replies.values()
            about = {"prompt_id": picture.metadata["prompt_id"], "Subcategory": picture.metadata.get("Subcategory")}
            yield {"filename": picture.name} | about | (wise.parse(reply, self.protocol) or {})

    def aggregate(self, rows: Sequence[Mapping[str, Any]], work: Path) -> dict[str, Any]:
        result = wise.aggregate(rows, self.protocol)
        return {"tasks": result["categories"], "overall": result["overall"]}

    def _requests(self, picture: Picture) -> list[Request]:
        open_picture(picture.path)  # a broken picture is no case for the judge
        messages = partial(wise.judge_messages, self.root, self.protocol, picture.metadata, picture.path)
        return [Request(str(picture.metadata["prompt_id"]), messages)]

    def _parses(self, reply: str) -> bool:
        return wise.parse(reply, self.protocol) is not None

    def _template(self) -> str:
        """The sha256 of the rubric, as it reads around a prompt that stands for any."""
        any_prompt = {"Prompt": "P", "Explanation": "E", "Category": "C", "Subcategory": "S", "prompt_id": 0}
        messages = wise.judge_messages(self.root, self.protocol, any_prompt, b"")
        return hashlib.sha256(json.dumps(messages).encode()).hexdigest()
