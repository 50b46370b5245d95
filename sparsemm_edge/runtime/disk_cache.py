"""A folder of cached files with a size limit; the least recently used files are removed."""

import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from sparsemm_edge.errors import SparseMMError, os_errors

_T = TypeVar("_T")
_log = logging.getLogger(__name__)  # by default Python prints warnings on stderr

SUFFIXES = (".image", ".sequence")
"""How the cache's files end. No other file of the folder is counted, read or removed."""

_ABANDONED_S = 3600  # a file that is being written for longer belongs to a process that was killed


class DiskCache:
    """A cache folder that several processes may share.

    Attributes:
        folder: made if it is not there.
        max_bytes: size limit of its files.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Raises:
        SparseMMError: the folder cannot be made.
        """
        self.folder = folder
        self.max_bytes = max_bytes
        with os_errors(f"make the folder {folder} (--image-cache)"):
            folder.mkdir(parents=True, exist_ok=True)

    def read(self, name: str, read: Callable[[Path], _T]) -> _T | None:
        """Read a file; None if it is missing, or unusable, with a warning.

        Args:
            name: of the file, which ends with one of SUFFIXES.
            read: reads it; raises SparseMMError if it is damaged or of another kind.
        """
        path = self.folder / name
        if not path.exists():
            return None
        try:
            found = read(path)
        except SparseMMError as error:
            _log.warning("warning: %s; it is made anew", error)
            return None
        with suppress(OSError):
            os.utime(path)  # used now
        return found

    def write(self, name: str, write: Callable[[Path], None]) -> None:
        """Write a file and remove others over the size limit. A failure is a warning.

        Args:
            name: of the file, which ends with one of SUFFIXES.
            write: writes it to a path, all of it or nothing; raises SparseMMError.
        """
        try:
            write(self.folder / name)
        except SparseMMError as error:
            _log.warning("warning: %s; it is not kept", error)
        self._prune()

    def _prune(self) -> None:
        files = []
        for path in self.folder.iterdir():
            with suppress(OSError):  # another process removed it
                found = path.stat()
                if path.suffix in SUFFIXES:
                    files.append((found.st_mtime_ns, found.st_size, path))
                elif path.suffix == ".part" and path.name.startswith("."):
                    kept = path.name[1:].rsplit(".", 2)[0].endswith(SUFFIXES)
                    if kept and time.time() - found.st_mtime > _ABANDONED_S:
                        path.unlink(missing_ok=True)
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.max_bytes:
                return
            with suppress(OSError):
                path.unlink(missing_ok=True)
            total -= size
