"""apexflow: one-step text-to-image by APEX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from apexflow.generator import load


def __dir__() -> list[str]:  # what a notebook completes, `load` before it was asked for too
    return __all__


def __getattr__(name: str) -> Any:
    # `import apexflow` stays instant: torch and diffusers load with the first model.
    if name == "load":
        from apexflow.generator import load

        return load
    raise AttributeError(f"module 'apexflow' has no attribute {name!r}")
