"""Two commands in one folder: the second stops at once, and a killed one stops nobody."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
from command_line import Run, refused, write

from apexflow.demo import demo_recipe
from apexflow.errors import UserError
from apexflow.locking import alone_in
from apexflow.progress import console

HOLD = (
    "import sys, time; from pathlib import Path; from apexflow.locking import alone_in\n"
    "folder = Path(sys.argv[1])\n"
    "with alone_in(folder), alone_in(folder / 'seed-0'): print('held', flush=True); time.sleep(600)"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def other(folder: Path) -> Iterator[subprocess.Popen]:
    """A process that works in the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_command_in_a_folder_stops_at_once(
    run: Run, folder: Path, other: subprocess.Popen, recipe_file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    prompts = write(tmp_path / "prompts.txt", "a red star\n")
    for command in (
        ("compare", "flow_matching", "-o", folder, "--recipe", recipe_file),
        ("train", recipe_file, f"output={folder}", "--resume"),
        ("cache", prompts, "-o", folder, "--model", tiny_model),
        ("synthesize", prompts, "-o", folder, "--model", tiny_model),
        ("evaluate", "-o", folder, "--model", tiny_model, "--seeds", 2),
        ("evaluate", "-o", folder, "--images", tmp_path),
    ):
        refused(run(*command), f"another apexflow command is using {folder}", "choose another folder")
    assert not list(folder.glob("[!.]*")) and other.poll() is None
    assert run("evaluate", "-o", folder, "--model", tiny_model, "--seed", 1, "--steps", 1, "--limit", 12)[0] == 0


def test_two_exports_into_one_folder_do_not_mix(run: Run, folder: Path, tiny_model: Path) -> None:
    """The second would empty what the first is filling."""
    with alone_in(folder):
        refused(run("export", tiny_model, "-o", folder), f"another apexflow command is using {folder}")
    assert run("export", tiny_model, "-o", folder)[0] == 0 and [entry.name for entry in folder.parent.iterdir()] == [
        "out"
    ]


def test_a_running_demo_is_not_replaced(run: Run, folder: Path, other: subprocess.Popen) -> None:
    write(folder / "recipe.json", json.dumps(demo_recipe(folder, 1.0).to_dict()))
    refused(run("demo", "-o", folder, "--force"), "another apexflow command is using")
    assert (folder / "recipe.json").is_file()


def test_a_killed_process_stops_nobody(folder: Path, other: subprocess.Popen, tmp_path: Path) -> None:
    other.kill()
    other.wait()
    with alone_in(folder), alone_in(folder / "seed-0"):
        with alone_in(tmp_path / "beside"), alone_in(folder, "1"), alone_in(tmp_path / "x" / "y"):
            pass
        with pytest.raises(UserError), alone_in(tmp_path / "x" / ".." / "out"):
            pass
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


def test_whoever_may_wait_comes_after(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits, order = Event(), []
    monkeypatch.setattr(console, "print", lambda text: waits.set())

    def second() -> None:
        with alone_in(folder, wait=True):
            order.append("second")

    with ThreadPoolExecutor(1) as pool:
        with alone_in(folder):
            ended = pool.submit(second)
            assert waits.wait(60)
            order.append("first")
        ended.result()
    assert order == ["first", "second"]


def test_where_no_lock_can_be_the_work_goes_on(tmp_path: Path) -> None:
    entered = False
    with alone_in(write(tmp_path / "file", "") / "out"):
        entered = True
    assert entered and [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("link", [True, False])
def test_a_file_in_the_place_of_the_lock_is_left_alone(tmp_path: Path, link: bool) -> None:
    """In a folder that all may write to, somebody may have put a link there that leads to a file of ours."""
    lock = tmp_path / ".out.lock"
    mine = write(tmp_path / "mine" if link else lock, "mine")
    if link:
        lock.symlink_to(mine)
    with alone_in(tmp_path / "out"):
        pass
    assert mine.read_text() == lock.read_text() == "mine"


def test_where_files_never_come_to_be_nobody_waits_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As below /proc, or where folders are mounted when they are asked for."""
    tried = 0

    def missing(*_: object) -> None:
        nonlocal tried
        tried += 1
        if tried > 10_000:
            pytest.fail("tries without end")
        raise FileNotFoundError

    monkeypatch.setattr(Path, "open", missing)
    with alone_in(tmp_path / "out"):
        assert tried


def test_a_run_that_was_killed_while_it_cached_goes_on(run: Run, recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "cache").mkdir(parents=True)
    locks = [
        tmp_path / "run" / name for name in (".cache.lock", ".cache-finishing.lock", "cache/.shard-000000.json.lock")
    ]
    for lock in locks:
        write(lock, "")
    assert run("train", recipe_file, "steps=1", "--resume")[0] == 0
    assert not any(lock.exists() for lock in locks)
