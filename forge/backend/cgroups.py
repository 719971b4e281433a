"""The control groups of this process, in which containers, Slurm and systemd write how much it may take.

Sources: cgroups(7), proc_pid_mountinfo(5), and the kernel's admin-guide/cgroup-v1 and cgroup-v2.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from forge import _files

_MAX_BYTES = 16 << 20
_LONGEST_PATH = 4096
_V2 = ""
"""What /proc names in place of controllers: version 2 has one hierarchy for all."""


@dataclass(frozen=True, slots=True)
class Group:
    """One control group that this process is in, or a parent of it. What cannot be read is not there."""

    folder: Path
    is_v2: bool
    is_own: bool

    def words(self, name: str) -> list[str]:
        """A file's words; none where there is no such file."""
        return read_text(self.folder / name).split()

    def number(self, name: str) -> int | None:
        """A file that holds one number; None where it does not, as "max" does not."""
        words = self.words(name)
        return _number(words[0]) if len(words) == 1 else None

    def table(self, name: str) -> dict[str, int]:
        """A file with a name and a number in each line."""
        pairs = (line.split() for line in read_text(self.folder / name).splitlines())
        numbers = {pair[0]: _number(pair[1]) for pair in pairs if len(pair) == 2}
        return {key: number for key, number in numbers.items() if number is not None}


def groups(controller: str, root: Path = Path("/")) -> Iterator[Group]:
    """Those whose limits of a controller hold for this process: its own and their parents, as far as they are mounted.

    Both versions are looked at: of a hybrid system one has the controller's files. root: where /proc and the mount
    points lie.
    """
    mounts = list(_mounts(root))
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        names, colon, path = rest.partition(":")
        if not colon or not (names == _V2 or controller in names.split(",")):
            continue
        for kind, options, top, mounted_at in mounts:
            is_v2 = kind == "cgroup2"
            if is_v2 != (names == _V2) or not (is_v2 or controller in options):
                continue
            below = _below(path, top)
            if below is None:
                continue
            folder = root / mounted_at.lstrip("/")
            yield from (
                Group(folder.joinpath(*below[:depth]), is_v2, depth == len(below))
                for depth in range(len(below), -1, -1)
            )


def _mounts(root: Path) -> Iterator[tuple[str, list[str], str, str]]:
    """Type, options, the group at its top, and mount point of each mounted hierarchy."""
    for line in read_text(root / "proc/self/mountinfo").splitlines():
        mount, dash, system = line.partition(" - ")
        fields, more = mount.split(" "), system.split(" ")
        if dash and len(fields) >= 6 and len(more) >= 3 and more[0] in ("cgroup", "cgroup2"):
            yield more[0], more[2].split(","), _plain(fields[3]), _plain(fields[4])


def _below(path: str, top: str) -> tuple[str, ...] | None:
    """The names from the group at the top of a mount to the process's; None if that is not below it.

    A top like "/.." lies above what a container sees as "/". The names in between are hidden: the top alone is seen.
    """
    if len(path) > _LONGEST_PATH or not path.startswith("/"):
        return None
    parts, above = PurePosixPath(path).parts[1:], PurePosixPath(top).parts[1:]
    if ".." in parts:
        return None
    if above and set(above) == {".."}:
        return ()
    return parts[len(above) :] if parts[: len(above)] == above else None


def _plain(field: str) -> str:
    r"""A path as it is: mountinfo writes blanks and backslashes as octal numbers, ``\040``."""
    return re.sub(r"\\([0-3][0-7]{2})", lambda match: chr(int(match[1], 8)), field)


def _number(word: str) -> int | None:
    return int(word) if word.isascii() and word.isdigit() and len(word) <= 20 else None


def read_text(path: Path) -> str:
    """A file of the kernel's; "" where it cannot be read."""
    try:
        return os.fsdecode(_files.read(path, _MAX_BYTES))
    except (OSError, ValueError):
        return ""
