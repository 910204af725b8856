"""Several processes, one run: who takes which rows, and how they agree. In one process everything here does nothing.

torchrun starts the processes. What they tell each other is JSON in byte tensors over gloo: nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from apexflow.devices import worker_device
from apexflow.errors import ToldElsewhere, UserError
from apexflow.locking import alone_in
from apexflow.progress import console
from apexflow.torchrun import local_rank, rank_and_world

T = TypeVar("T")
_control: dist.ProcessGroup | None = None


def rank() -> int:
    """Which of the processes that work together this is; 0 alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def leads() -> bool:
    """Whether this process writes logs, previews and reports, and speaks to the user."""
    return rank() == 0


def own_device(name: str) -> torch.device:
    """The recipe's device, which is CUDA's own from here on.

    Attention is left to the other kernels there: cuDNN's, torch's own choice on Hopper, gave gradients that were not finite, or
    read memory that was not its own, on an H200 (docs/log.md).
    """
    device = worker_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def control_group() -> dist.ProcessGroup | None:
    """The group over gloo, in which processes may wait for each other for a day; None where none has been joined."""
    return _control


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Within, the processes that torchrun started work together: NCCL among GPUs, gloo otherwise."""
    global _control
    if rank_and_world()[1] == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    # The others wait for as long as the first one prepares the data or the second node loads its model.
    _control = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    console.quiet = not leads()
    try:
        yield
    finally:
        _control, console.quiet = None, False
        dist.destroy_process_group()


def gather(value: Any) -> list[Any]:
    """What each process passed, by rank. Anything that JSON can say."""
    if world() == 1:
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world())]
    dist.all_gather(lengths, torch.tensor([len(text)]), group=_control)
    longest = int(max(lengths))
    padded = torch.cat([text, text.new_zeros(longest - len(text))])
    texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(world())]
    dist.all_gather(texts, padded, group=_control)
    return [json.loads(bytes(t[: int(n)].tolist())) for t, n in zip(texts, lengths, strict=True)]


@contextmanager
def together() -> Iterator[None]:
    """A UserError of any process inside becomes one of all, so that nobody waits for a process that has left."""
    if world() == 1:
        yield
        return
    own: UserError | None = None
    try:
        yield
    except UserError as error:
        own = error
    told = [message for message in gather(None if own is None else str(own)) if message is not None]
    if told:
        raise (UserError if leads() else ToldElsewhere)(told[0]) from own


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Within, no other command works in a run's folder, for which its first process stands; UserError of all if one does."""
    with ExitStack() as held:
        with together():
            if leads():
                held.enter_context(alone_in(folder))
        yield


def in_turn(task: Callable[[], T]) -> T:
    """`task` by the first process, then by one on each other machine, then by the rest, which find what those left on disk."""
    turn = 0 if rank() == 0 else 1 if local_rank() == 0 else 2
    results: list[T] = []
    for now in range(3 if world() > 1 else 1):
        with together():
            if now == turn:
                results.append(task())
    return results[0]


def own_rows(batch: int) -> Tensor:
    """This process's rows of the global batch: one stretch of equal length for each. UserError if they do not fit."""
    rows = rows_each(batch, world())
    return torch.arange(rank() * rows, (rank() + 1) * rows)


def rows_each(batch: int, processes: int) -> int:
    """How many rows of a batch each process takes. UserError if they cannot be shared equally."""
    if batch % processes:
        raise UserError(
            f"batch {batch} cannot be shared equally by {processes} processes: make it a multiple of {processes}"
        )
    return batch // processes


def summed(terms: dict[str, float]) -> dict[str, float]:
    """Each term summed over the processes, in the order of their ranks; some may lack some terms."""
    total: dict[str, float] = {}
    for part in gather(terms):
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total
