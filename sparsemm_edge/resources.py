"""Cores and memory that this process may use, within the limits of its container."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

_ROOT = Path("/")  # of /proc and /sys


def usable_cores() -> int:
    """The number of physical cores that this process may use, within its container's CPU quota.

    Logical cores count where the system does not report physical ones.
    """
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    quotas = (_cpu_quota(group) for group in _control_groups("cpu"))
    return min([cores, *(math.ceil(quota) for quota in quotas if quota is not None)])


def machine_memory() -> tuple[int, int]:
    """Total and available memory of this machine or container, in bytes."""
    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    for group in _control_groups("memory"):
        limit, left = _memory_limit(group) or (total, available)
        total, available = min(total, limit), min(available, left)
    return total, max(0, available)


def _control_groups(controller: str) -> Iterator[Path]:
    """The folders of this process's control groups (v1 or v2) that may set a limit."""
    try:
        lines = (_ROOT / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        # the group may be known by a name outside the container: then only its parents are found here
        for mount in (controllers, controller) if controllers else ("", "unified"):
            top = _ROOT / "sys/fs/cgroup" / mount
            group = top / path.lstrip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(top):
                    yield folder


def _cpu_quota(group: Path) -> float | None:
    """The CPU quota of one control group in cores; None without one."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # "max" is no number
        return None


def _memory_limit(group: Path) -> tuple[int, int] | None:
    """The memory limit of one control group and what is left of it, in bytes; None without one."""
    if (group / "memory.max").exists():
        limit, used, given_back = "memory.max", "memory.current", "inactive_file"
    else:
        limit, used, given_back = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
    try:
        n_bytes = int((group / limit).read_text())
        left = n_bytes - int((group / used).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # what files hold is given back when memory is short
        return n_bytes, left + int(stat.get(given_back, 0))
    except (OSError, ValueError):  # "max" is no number; version 1 writes one that is larger than any memory
        return None
