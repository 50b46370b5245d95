"""Distribute work over processes, each with its own model."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

from sparsemm_edge.errors import SparseMMError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def map_processes(
    worker: Callable[[int, Iterator[_Item]], Iterator[_Result]], items: Sequence[_Item], n_jobs: int
) -> Iterator[_Result]:
    """Yield results of all items as they complete; each free process gets the next item.

    The processes end with this call, even if this process is killed.

    Args:
        worker: runs in each process with its rank and an iterator of items; yields one result per item. It is
            pickled, as are items and results.
        n_jobs: processes; no more than items are started.

    Raises:
        SparseMMError: raised by a worker, or a process that died.
    """
    context = get_context("spawn")  # a forked child would share llama.cpp's threads and memory maps
    processes: dict[Connection, SpawnProcess] = {}

    def send(connection: Connection, item: _Item) -> None:
        with suppress(ConnectionError):  # that it died is seen where its result is awaited
            connection.send(item)

    try:
        for rank in range(min(n_jobs, len(items))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_run, args=(worker, rank, theirs), daemon=True)
            process.start()
            processes[ours] = process
            theirs.close()
        left, busy = iter(items), list(processes)
        for connection, item in zip(busy, left, strict=False):
            send(connection, item)
        while busy:
            ready = wait(busy)
            for connection in [each for each in busy if each in ready]:
                try:
                    found = connection.recv()
                except (EOFError, OSError) as error:
                    process = processes[connection]
                    process.join()
                    raise SparseMMError(
                        f"a process of the run died (exit status {process.exitcode}): out of memory, or"
                        " because a model file was replaced: what is done is saved, --resume goes on, fewer"
                        " --jobs take less memory"
                    ) from error
                if isinstance(found, SparseMMError):
                    raise found
                yield found
                try:
                    send(connection, next(left))
                except StopIteration:
                    busy.remove(connection)
    finally:
        for process in processes.values():
            process.kill()
        for process in processes.values():
            process.join()


def _run(worker: Callable[[int, Iterator[Any]], Iterator[Any]], rank: int, connection: Connection) -> None:
    """Run in a child process: receive items and send results, until it is killed or its parent exits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    try:
        for result in worker(rank, _items(connection)):
            connection.send(result)
    except SparseMMError as error:
        connection.send(error)


def _items(connection: Connection) -> Iterator[Any]:
    while True:
        yield connection.recv()


def _exit_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
