"""Image embeddings in a file: one line of JSON, then the numbers as f32."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from sparsemm_edge.runtime.data_file import DataFile

_FILE = DataFile("sparsemm-edge/image", 2, "kept image")


def write(path: Path, embeddings: npt.NDArray[np.float32]) -> None:
    """Write embeddings [n_tokens, n_embd], all of them or nothing.

    Raises:
        SparseMMError: the file cannot be written.
    """
    n_tokens, n_embd = embeddings.shape
    _FILE.write(path, {"n_tokens": n_tokens, "n_embd": n_embd}, np.ascontiguousarray(embeddings, dtype="<f4"))


def read(path: Path, n_tokens: int, n_embd: int) -> npt.NDArray[np.float32]:
    """Read what write() wrote: [n_tokens, n_embd].

    Raises:
        SparseMMError: the file cannot be read, is of another kind, is damaged, or holds another image.
    """
    header, data = _FILE.read(path)
    shape = (header.get("n_tokens"), header.get("n_embd"))
    if shape != (n_tokens, n_embd) or len(data) != 4 * n_tokens * n_embd:
        raise _FILE.damaged(path, f"{n_tokens} x {n_embd} numbers were expected")
    return data.view("<f4").astype(np.float32).reshape(n_tokens, n_embd)
