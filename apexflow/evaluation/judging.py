"""Asking a judge about pictures: which one the user named, and what becomes of its replies."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apexflow.data.shards import groups
from apexflow.errors import UserError
from apexflow.evaluation.files import Unreadable
from apexflow.evaluation.judge import Ask, Judge
from apexflow.evaluation.local_judge import LocalJudge, Mplug
from apexflow.evaluation.replies import ReplyStore, Request, collect
from apexflow.evaluation.suite import Picture, Tools

MPLUG = "mplug:"
WORKERS = 8  # requests under way at a server


@dataclass(frozen=True)
class Panel:
    """A judge, how many requests it takes at a time, and what of it moves the score."""

    ask: Ask
    workers: int
    identity: Mapping[str, Any]


def check_judge(tools: Tools) -> None:
    """UserError for a judge that is not named, a server without a model name, or such a name without a server."""
    if tools.judge is None:
        raise UserError("--judge is missing: give an http:// address or the folder of a vision-language model")
    served = isinstance(tools.judge, str) and tools.judge.startswith("http")
    if served and not tools.judge_model:
        raise UserError(f"--judge-model is missing: give the name of the model at {tools.judge}")
    if tools.judge_model and not served:
        raise UserError("--judge-model cannot be used with a judge that is not an http:// address: leave it out")


def make_panel(tools: Tools, options: Mapping[str, Any]) -> Panel:
    """The judge that the user named. `options` go into the request; a server's key is read from OPENAI_API_KEY."""
    check_judge(tools)
    judge = tools.judge
    if callable(judge):
        return Panel(judge, 1, {"judge": getattr(judge, "name", type(judge).__name__)})
    judge = str(judge)
    if judge.startswith("http"):
        model = str(tools.judge_model)
        server = Judge(judge, model, os.environ.get("OPENAI_API_KEY"), options=dict(options))
        return Panel(server, WORKERS, {"judge": model, "options": dict(options)})
    if judge.startswith(MPLUG):
        return Panel(Mplug(Path(judge.removeprefix(MPLUG))), 1, {"judge": "mplug"})
    local = LocalJudge(Path(judge), options, tools.device)
    return Panel(local, 1, {"judge": local.name, "weights": local.fingerprint, "options": dict(options)})


def ask_about(
    pictures: Sequence[Picture],
    requests: Callable[[Picture], Sequence[Request]],
    panel: Panel,
    accept: Callable[[str], bool],
    store: Path,
    chunk: int,
) -> Iterator[tuple[Picture, dict[str, str] | str]]:
    """Each picture with its replies by request key, or with why it has none. Replies are kept in `store` as they come.

    UserError when a whole chunk of pictures got no reply at all: the judge is away, and asking on would only take time.
    """
    replies = ReplyStore(store)
    for part in groups(pictures, chunk):
        wanted = {picture.name: _wanted(picture, requests) for picture in part}
        asked = [request for found in wanted.values() if not isinstance(found, str) for request in found]
        collected = collect(asked, panel.ask, accept, replies, workers=panel.workers)
        if len(part) == chunk and collected.failed and not collected.replies:
            raise UserError(
                f"the judge answered none of {len(asked)} requests ({next(iter(collected.failed.values()))}); "
                "its earlier answers are kept: run again to resume"
            )
        for picture in part:
            yield picture, _outcome(wanted[picture.name], collected.replies, collected.failed)


def _wanted(picture: Picture, requests: Callable[[Picture], Sequence[Request]]) -> Sequence[Request] | str:
    try:
        return requests(picture)
    except Unreadable as error:
        return str(error)


def _outcome(
    wanted: Sequence[Request] | str, replies: Mapping[str, str], failed: Mapping[str, str]
) -> dict[str, str] | str:
    if isinstance(wanted, str):
        return wanted
    without = [request.key for request in wanted if request.key not in replies]
    if without:
        return f"{len(without)} of {len(wanted)} requests without a reply: {failed[without[0]]}"
    return {request.key: replies[request.key] for request in wanted}
