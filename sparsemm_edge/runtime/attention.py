"""The position that each query head attends to most, read from llama.cpp's graph while it runs.

Without flash attention llama.cpp's graph holds the attention weights of each layer as a node of its own. The
evaluation callback that reads them is the patch series' (llama-attn-strongest.cpp): one of Python's would be
asked about every node of the graph.
"""

import ctypes
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.runtime import library
from sparsemm_edge.runtime.library import llama


class _Strongest(ctypes.Structure):
    """struct llama_attn_strongest."""

    _fields_ = [
        ("n_layer", ctypes.c_int32),
        ("n_head", ctypes.c_int32),
        ("pos", ctypes.c_void_p),  # int32 [n_layer, n_head]
        ("stop", ctypes.c_bool),
    ]


class StrongestPositions:
    """Records the strongest positions of one context, which it must outlive.

    The context needs flash attention off, no eviction, and one sequence.

    Attributes:
        callback, user_data: the context parameters `cb_eval` and `cb_eval_user_data`.
    """

    def __init__(self, n_layer: int, n_head: int, layers: Sequence[int]) -> None:
        """Args:
            n_layer, n_head: all layers of the model, and query heads of each.
            layers: the numbers of the layers to record, ascending.

        Raises:
            SparseMMError: llama-cpp-python without the patches.
        """
        library.require_patched()
        self._layers = list(layers)
        self._found = np.full((n_layer, n_head), -1, dtype=np.int32)
        self._state = _Strongest(n_layer, n_head, self._found.ctypes.data, False)
        self.callback = ctypes.cast(
            llama._lib.llama_attn_strongest_eval, llama.ggml_backend_sched_eval_callback
        )
        self.user_data = ctypes.addressof(self._state)

    @property
    def stopped(self) -> bool:
        """Set it, from another thread, to end a computation at its next layer, and all that follow."""
        return bool(self._state.stop)

    @stopped.setter
    def stopped(self, wanted: bool) -> None:
        self._state.stop = wanted

    def take(self) -> npt.NDArray[np.int64]:
        """The positions that the last token of the last llama_decode attended to most: [layers, n_head].

        Raises:
            SparseMMError: llama.cpp did not compute the weights of every layer since the last call.
        """
        found = self._found[self._layers].astype(np.int64)
        self._found[:] = -1
        if (found < 0).any():
            layer = self._layers[int(np.argwhere(found < 0)[0, 0])]
            raise SparseMMError(f"llama.cpp computed no attention weights in layer {layer}")
        return found
