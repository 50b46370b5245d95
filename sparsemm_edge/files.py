"""Writing files so that a failure leaves nothing half-written behind."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparsemm_edge.errors import SparseMMError


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; it becomes `target` on success and is removed on failure.

    A reader sees the old file or the new one, never a part of it. `target` is replaced if it exists:
    whether it may be is the caller's decision.

    Raises:
        SparseMMError: the directory does not exist, or the operating system refuses to write (no space,
            no permission).
    """
    if not target.parent.is_dir():
        raise SparseMMError(f"cannot write {target}: there is no directory {target.parent}")
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, target)
    except OSError as error:
        raise SparseMMError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
