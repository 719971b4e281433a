"""Locks between processes and threads."""

import threading
from pathlib import Path

import pytest

from forge.errors import DownloadError
from forge.hub import locks


def test_a_lock_that_was_removed_is_no_lock(tmp_path: Path) -> None:
    """Who waited for a lock that its holder removes must hold the file that newcomers find."""
    path = tmp_path / "new" / "lock"
    waits, holds, leave = threading.Event(), threading.Event(), threading.Event()

    def wait() -> None:
        with locks.held(path, waits.set):
            holds.set()
            leave.wait(60)

    other = threading.Thread(target=wait)
    with locks.held(path, remove=True):
        other.start()
        assert waits.wait(60)
    assert holds.wait(60)
    with pytest.raises(BlockingIOError), locks.held(path):
        pass
    leave.set()
    other.join(60)
    with locks.held(path, remove=True):
        assert path.exists()
    assert not path.exists()


@pytest.mark.parametrize("target", ["elsewhere/lock", "elsewhere/there", "lock"])
def test_a_link_is_no_lock(tmp_path: Path, target: str) -> None:
    """Whoever made it would else have files made, and removed, where it leads."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "there").touch()
    path = tmp_path / "lock"
    path.symlink_to(tmp_path / target)
    with pytest.raises(DownloadError, match=f"^the lock {path} is not a regular file: remove it$"), locks.held(path):
        pass
    assert [file.name for file in (tmp_path / "elsewhere").iterdir()] == ["there"]
