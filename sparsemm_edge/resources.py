"""What of the machine this process may use: cores and memory, within the bounds of its container."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

_ROOT = Path("/")


def usable_cores(root: Path = _ROOT) -> int:
    """The physical cores that this process may use, and no more than its container has time for.

    Where the system does not tell physical cores, all that it runs threads on count.

    Args:
        root: where /proc and /sys are, for tests.
    """
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    return max(1, min([cores, *(math.ceil(quota) for quota in _cpu_quotas(root))]))


def machine_memory(root: Path = _ROOT) -> tuple[int, int]:
    """Bytes of memory that this machine, or the container around us, has; and that are available now."""
    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    folder = root / "sys/fs/cgroup"
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        files = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return total, available
    if limit.isdigit() and int(limit) < total:
        total = int(limit)
        # what files hold is given back when memory is short
        available = min(available, total - used + int(files.get("inactive_file", 0)))
    return total, available


def _cpu_quotas(root: Path) -> Iterator[float]:
    """The cores' worth of time that each control group around this process allows, of either version."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        # the group may be known by a name outside the container: then only its parents are found here
        for mount in (controllers, "cpu") if controllers else ("", "unified"):
            top = root / "sys/fs/cgroup" / mount
            group = top / path.lstrip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(top) and (quota := _cpu_quota(folder)) is not None:
                    yield quota


def _cpu_quota(folder: Path) -> float | None:
    """The cores' worth of time of one control group; None if it has no bound, or is none."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # "max" is no number
        return None
