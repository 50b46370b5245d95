"""A file format of this package: one line of JSON, then binary data, with its size and checksum."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsemm_edge.errors import SparseMMError, os_errors
from sparsemm_edge.files import atomic_path

_MAX_HEADER = 2**24  # bytes: the head budgets of the largest models take a tenth of a percent of it


@dataclass(frozen=True)
class DataFile:
    """A kind of file.

    Attributes:
        format, version: written into the file, and required when it is read.
        what: its name in errors.
        advice: what to do about a file of another kind, and about a damaged one.
    """

    format: str
    version: int
    what: str
    advice: tuple[str, str] = ("", "")

    def write(self, path: Path, header: Mapping[str, Any], data: npt.NDArray[Any]) -> None:
        """Write a file, complete or not at all.

        Raises:
            SparseMMError: the file cannot be written.
        """
        sizes = {"n_bytes": data.nbytes, "sha256": hashlib.sha256(data.data).hexdigest()}
        line = json.dumps({"format": self.format, "version": self.version, **header, **sizes})
        with atomic_path(path) as part, part.open("wb") as file:
            file.write(line.encode() + b"\n")
            file.write(data.data)

    def read(self, path: Path) -> tuple[dict[str, Any], npt.NDArray[np.uint8]]:
        """The header and the data of a file, checked against its size and checksum.

        Raises:
            SparseMMError: the file cannot be read, is of another kind or version, or is damaged.
        """
        with os_errors(f"read {path}"), path.open("rb") as file:
            line = file.readline(_MAX_HEADER)
            data = np.frombuffer(file.read(), dtype=np.uint8).copy()
        try:
            header = json.loads(line)
            kind, version = header["format"], header["version"]
        except (ValueError, TypeError, KeyError, RecursionError):
            kind = version = None
        if kind != self.format:
            raise SparseMMError(f"{path}: not a {self.what}{self.advice[0]}")
        if version != self.version:
            raise SparseMMError(f"{path}: a {self.what} of version {version!r}, this reads {self.version}")
        if len(data) != header.get("n_bytes"):
            raise self.damaged(path, f"it has {len(data)} bytes, expected {header.get('n_bytes')}")
        if hashlib.sha256(data).hexdigest() != header.get("sha256"):
            raise self.damaged(path, "it has changed since it was saved")
        return header, data

    def damaged(self, path: Path, reason: str) -> SparseMMError:
        return SparseMMError(f"{path}: the {self.what} is damaged, {reason}{self.advice[1]}")
