"""What leaves apexflow for stock diffusers: LoRA files, folders, and a scheduler that importing this makes loadable there."""

from __future__ import annotations

from apexflow.export.folder import export
from apexflow.export.lora import save_lora
from apexflow.export.scheduler import AnyStepScheduler
from apexflow.export.stock import stock_scheduler_config

__all__ = ["AnyStepScheduler", "export", "save_lora", "stock_scheduler_config"]
