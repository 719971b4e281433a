"""What this process may take of its machine: memory."""

from __future__ import annotations

import resource
from pathlib import Path

from forge.backend.cgroups import Group, groups


def free_bytes(root: Path = Path("/")) -> int:
    """Memory that can be taken without swapping: what the system has, or the process's limits leave if that is less.

    The limits are those of its control groups, the smallest room of all nested ones, and of the process (``ulimit -v``
    and ``-d``). root: where /proc and the mount points of control groups lie.
    """
    import psutil

    rooms = [int(psutil.virtual_memory().available)]
    taken = psutil.Process().memory_info()
    for limit, used in ((resource.RLIMIT_AS, taken.vms), (resource.RLIMIT_DATA, taken.data)):
        most, _ = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY:
            rooms.append(most - int(used))
    rooms += [room for group in groups("memory", root) if (room := _room(group)) is not None]
    return max(min(rooms), 0)


def _room(group: Group) -> int | None:
    """Bytes that a control group may still take; None where it has no limit.

    What it has in use without its page cache: the kernel drops file pages before it refuses or kills, whether they were
    used once (`inactive_file`) or more often (`active_file`, as a model's that was hashed and then read), and counts
    both in its own MemAvailable. Memory of tmpfs is in neither. Caches of the file system's names
    (`slab_reclaimable`) count as taken: what holds them decides whether they can be dropped.
    """
    stat = group.table("memory.stat")
    if group.is_v2:  # above memory.high nobody is killed, but made to wait until memory is free
        limits = [group.number("memory.max"), group.number("memory.high")]
        used, prefix = group.number("memory.current"), ""
    else:
        if not group.is_own and group.number("memory.use_hierarchy") == 0:
            return None  # it limits itself alone
        limits = [group.number("memory.limit_in_bytes"), stat.get("hierarchical_memory_limit")]
        used, prefix = group.number("memory.usage_in_bytes"), "total_"
    known = [limit for limit in limits if limit is not None]
    if not known or used is None:
        return None
    cached = sum(stat.get(f"{prefix}{name}", stat.get(name, 0)) for name in ("inactive_file", "active_file"))
    return min(known) - max(used - cached, 0)
