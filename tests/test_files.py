"""Files and folders appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from full_disk import file_size_limit
from safetensors import SafetensorError
from safetensors.torch import save_file

from apexflow.backbones.folder import INDEX, read_index
from apexflow.backbones.weights import weight_shapes
from apexflow.data import cache
from apexflow.errors import UserError
from apexflow.files import new_folder, read_json, replacing
from apexflow.training.checkpoint import COUNTERS, read_state


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_is_one_line_and_the_old_file_stays(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    told = r"cannot write .*a\.json .*No space left on device.*: free some$"
    with pytest.raises(UserError, match=told), replacing(path, "free some") as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old" and partial.suffix == ".partial"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["[" * 100_000, "[1]", "{", "5"], ids=["deep", "list", "cut", "number"])
def test_what_a_command_has_left_and_somebody_changed_is_told(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"cannot read the plan at .*plan.json: "):
        read_json(path, "the plan")


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("state.json", read_state),
        ("shard.safetensors", read_state),
        (cache.INDEX, cache.read_index),
        ("shard.safetensors", lambda folder: cache._opened(folder / "shard.safetensors")),
        (INDEX, read_index),
        ("model.safetensors", weight_shapes),
    ],
)
def test_a_file_that_we_may_not_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, read: Callable[[Path], object]
) -> None:
    """As another user has left it: whoever is told so deletes it, or fetches it again."""
    open_any = Path.open

    def refuse(path: Path, *arguments: Any, **named: Any) -> Any:
        if path.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open_any(path, *arguments, **named)

    state = dict.fromkeys(COUNTERS, 0) | {"world": 1, "recipe": {}, "sizes": {"shard.safetensors": 0}}
    (tmp_path / "state.json").write_text(json.dumps(state))
    (tmp_path / name).touch()
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=rf"^cannot use .*{name}' \(Permission denied\): check the path"):
        read(tmp_path)


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    told = "a file is in the way of a folder"
    with pytest.raises(UserError, match=told), replacing(tmp_path / "file" / "below") as partial:
        partial.write_text("")
    with pytest.raises(UserError, match="cannot write"), new_folder(tmp_path / "file" / "below"):
        pass
    assert (tmp_path / "file").read_text() == "mine"


def test_of_a_folder_that_cannot_be_copied_the_first_reason_is_told(tmp_path: Path) -> None:
    (tmp_path / "from" / "below").mkdir(parents=True)
    for name in ("a", "below/b"):
        (tmp_path / "from" / name).write_bytes(bytes(5000))
    told = r"cannot write \S+copy \(\[Errno 27\] File too large[^()\[\]]*\): check the folder and the free space$"
    with file_size_limit(1000), pytest.raises(UserError, match=told), new_folder(tmp_path / "copy") as partial:
        shutil.copytree(tmp_path / "from", partial / "from")
    assert [p.name for p in tmp_path.iterdir()] == ["from"]


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    with pytest.raises(UserError) as told, new_folder(tmp_path / "model"):
        pass
    assert str(told.value).endswith(
        f"a file is in the way of a folder ({tmp_path / 'model'}); move it or choose another path"
    )
    assert (tmp_path / "model").read_text() == "mine"


def test_a_folder_appears_whole_and_takes_no_other_away(tmp_path: Path) -> None:
    path = tmp_path / "new" / "model"
    with pytest.raises(KeyboardInterrupt), new_folder(path) as partial:
        (partial / "a").write_text("half")
        raise KeyboardInterrupt
    assert list((tmp_path / "new").iterdir()) == []
    for content in ("one", "other"):
        try:
            with new_folder(path) as partial:
                assert list(partial.iterdir()) == []
                (partial / "a").write_text(content)
        except UserError as error:
            assert content == "other" and "cannot write" in str(error)
    assert (path / "a").read_text() == "one" and list((tmp_path / "new").iterdir()) == [path]


@pytest.mark.parametrize("rights", [0o755, 0o750, 0o700])
def test_weights_can_be_read_by_those_who_can_read_their_folder(tmp_path: Path, rights: int) -> None:
    tensors, elsewhere = {"weight": torch.zeros(2)}, tmp_path / "elsewhere.safetensors"
    save_file(tensors, elsewhere)
    elsewhere.chmod(0o600)
    with new_folder(tmp_path / "model") as partial:
        (partial / "part").mkdir()
        (partial / "part").chmod(rights)
        save_file(tensors, partial / "part" / "weights.safetensors")
        os.link(elsewhere, partial / "part" / "linked.safetensors")
    part = tmp_path / "model" / "part"
    with replacing(part / "lora.safetensors") as partial:
        save_file(tensors, partial)
    for name in ("weights", "lora"):
        assert (part / f"{name}.safetensors").stat().st_mode & 0o777 == rights & 0o644
    assert elsewhere.stat().st_mode & 0o777 == 0o600  # what is only linked keeps the rights that it has
