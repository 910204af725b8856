"""The tiny pipelines that are handed over here are those of tests/backbones."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "backbones"))
