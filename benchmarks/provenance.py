"""Where a number comes from: commit, device, versions. Every file under results/ carries it."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys

import torch


def provenance() -> dict[str, object]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
    ).stdout
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{processor()}, {torch.get_num_threads()} threads"
    )
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit + ("+changes" if changed.strip() else ""),
        "device": device,
        "torch": torch.__version__,
    }


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
