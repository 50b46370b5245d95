"""Sample the memory of a process from outside, which also works for a killed process."""

import ctypes
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

_PERIOD_S = 0.02
_PSS_EVERY = 25  # samples: the kernel walks all pages for it

_STATUS = {"VmHWM": "peak", "VmRSS": "rss", "RssAnon": "anon", "RssFile": "file"}


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


class MemoryWatch:
    """Samples a process in a thread, for the duration of a `with`.

    with MemoryWatch(pid) as watch:
        ...
    watch.trace
    """

    def __init__(self, pid: int) -> None:
        self.trace = MemoryTrace()
        self._pid = pid
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        count = 0
        while True:
            try:
                self._sample(with_pss=count % _PSS_EVERY == 0)
            except (OSError, psutil.Error):  # the process is gone
                return
            count += 1
            if self._end.wait(_PERIOD_S):
                return

    def _sample(self, with_pss: bool) -> None:
        trace, now = self.trace, time.monotonic()
        if sys.platform == "linux":
            found = _linux_status(self._pid)
            if "rss" not in found:  # a process that has ended and was not waited for
                raise ProcessLookupError
            pss = _linux_pss(self._pid) if with_pss else None
            trace.rss_peak = max(trace.rss_peak, found["peak"], found["rss"])
            rss, anon, file, footprint = found["rss"], found["anon"], found["file"], None
        else:
            rss, anon, file, pss = psutil.Process(self._pid).memory_info().rss, None, None, None
            footprint = _macos_footprint(self._pid) if sys.platform == "darwin" else None
            trace.rss_peak = max(trace.rss_peak, rss)
        for name, value in (("anon", anon), ("file", file), ("pss", pss), ("footprint", footprint)):
            getattr(trace, name).append(value)
        trace.rss.append(rss)
        trace.t.append(now)


def anon_bytes() -> int | None:
    """Anonymous memory of this process in bytes; None except on Linux."""
    return _linux_status(os.getpid()).get("anon") if sys.platform == "linux" else None


def _linux_status(pid: int) -> dict[str, int]:
    """Bytes from /proc/PID/status, by the names of _STATUS' values."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in _STATUS:
            found[_STATUS[name]] = int(value.split()[0]) * 1024
    return found


def _linux_pss(pid: int) -> int | None:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return None


def _macos_footprint(pid: int) -> int | None:
    """The physical footprint, as in Activity Monitor: anonymous and GPU memory."""
    # struct rusage_info_v0 of <sys/resource.h>: a uuid of 16 bytes, then 64-bit numbers; the seventh after
    # user and system time, two kinds of wakeups, pageins and wired size, resident size is the footprint
    info = (ctypes.c_uint64 * 12)()
    if ctypes.CDLL("libproc.dylib").proc_pid_rusage(pid, 0, ctypes.byref(info)) != 0:
        return None
    return int(info[2 + 7])
