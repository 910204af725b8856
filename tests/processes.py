"""Runs on several processes, started as torchrun would start them, but forked from a server that has the libraries loaded."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LIBRARIES = [
    "apexflow.training.loop",
    "diffusers.models.transformers.sana_transformer",
    "diffusers.models.autoencoders.autoencoder_dc",
    "transformers.models.gemma2.modeling_gemma2",
    "peft",
    "torch.utils.tensorboard",
]


def launch(task: Callable[..., None], world: int, *arguments: Any, errors: Path | None = None) -> list[Any]:
    """Start `task(*arguments)` in `world` processes; their standard error goes to the files `errors-RANK`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=_enter, args=(rank, world, port, errors, task, arguments), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    return processes


def wait(processes: list[Any], seconds: float = 600) -> list[int | None]:
    """Exit codes by rank."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def until(true: Callable[[], Any], processes: list[Any], seconds: float = 600) -> None:
    """Wait for something that running processes bring about."""
    deadline = time.monotonic() + seconds
    while not true():
        assert all(process.is_alive() for process in processes), "a process has ended before its time"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _enter(rank: int, world: int, port: int, errors: Path | None, task: Callable, arguments: tuple) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    if errors is not None:
        os.dup2(os.open(f"{errors}-{rank}", os.O_WRONLY | os.O_CREAT), 2)
    task(*arguments)


# -- Tasks -------------------------------------------------------------------------------------------------------------


def command(*arguments: str) -> None:
    """The command line."""
    from apexflow.cli import main

    sys.argv = ["apexflow", *arguments]
    main()


def command_under_torchrun(port: int, devices: tuple[str, str], *arguments: str) -> None:
    """The command line on the device of each rank, where torchrun's store listens at `port`."""
    os.environ.update({"TORCHELASTIC_RUN_ID": "1", "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(port)})
    command(*arguments, "--device", devices[int(os.environ["RANK"])])


def command_with_a_full_disk(full: int, *arguments: str) -> None:
    """The command line, where the process of rank `full` can write no large file."""
    if int(os.environ["RANK"]) == full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    command(*arguments)


def gradients(recipe: Path, cases: dict[str, list[str]], folder: Path) -> None:
    """Gradients of the first step of each case, in `folder/CASE.safetensors`."""
    from apexflow.training.config import load_recipe
    from apexflow.training.distributed import joined, leads
    from apexflow.training.loop import start
    from apexflow.training.sharding import whole
    from apexflow.training.step import accumulate

    with joined(torch.device("cpu")):
        for name, overrides in cases.items():
            run = start(load_recipe(recipe, [*overrides, f"output={folder / name}"]), resume=False)
            accumulate(run)
            found = {n: whole(p.grad).contiguous() for n, p in run.trained.items() if p.grad is not None}
            if leads():
                save_file(found, folder / f"{name}.safetensors")


def agreements(recipe: Path, folder: Path) -> None:
    """What processes must agree on, asserted in each of them."""
    from apexflow.errors import UserError
    from apexflow.training.distributed import gather, in_turn, joined, own_rows, rank, summed, together
    from apexflow.training.engine import sum_gradients

    with joined(torch.device("cpu")):
        assert gather({"rank": rank(), "text": "ü" * rank()}) == [{"rank": 0, "text": ""}, {"rank": 1, "text": "ü"}]
        assert summed({"a": 1.0, "b": 2.0} if rank() else {"a": 0.5}) == {"a": 1.5, "b": 2.0}
        assert own_rows(6).tolist() == [[0, 1, 2], [3, 4, 5]][rank()]
        for culprit in (0, 1):
            try:
                with together():
                    if rank() == culprit:
                        raise UserError("a file is missing here")
            except UserError as error:
                assert str(error) == "a file is missing here"
            else:
                raise AssertionError("an error of one process must stop all")
        marks = folder / "marks"
        in_turn(lambda: marks.open("a").write(f"{rank()}\n"))
        assert marks.read_text() == "0\n1\n"
        judge = [torch.nn.Parameter(torch.zeros(size)) for size in (2, 3, 4)]
        sum_gradients(judge)
        assert all(p.grad is None for p in judge)  # nobody's turn
        judge[rank()].grad = torch.ones_like(judge[rank()])
        sum_gradients(judge)
        assert all(torch.equal(p.grad, torch.ones_like(p)) for p in judge[:2]) and judge[2].grad is None


def late_shares(folder: Path) -> None:
    """A checkpoint that the second process writes and reads later than the first may wait among its own."""
    import torch.distributed as dist
    from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
    from torch.distributed.tensor import Shard, distribute_tensor

    from apexflow.training.checkpoint import COUNTERS, Checkpoint, read_into, save_checkpoint
    from apexflow.training.distributed import joined, rank
    from apexflow.training.sharding import all_processes

    def late(task: Callable[..., Any]) -> Callable[..., Any]:
        def wait_first(*arguments: Any) -> Any:
            time.sleep(3 * rank())
            return task(*arguments)

        return wait_first

    HuggingFaceStorageWriter.write_data = late(HuggingFaceStorageWriter.write_data)
    HuggingFaceStorageReader.read_data = late(HuggingFaceStorageReader.read_data)
    with joined(torch.device("cpu")):
        mesh, values = all_processes(torch.device("cpu")), torch.arange(10.0).view(5, 2)
        sharded, room = (distribute_tensor(t, mesh, [Shard(0)]) for t in (values, torch.zeros(5, 2)))
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)
        state = dict.fromkeys(COUNTERS, 0) | {"step": 1, "world": 2, "recipe": {}}
        path = save_checkpoint(folder, Checkpoint({"trained": {"a": sharded}}, state), keep=1)
        read_into(path, {"trained/a": room})
        assert torch.equal(room.to_local(), sharded.to_local()) and room.to_local().any()


def shares(recipe: Path, cases: dict[str, list[str]], folder: Path) -> None:
    """What each process reads of a denoiser and holds at most while a sharded run starts, in `folder/CASE-RANK.json`."""
    from apexflow.backbones import parts
    from apexflow.training import sharding
    from apexflow.training.config import load_recipe
    from apexflow.training.distributed import joined, rank
    from apexflow.training.loop import start

    reads: list[int] = []
    read_share = sharding.read_share

    class Slices:
        """A tensor in a file that notes what is asked of it."""

        def __init__(self, saved: Any) -> None:
            self.saved, self.get_shape = saved, saved.get_shape

        def __getitem__(self, rows: Any) -> torch.Tensor:
            found = self.saved[rows]
            reads.append(found.nbytes)
            return found

    def no_whole_denoiser(path: Path, *_: Any) -> None:
        raise AssertionError(f"{path} is read whole")

    sharding.read_share = lambda saved, tensor: read_share(Slices(saved), tensor)
    parts._weights = no_whole_denoiser
    with joined(torch.device("cpu")):
        for name, overrides in cases.items():
            reads.clear()
            with Held() as held:
                start(load_recipe(recipe, [*overrides, f"output={folder / name}"]), resume=False)
            (folder / f"{name}-{rank()}.json").write_text(json.dumps({"read": sum(reads), "held": held.most}))


class Held(TorchDispatchMode):
    """The most bytes of tensors that were alive at a time, of those made within."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = self.counted = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and type(tensor) is torch.Tensor and not tensor.is_meta:
                storage = tensor.untyped_storage()
                self.counted += storage.nbytes()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        if self.counted > self.most:  # perhaps, unless some are gone or counted twice
            self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
            self.counted = sum(size for _, size in self.alive.values())
            self.most = max(self.most, self.counted)
        return made
