"""A summary of the machine, and its memory bandwidth, which limits decoding."""

import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from sparsemm_edge.resources import machine_memory, usable_cores

_BYTES = 2**27  # a thread, beyond what caches hold
_SECONDS = 2  # long enough that a neighbour on the machine does not take all of it
_INSTRUCTION_SETS = {"avx512f": "AVX-512", "avx2": "AVX2", "avx": "AVX", "sve": "SVE", "asimd": "NEON"}


def machine() -> dict[str, Any]:
    """Cores, instruction set, memory and system."""
    total, available = machine_memory()
    return {
        "cores": usable_cores(),
        "threads": psutil.cpu_count() or 1,
        "architecture": platform.machine(),
        "instruction_set": _instruction_set(),
        "memory_bytes": total,
        "memory_available_bytes": available,
        "system": {"darwin": "macOS", "linux": "Linux", "win32": "Windows"}.get(sys.platform, sys.platform),
    }


def in_words(machine: dict[str, Any]) -> str:
    """One line: 2 cores, AVX2, 23 GiB memory, Linux."""
    kind = machine["instruction_set"] or machine["architecture"]
    memory = machine["memory_bytes"] / 2**30
    return f"{machine['cores']} cores, {kind}, {memory:.0f} GiB memory, {machine['system']}"


def _instruction_set() -> str | None:
    """The widest vector instructions that the system reports."""
    if platform.machine() in ("arm64", "aarch64") and sys.platform == "darwin":
        return "NEON"
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return None
    return next((name for flag, name in _INSTRUCTION_SETS.items() if flag in words), None)


def memory_bandwidth(n_threads: int) -> float:
    """Memory bandwidth of n_threads in bytes per second: the best of several passes over large arrays."""
    arrays = [np.ones(_BYTES // 4, dtype=np.float32) for _ in range(n_threads)]
    best = 0.0
    with ThreadPoolExecutor(n_threads) as pool:
        end = time.perf_counter() + _SECONDS
        while best == 0 or time.perf_counter() < end:
            started = time.perf_counter()
            list(pool.map(np.max, arrays))  # runs without the interpreter's lock
            best = max(best, n_threads * _BYTES / (time.perf_counter() - started))
    return best
