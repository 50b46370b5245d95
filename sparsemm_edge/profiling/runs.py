"""Start worker processes, read their events and sample their memory."""

import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import IO

from sparsemm_edge.profiling.jobs import CacheSetting, Event, Task
from sparsemm_edge.profiling.memory import MemoryTrace, watch_memory

_NO_MEMORY = ("insufficient memory", "failed to allocate", "bad_alloc", "out of memory", "Cannot allocate")

Listener = Callable[[Event], None]


@dataclass(frozen=True)
class Phase:
    """A phase of a run: its name, and when it began and ended in seconds."""

    name: str
    start: float
    end: float


@dataclass
class Run:
    """A finished worker process.

    Attributes:
        status: "ok"; "killed": by the system, as when memory runs out; "out of memory": an allocation failed;
            "failed": any other reason.
        reason: one line, "" if ok.
        start, end: time.monotonic at its start and end.
        events: all that it sent.
        memory: its samples.
    """

    status: str
    reason: str
    start: float
    end: float
    events: list[Event] = field(default_factory=list)
    memory: MemoryTrace = field(default_factory=MemoryTrace)

    def phases(self) -> list[Phase]:
        """The phases in order, in seconds since the start of the process."""
        begun = [(event["name"], event["t"]) for event in self.events if event["event"] == "phase"]
        return [
            Phase(name, start - self.start, end - self.start)
            for (name, start), (_, end) in pairwise([*begun, ("", self.end)])
            if name != "end"
        ]


def run_worker(
    task: Task, settings: Sequence[CacheSetting], listen: Listener | None = None, *, n_rounds: int = 0
) -> Run:
    """Run one setting in its own process, or with n_rounds several interleaved (see worker)."""
    start = time.monotonic()
    events: list[Event] = []
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "sparsemm_edge.profiling.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            with watch_memory(process.pid) as trace:
                with suppress(BrokenPipeError):  # a worker that could not even start: its exit code tells
                    pickle.dump((task, settings, n_rounds), process.stdin)
                    process.stdin.flush()  # and left open: its end tells the worker that we are gone
                with suppress(EOFError, pickle.UnpicklingError):  # also of a worker that was killed
                    while True:
                        events.append(pickle.load(process.stdout))
                        if listen is not None:
                            listen({**events[-1], "pid": process.pid})
                code = process.wait()
        finally:  # Ctrl-C, or an error of our own
            process.kill()
            process.wait()
            process.stdout.close()
            with suppress(BrokenPipeError):
                process.stdin.close()
        status, reason = _outcome(code, events, errors)
    return Run(status, reason, start, time.monotonic(), events, trace)


def _outcome(code: int, events: list[Event], errors: IO[bytes]) -> tuple[str, str]:
    """Status and reason of a worker that ended with this exit code."""
    if code == 0:
        return "ok", ""
    said = next((event["reason"] for event in events if event["event"] == "failed"), None)
    if said is not None:
        return _status(said), said
    if code == -signal.SIGKILL:
        return "killed", (
            "killed (SIGKILL), most likely by the system because memory ran out: close other programs, or"
            " shorten the prompt; sparsemm-edge fit says what a setting takes"
        )
    errors.seek(0)
    lines = errors.read().decode("utf-8", "replace").strip().splitlines()
    last = f": {lines[-1].strip()}" if lines else ""
    how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return _status(last), how + last


def _status(reason: str) -> str:
    return "out of memory" if any(sign in reason for sign in _NO_MEMORY) else "failed"
