"""Sample the memory of a process from outside, which also works for a killed process."""

import ctypes
import itertools
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

_PERIOD_S = 0.02
_PSS_EVERY = 25  # samples: the kernel walks all pages for it

# lines of /proc/PID/status and smaps_rollup
_LINUX = {"VmHWM": "peak", "VmRSS": "rss", "RssAnon": "anon", "RssFile": "file", "Pss": "pss"}
SAMPLED = ("rss", "anon", "file", "pss", "footprint")
"""The quantities of a MemoryTrace."""


@dataclass
class MemoryTrace:
    """Memory of a process over time. All lists have the same length; None: not known.

    Attributes:
        t: seconds of time.monotonic.
        rss: resident bytes.
        anon: anonymous memory among them, which cannot be dropped. Linux.
        file: mapped files among them, such as weights; dropped when memory is short. Linux.
        pss: proportional set size; sampled less often. Linux.
        footprint: physical footprint. macOS.
        rss_peak: the largest resident size; except on Linux the largest sample.
    """

    t: list[float] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)
    anon: list[int | None] = field(default_factory=list)
    file: list[int | None] = field(default_factory=list)
    pss: list[int | None] = field(default_factory=list)
    footprint: list[int | None] = field(default_factory=list)
    rss_peak: int = 0

    def peak(self, what: str) -> int | None:
        """The largest sample of anon, file, pss or footprint; None if there is none."""
        return max((value for value in getattr(self, what) if value is not None), default=None)


@contextmanager
def watch_memory(pid: int) -> Iterator[MemoryTrace]:
    """Sample a process in a thread, for the duration of a `with`."""
    trace, end = MemoryTrace(), threading.Event()

    def run() -> None:
        try:
            for count in itertools.count():
                _sample(pid, trace, with_pss=count % _PSS_EVERY == 0)
                if end.wait(_PERIOD_S):
                    return
        except (OSError, psutil.Error, KeyError):  # the process is gone; one not waited for has no memory
            return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield trace
    finally:
        end.set()
        thread.join()


def _sample(pid: int, trace: MemoryTrace, with_pss: bool) -> None:
    now = time.monotonic()
    found: dict[str, Any]
    if sys.platform == "linux":
        found = _linux_bytes(f"{pid}/status") | (_linux_bytes(f"{pid}/smaps_rollup") if with_pss else {})
    else:
        found = {"rss": psutil.Process(pid).memory_info().rss}
        if sys.platform == "darwin":
            found["footprint"] = _macos_footprint(pid)
    trace.rss_peak = max(trace.rss_peak, found["rss"], found.get("peak", 0))
    trace.t.append(now)
    for name in SAMPLED:
        getattr(trace, name).append(found.get(name))


def anon_bytes() -> int | None:
    """Anonymous memory of this process in bytes; None except on Linux."""
    return _linux_bytes("self/status").get("anon") if sys.platform == "linux" else None


def _linux_bytes(file: str) -> dict[str, int]:
    """Bytes from a file in /proc, by the names of _LINUX' values."""
    lines = (line.partition(":") for line in Path("/proc", file).read_text().splitlines())
    return {_LINUX[name]: int(value.split()[0]) * 1024 for name, _, value in lines if name in _LINUX}


def _macos_footprint(pid: int) -> int | None:
    """The physical footprint, as in Activity Monitor: anonymous and GPU memory."""
    # struct rusage_info_v0 of <sys/resource.h>: a uuid of 16 bytes, then 64-bit numbers; the seventh after
    # user and system time, two kinds of wakeups, pageins and wired size, resident size is the footprint
    info = (ctypes.c_uint64 * 12)()
    if ctypes.CDLL("libproc.dylib").proc_pid_rusage(pid, 0, ctypes.byref(info)) != 0:
        return None
    return int(info[2 + 7])
