"""The tiny pipelines of tests/backbones, their folders and backbones."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "backbones"))
