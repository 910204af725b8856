"""What leaves apexflow: a scheduler and LoRA files for stock diffusers. Importing it makes the scheduler loadable there."""

from __future__ import annotations

from apexflow.export.lora import save_lora, stock_scheduler_config
from apexflow.export.scheduler import AnyStepScheduler

__all__ = ["AnyStepScheduler", "save_lora", "stock_scheduler_config"]
