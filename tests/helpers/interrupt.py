"""The command line stopped from outside, as Ctrl-C, `kill` and the system do it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

HOW = {"Ctrl-C": 130, "SIGTERM": 143, "SIGKILL": -signal.SIGKILL}
"""Ways to stop a command, and the exit status that it has then."""


def stop(
    how: str,
    arguments: list[object],
    ready: Callable[[list[psutil.Process]], bool],
    *,
    folder: Path,
    environment: Mapping[str, str] | None = None,
) -> tuple[int, list[psutil.Process]]:
    """Run `sparsemm-edge *arguments` and stop it once ready(its child processes) says so.

    Args:
        how: one of HOW. Ctrl-C reaches the whole process group, the others only the command itself.
        folder: of temporary files, its own and the command's.

    Returns:
        The exit status, and the child processes of that moment that are still there a while later.
    """
    with (folder / "errors.txt").open("w+") as errors:
        running = subprocess.Popen(
            [sys.executable, "-m", "sparsemm_edge.cli", *map(str, arguments)],
            start_new_session=True,
            # what a shell starts in the background inherits that Ctrl-C is ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=os.environ | {"TMPDIR": str(folder / "tmp")} | (environment or {}),
        )
        try:
            children: list[psutil.Process] = []
            while True:
                time.sleep(0.02)
                assert running.poll() is None, (folder / "errors.txt").read_text()
                with contextlib.suppress(psutil.Error):  # one has ended, the next begins
                    children = psutil.Process(running.pid).children(recursive=True)
                    if ready(children):
                        break
            if how == "Ctrl-C":
                os.killpg(running.pid, signal.SIGINT)
            else:
                running.send_signal(getattr(signal, how))
            status = running.wait(timeout=120)
            return status, psutil.wait_procs(children, timeout=30)[1]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
