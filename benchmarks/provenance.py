"""Where a number comes from: commit, device, versions. Every file under results/ carries it."""

from __future__ import annotations

import shlex
import subprocess
import sys

import torch

from apexflow.devices import device_name


def provenance() -> dict[str, object]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    # Results are what is being written: they change no number to come.
    status = ["git", "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)results"]
    changed = subprocess.run(status, capture_output=True, text=True).stdout
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit + ("+changes" if changed.strip() else ""),
        "device": device_name(),
        "torch": torch.__version__,
    }
