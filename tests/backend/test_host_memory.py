"""How much memory may be taken: limits of control groups, in trees as systems show them, and damaged ones."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forge.backend import NUMPY, host

AVAILABLE = 1 << 50
GB = 1 << 30
V1 = "31 23 0:28 {top} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
V1_CPU = "32 23 0:29 / /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
V2 = "29 23 0:26 {top} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
UNIFIED = "41 31 0:38 {top} /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
UNLIMITED_V1 = 9223372036854771712


@pytest.fixture(autouse=True)
def _much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has more than any limit."""
    found = namedtuple("found", "available")(AVAILABLE)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: found)


def tree(root: Path, own: str, mounts: str, files: dict[str, str | int]) -> Path:
    for name, text in {"proc/self/cgroup": own, "proc/self/mountinfo": mounts, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(text))
    return root


def v2(
    folder: str, most: int | str, current: int, *, high: int | str = "max", inactive: int = 0, active: int = 0
) -> dict[str, str | int]:
    at = f"sys/fs/cgroup/{folder}".rstrip("/")
    stat = f"anon 5\nfile {inactive + active}\ninactive_file {inactive}\nactive_file {active}\nslab_reclaimable {GB}\n"
    files = {"memory.max": most, "memory.high": high, "memory.current": current, "memory.stat": stat}
    return {f"{at}/{name}": text for name, text in files.items()}


def v1(
    folder: str, most: int, usage: int, *, hierarchical: int = UNLIMITED_V1, cache: int = 0, nested: str = "1"
) -> dict[str, str | int]:
    at = f"sys/fs/cgroup/memory/{folder}".rstrip("/")
    stat = f"inactive_file 0\nhierarchical_memory_limit {hierarchical}\ntotal_inactive_file {cache}\n"
    files = {"limit_in_bytes": most, "usage_in_bytes": usage, "stat": stat, "use_hierarchy": nested}
    return {f"{at}/memory.{name}": text for name, text in files.items()}


def test_page_cache_counts_as_free_in_version_2(tmp_path: Path) -> None:
    """5 GB in use, 3 of it pages of files; memory of names that the file system remembers counts as taken."""
    files = v2("", 8 * GB, 5 * GB, inactive=2 * GB, active=GB)
    assert host.free_bytes(tree(tmp_path, "0::/\n", V2.format(top="/"), files)) == 6 * GB


def test_the_smallest_room_of_nested_groups_counts(tmp_path: Path) -> None:
    own = "0::/user.slice/run-7.scope/inner\n"
    for most, wanted in {"max": 2 * GB, 9 * GB: 2 * GB, 4 * GB: GB}.items():
        files = (
            v2("user.slice", 10 * GB, 8 * GB)  # its other members use much of it
            | v2("user.slice/run-7.scope", "max", 3 * GB)
            | v2("user.slice/run-7.scope/inner", most, 3 * GB)
            | v2("another", GB, GB)
        )
        assert host.free_bytes(tree(tmp_path, own, V2.format(top="/"), files)) == wanted


def test_memory_high_is_a_limit_too(tmp_path: Path) -> None:
    files = v2("a", 8 * GB, 2 * GB, high=5 * GB, inactive=GB)
    assert host.free_bytes(tree(tmp_path, "0::/a\n", V2.format(top="/"), files)) == 4 * GB


def test_a_group_over_its_limit_has_no_room(tmp_path: Path) -> None:
    assert host.free_bytes(tree(tmp_path, "0::/a\n", V2.format(top="/"), v2("a", GB, 2 * GB))) == 0


@pytest.mark.parametrize(
    ("own", "top"),
    [
        ("/", "/"),  # a namespace of its own
        ("/docker/abc", "/docker/abc"),  # none: the container's group is what is mounted
        ("/kubepods/pod1/abc", "/"),  # none, and the whole tree's names, of which only the top is there
        ("/", "/.."),  # mounted from outside of the namespace
        ("/gone (deleted)", "/"),
    ],
)
def test_a_container_finds_its_limit_where_its_tree_is_mounted(tmp_path: Path, own: str, top: str) -> None:
    files = v2("", 8 * GB, 5 * GB, inactive=GB)
    assert host.free_bytes(tree(tmp_path / "2", f"0::{own}\n", V2.format(top=top), files)) == 4 * GB
    mounts = UNIFIED.format(top="/") + V1_CPU + V1.format(top=top)
    hybrid = f"9:name=systemd:/\n4:memory:{own}\n3:cpu,cpuacct:/\n0::/\n"
    assert host.free_bytes(tree(tmp_path / "1", hybrid, mounts, v1("", 8 * GB, 5 * GB, cache=GB))) == 4 * GB


def test_groups_that_are_not_this_process_s_do_not_count(tmp_path: Path) -> None:
    files = v2("", GB, GB)
    for own, top in (("/mine", "/other"), ("/../sibling", "/"), ("/a/../../b", "/"), ("relative", "/"), ("/ab", "/a")):
        assert host.free_bytes(tree(tmp_path, f"0::{own}\n", V2.format(top=top), files)) == AVAILABLE


def test_slurm_on_version_1(tmp_path: Path) -> None:
    """The job is limited, its step and task are not."""
    job = "slurm/uid_1000/job_17"
    files = (
        v1("", UNLIMITED_V1, 50 * GB)
        | v1(job, 16 * GB, 7 * GB, hierarchical=16 * GB, cache=2 * GB)
        | v1(f"{job}/step_0", UNLIMITED_V1, 3 * GB, hierarchical=16 * GB)
        | v1(f"{job}/step_0/task_0", UNLIMITED_V1, 3 * GB, hierarchical=16 * GB)
    )
    own = f"11:cpuset:/\n4:memory:/{job}/step_0/task_0\n0::/\n"
    assert host.free_bytes(tree(tmp_path, own, V1.format(top="/"), files)) == 11 * GB


