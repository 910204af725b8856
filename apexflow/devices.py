"""Which device a name means, and what it is called."""

from __future__ import annotations

import platform

import torch

from apexflow.errors import UserError
from apexflow.torchrun import local_rank


def pick_device(name: str) -> str:
    """ "auto" is CUDA where present, else the CPU. UserError for a device that is unknown or not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"unknown device {name!r}: use auto, cpu or cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            f"device {name!r} is not available (no GPU, or a CPU build of torch): use cpu, or install torch with CUDA"
        )
    return name


def worker_device(name: str) -> torch.device:
    """The device that a name means for this process: of several GPUs on a machine, the one of its number.

    UserError for a machine that has fewer of them than processes.
    """
    device = torch.device(pick_device(name))
    if device.type != "cuda" or device.index is not None:
        return device
    index, count = local_rank(), torch.cuda.device_count()
    if index >= count:
        raise UserError(f"this machine has {count} GPUs: start torchrun with --nproc-per-node={count}")
    return torch.device("cuda", index)


def device_name() -> str:
    """The GPU, or the processor and the number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo") as file:
            name = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads != 1)}"
