"""Image embeddings in a file: one line of JSON, then the numbers as f32."""

import hashlib
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.runtime.disk_cache import write_bytes

_FORMAT, _VERSION = "sparsemm-edge/image", 1
_MAX_HEADER = 2**12  # bytes


def write(path: Path, embeddings: npt.NDArray[np.float32]) -> None:
    """Write embeddings [n_tokens, n_embd], all of them or nothing.

    Raises:
        SparseMMError: the file cannot be written.
    """
    data = np.ascontiguousarray(embeddings, dtype="<f4")
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "n_tokens": data.shape[0],
        "n_embd": data.shape[1],
        "sha256": hashlib.sha256(data.data).hexdigest(),
    }
    write_bytes(path, json.dumps(header).encode() + b"\n", data.data.cast("B"))


def read(path: Path, n_tokens: int, n_embd: int) -> npt.NDArray[np.float32]:
    """Read what write() wrote: [n_tokens, n_embd].

    Raises:
        SparseMMError: the file cannot be read, is of another kind, is damaged, or holds another image.
    """
    try:
        with path.open("rb") as file:
            line = file.readline(_MAX_HEADER)
            data = file.read()
    except OSError as error:
        raise SparseMMError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        header = json.loads(line)
        known = (header["format"], header["version"]) == (_FORMAT, _VERSION)
        shape, digest = (header["n_tokens"], header["n_embd"]), header["sha256"]
    except (ValueError, TypeError, KeyError, RecursionError):
        known, shape, digest = False, (0, 0), ""
    if not known:
        raise SparseMMError(f"{path}: not a kept image of this version")
    if shape != (n_tokens, n_embd) or len(data) != 4 * n_tokens * n_embd:
        raise SparseMMError(f"{path}: the kept image is damaged: {n_tokens} x {n_embd} numbers were expected")
    if hashlib.sha256(data).hexdigest() != digest:
        raise SparseMMError(f"{path}: the kept image is damaged: its checksum differs")
    return np.frombuffer(data, dtype="<f4").astype(np.float32).reshape(n_tokens, n_embd)
