"""Reading text files, and writing files so that a failure leaves nothing half-written behind."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparsemm_edge.errors import SparseMMError


def read_text(path: Path) -> str:
    """The content of a text file in UTF-8.

    Raises:
        SparseMMError: the file cannot be read, or is not text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise SparseMMError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise SparseMMError(f"{path}: not a text file ({error})") from error


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
