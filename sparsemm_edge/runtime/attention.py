"""The position that each query head attends to most, read from llama.cpp's graph while it runs.

Without flash attention llama.cpp's graph holds the attention weights of each layer as a node of its own,
`kq_soft_max-<layer>`. Before it runs a node, llama.cpp asks an evaluation callback whether to stop after it.
"""

import ctypes
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.runtime.library import llama

_WEIGHTS = b"kq_soft_max-"
_N_BYTES = 4  # of a weight: they are f32 on every backend

# name: (result, arguments), as ggml.h and ggml-backend.h declare them
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ggml_get_name": (ctypes.c_char_p, [ctypes.c_void_p]),
    "ggml_nelements": (ctypes.c_int64, [ctypes.c_void_p]),
    "ggml_nrows": (ctypes.c_int64, [ctypes.c_void_p]),
    "ggml_backend_tensor_get": (
        None,
        [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t],
    ),
}


class StrongestPositions:
    """Records the strongest positions of one context, which it must outlive.

    The context needs flash attention off, no eviction, and one sequence. Call llama_decode outside the main
    thread: there a signal's exception would be raised in the callback and lost.

    Attributes:
        callback: the context parameter `cb_eval`.
        stop: set it to end a computation at the next layer.
    """

    def __init__(self, n_layer: int, n_head: int) -> None:
        """Args:
            n_layer, n_head: of the model.

        Raises:
            SparseMMError: a build of llama.cpp without the functions that read a tensor.
        """
        self._n_head = n_head
        self._found = np.full((n_layer, n_head), -1, dtype=np.int64)
        self._failure: Exception | None = None
        self.stop = threading.Event()
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(llama._lib, name, None)
            if function is None:
                raise SparseMMError(
                    f"this build of llama.cpp does not expose attention weights: it lacks {name}"
                )
            function.restype, function.argtypes = result, arguments
        self._name = llama._lib.ggml_get_name
        self.callback = llama.ggml_backend_sched_eval_callback(self._evaluate)

    def take(self) -> npt.NDArray[np.int64]:
        """The positions that the last token of the last llama_decode attended to most: [n_layer, n_head].

        Raises:
            SparseMMError: llama.cpp did not compute the weights of every layer since the last call.
        """
        found = self._found.copy()
        self._found[:] = -1
        if self._failure is not None:
            raise SparseMMError(f"llama.cpp's attention weights cannot be read: {self._failure}")
        if (found < 0).any():
            layer = int(np.argwhere(found < 0)[0, 0])
            raise SparseMMError(f"llama.cpp computed no attention weights in layer {layer}")
        return found

    def _evaluate(self, tensor: int, ask: bool, _: Any) -> bool:
        """Called before each node of the graph, and after requested ones; False then stops it."""
        name = self._name(tensor)
        if not name.startswith(_WEIGHTS):
            return not ask
        if not ask:
            if self.stop.is_set():
                return False
            try:
                self._found[int(name[len(_WEIGHTS) :])] = self._strongest(tensor)
            except Exception as error:  # nothing can be raised through C
                self._failure = error
                return False
        return True

    def _strongest(self, tensor: int) -> npt.NDArray[np.intp]:
        """The largest of the last token's weights, for each head: [n_head] positions.

        Args:
            tensor: ggml_tensor pointer, [n_kv, n_tokens, n_head] as ggml orders dimensions.
        """
        n_rows = llama._lib.ggml_nrows(tensor)
        n_kv, n_tokens = llama._lib.ggml_nelements(tensor) // n_rows, n_rows // self._n_head
        rows = np.empty((self._n_head, n_kv), dtype=np.float32)
        if n_tokens == 1:
            llama._lib.ggml_backend_tensor_get(tensor, rows.ctypes.data, 0, rows.nbytes)
            return rows.argmax(axis=1)
        size = n_kv * _N_BYTES
        for head in range(self._n_head):
            last = (head + 1) * n_tokens - 1
            llama._lib.ggml_backend_tensor_get(tensor, rows[head].ctypes.data, last * size, size)
        return rows.argmax(axis=1)
