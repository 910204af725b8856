"""Code that lies in a model's folder, named by a config as transformers' "custom code"."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def plant(config: Path, auto_map: dict[str, object], monkeypatch: pytest.MonkeyPatch, **said: object) -> Path:
    """Have `config` name the class Evil of a file beside it; the path that exists once the file has been run.

    A question whether to run it is answered with yes, as by a user, or a script that pipes it.
    """
    marker = config.parent / "ran"
    content = json.loads(config.read_text()) | {"auto_map": auto_map} | said
    config.write_text(json.dumps(content))
    (config.parent / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Evil:\n    pass\n")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(config.parent / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return marker