def test_a_parent_that_is_not_mounted_shows_in_the_hierarchical_limit(tmp_path: Path) -> None:
    files = v1("", UNLIMITED_V1, 3 * GB, hierarchical=4 * GB, cache=2 * GB)
    assert host.free_bytes(tree(tmp_path, "4:memory:/a/b\n", V1.format(top="/a/b"), files)) == 3 * GB


def test_a_parent_without_hierarchy_limits_itself_alone(tmp_path: Path) -> None:
    for nested, wanted in (("0", 7 * GB), ("1", 0)):
        files = v1("a", GB, GB, nested=nested) | v1("a/b", 8 * GB, GB, nested="0")
        assert host.free_bytes(tree(tmp_path, "4:memory:/a/b\n", V1.format(top="/"), files)) == wanted


def test_a_mount_point_with_a_blank(tmp_path: Path) -> None:
    files = {name.replace("/sys/fs/cgroup", "/my groups"): text for name, text in v2("a", 2 * GB, GB).items()}
    files = {name.replace("sys/fs/cgroup", "my groups"): text for name, text in files.items()}
    mounts = V2.format(top="/").replace("/sys/fs/cgroup", "/my\\040groups")
    assert host.free_bytes(tree(tmp_path, "0::/a\n", mounts, files)) == GB


BAD = ["", "max", "-1", "1e9", "5 6", "nine", "9" * 5000, "²", "\x00", "\n\n", "1_000"]


@pytest.mark.parametrize("text", BAD, ids=lambda text: repr(text)[:20])
@pytest.mark.parametrize("name", ["memory.max", "memory.current"])
def test_a_number_that_is_none_is_no_limit(tmp_path: Path, name: str, text: str) -> None:
    files = v2("a", GB, 0) | v2("", 4 * GB, GB) | {f"sys/fs/cgroup/a/{name}": text}
    assert host.free_bytes(tree(tmp_path, "0::/a\n", V2.format(top="/"), files)) == 3 * GB


@pytest.mark.parametrize("text", [*BAD, "inactive_file\n", "inactive_file -5\n", "inactive_file x y\n", "\xff\xfe"])
def test_a_damaged_stat_leaves_what_is_in_use(tmp_path: Path, text: str) -> None:
    files = v2("a", 4 * GB, GB) | {"sys/fs/cgroup/a/memory.stat": text}
    assert host.free_bytes(tree(tmp_path, "0::/a\n", V2.format(top="/"), files)) == 3 * GB


def test_more_cache_than_memory_in_use_is_not_room_beyond_the_limit(tmp_path: Path) -> None:
    files = v2("a", 4 * GB, GB, inactive=3 * GB)
    assert host.free_bytes(tree(tmp_path, "0::/a\n", V2.format(top="/"), files)) == 4 * GB


LINES = st.lists(
    st.one_of(
        st.binary(max_size=60),
        st.sampled_from([b"0::/", b"0::/a", b"4:memory:/", b"4:memory:/../..", b"0::" + b"/a" * 5000, b"0::/\xff"]),
        st.sampled_from([V1.encode(), V2.format(top="/").encode(), b"1 2 3 / /x - cgroup2 x x", b"- - - - - - - - -"]),
        st.sampled_from([b"1 2 0:3 / /\\777\\ rw - cgroup2 x rw", b"1 2 0:3 / / rw - cgroup2 x rw", b" - cgroup2 a b"]),
    ),
    max_size=6,
)


@given(own=LINES, mounts=LINES, content=st.binary(max_size=40))
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_whatever_the_system_shows_gives_a_number(
    tmp_path: Path, own: list[bytes], mounts: list[bytes], content: bytes
) -> None:
    tree(tmp_path, "", "", v2("", GB, 0) | v2("a", GB, 0) | v1("", GB, 0))
    (tmp_path / "proc/self/cgroup").write_bytes(b"\n".join(own))
    (tmp_path / "proc/self/mountinfo").write_bytes(b"\n".join(mounts))
    (tmp_path / "sys/fs/cgroup/a/memory.max").write_bytes(content)
    assert 0 <= host.free_bytes(tmp_path) <= AVAILABLE


def test_no_control_groups_and_odd_files_in_their_place(tmp_path: Path) -> None:
    assert host.free_bytes(tmp_path / "nothing") == AVAILABLE
    root = tree(tmp_path, "0::/a\n", V2.format(top="/"), v2("", 4 * GB, GB))
    (root / "sys/fs/cgroup/a").mkdir()
    os.mkfifo(root / "sys/fs/cgroup/a/memory.max")
    (root / "sys/fs/cgroup/a/memory.current").mkdir()
    (root / "sys/fs/cgroup/a/memory.stat").symlink_to("memory.stat")
    assert host.free_bytes(root) == 3 * GB


@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_limits_of_the_process_count(limit: str) -> None:
    """In a process of its own: it has less than a GB in use when it is given 2."""
    most = 2 * GB
    code = (
        f"import resource; resource.setrlimit(resource.{limit}, ({most}, {most})); "
        "from forge.backend import NUMPY; print(NUMPY.free_bytes())"
    )
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert GB < int(done.stdout) < most


def test_the_cpu_s_memory_is_the_host_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "free_bytes", lambda: 12345)
    assert NUMPY.free_bytes() == 12345
    assert resource.getrlimit(resource.RLIMIT_AS)  # what it reads is there
