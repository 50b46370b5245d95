"""llama.cpp through llama-cpp-python: check for the patches, call their functions, collect error lines."""

import ctypes
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsemm_edge.budgets import VOTES
from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.files import fingerprint
from sparsemm_edge.runtime.eviction import HeadBudgetTable

try:
    import llama_cpp.llama_cpp as llama
    import llama_cpp.mtmd_cpp as mtmd
except (ImportError, OSError, RuntimeError) as error:
    raise SparseMMError(
        f"llama-cpp-python cannot be loaded ({error});"
        " build the patched one with: python scripts/build_llama_cpp_python.py install"
    ) from error

_LOG_ERROR, _LOG_CONTINUED = 4, 5  # ggml_log_level

_BUFFER_SIZE = re.compile(r"(\w+):\s+(\S+)\s+(model|compute) buffer size\s*=\s*([0-9.]+) MiB")
_VISION = "reserve_compute_meta"  # the function that logs the compute buffer of the image encoder


@cache
def build() -> str:
    """Tells this build of llama.cpp from others: what another one computed may differ."""
    return "+".join(fingerprint(Path(shared._name)) for shared in (llama._lib, mtmd._libmtmd))


class HeadsStats(ctypes.Structure):
    """struct llama_kv_heads_stats: what an evicting cache holds (bytes, positions)."""

    _fields_ = [
        ("size_k", ctypes.c_uint64),  # bytes allocated for K now
        ("size_v", ctypes.c_uint64),
        ("size_k_peak", ctypes.c_uint64),  # K part of the moment when K+V was largest
        ("size_v_peak", ctypes.c_uint64),
        ("size_full", ctypes.c_uint64),  # bytes that the same positions would take unevicted
        ("n_pos", ctypes.c_uint64),  # positions seen by the sequence
        ("n_kept", ctypes.c_uint64),  # sum over layers and KV heads of the positions held
        ("n_evictions", ctypes.c_uint32),
        ("n_layer", ctypes.c_uint32),
        ("n_head_kv", ctypes.c_uint32),
    ]


class HeadParams(ctypes.Structure):
    """struct llama_head_params: how a context evicts."""

    _fields_ = [
        ("enabled", ctypes.c_bool),
        ("head_budgets", ctypes.POINTER(ctypes.c_uint32)),  # [n_layer, n_head_kv]
        ("n_head_budgets", ctypes.c_size_t),
        ("n_window", ctypes.c_uint32),
        ("n_pool", ctypes.c_uint32),
        ("vote", ctypes.c_int),  # enum llama_head_vote
        ("residual", ctypes.c_bool),
        ("n_tail", ctypes.c_uint32),  # 0: no bound
    ]


class ContextSizes(ctypes.Structure):
    """struct llama_context_sizes: bytes that a context takes besides the model."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "kv",  # K and V after the last token
            "kv_peak",  # K and V when they are largest
            "idxs",  # which tokens the KV heads hold
            "hidden",  # hidden states and queries of a prompt, while it is read layer by layer
            "compute",  # compute buffers of a prompt
            "compute_token",  # compute buffers of a single token
            "output",  # logits and embeddings
            "peak",  # all of it when it is largest
        )
    ]


_INT32, _POINTER, _UINT32 = ctypes.c_int32, ctypes.c_void_p, ctypes.c_uint32
_FLOATS = ctypes.POINTER(ctypes.c_float)

# name: (result, arguments), as the patch series declares them in llama.h
_PATCH_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_model_head_params": (HeadParams, [_POINTER]),
    "llama_init_from_model_heads": (_POINTER, [_POINTER, llama.llama_context_params, HeadParams]),
    "llama_get_context_sizes": (ContextSizes, [_POINTER, _UINT32, _UINT32]),
    "llama_memory_heads_stats": (ctypes.c_bool, [_POINTER, ctypes.POINTER(HeadsStats)]),
    "llama_memory_heads_positions": (_INT32, [_POINTER, _INT32, _INT32, ctypes.POINTER(_INT32), _INT32]),
    "llama_memory_heads_residual": (_INT32, [_POINTER, _INT32, _INT32, _FLOATS, _FLOATS]),
    "llama_memory_heads_truncate": (ctypes.c_bool, [_POINTER, _INT32]),
    "llama_attn_strongest_eval": (ctypes.c_bool, [_POINTER, ctypes.c_bool, _POINTER]),
}

# the same in mtmd.h
_PATCH_FUNCTIONS_MTMD: dict[str, tuple[Any, list[Any]]] = {"mtmd_free_compute": (None, [_POINTER])}


def require_patched() -> None:
    """Raise SparseMMError, naming the build command, unless llama.cpp has this project's patches."""
    found = [(llama._lib, name, types) for name, types in _PATCH_FUNCTIONS.items()]
    found += [(mtmd._libmtmd, name, types) for name, types in _PATCH_FUNCTIONS_MTMD.items()]
    for shared, name, (result, arguments) in found:
        function = getattr(shared, name, None)
        if function is None:
            import llama_cpp

            raise SparseMMError(
                f"llama-cpp-python {llama_cpp.__version__} is not the patched one (it has no {name});"
                " build and install it with: python scripts/build_llama_cpp_python.py install"
            )
        function.restype, function.argtypes = result, arguments


def head_params(table: HeadBudgetTable | None) -> HeadParams:
    """The parameters of llama_init_from_model_heads for a table; None: no eviction."""
    if table is None:
        return HeadParams()
    budgets = np.ascontiguousarray(table.head_budgets, dtype=np.uint32)
    return HeadParams(
        enabled=True,
        head_budgets=budgets.ctypes.data_as(ctypes.POINTER(ctypes.c_uint32)),
        n_head_budgets=budgets.size,
        n_window=table.window,
        n_pool=table.pool_kernel,
        vote=VOTES[table.vote],
        residual=table.residual,
        n_tail=table.max_tail or 0,
    )


def new_context(model: int, params: Any, table: HeadBudgetTable | None) -> int:
    """Create a context that evicts by a table, whatever the GGUF file says; None: no eviction.

    Args:
        model: llama_model pointer.
        params: llama_context_params.
        table: what it evicts by.

    Returns:
        llama_context pointer.

    Raises:
        SparseMMError: llama.cpp refuses.
    """
    forget_errors()
    context = llama._lib.llama_init_from_model_heads(model, params, head_params(table))
    if not context:
        raise failure("llama.cpp cannot make a context")
    return int(context)


def context_sizes(context: int, n_prompt: int, n_predict: int) -> ContextSizes:
    """What a new context takes for a prompt and as many tokens more, one at a time. Nothing is computed.

    Args:
        context: llama_context pointer; of a model without data (no_alloc) it allocates nothing.
        n_prompt: tokens of the prompt.
        n_predict: tokens after it.
    """
    sizes: ContextSizes = llama._lib.llama_get_context_sizes(context, n_prompt, n_predict)
    return sizes


def free_compute(vision: int) -> None:
    """Free the compute buffers of an image encoder, an mtmd_context pointer, until it encodes again."""
    mtmd._libmtmd.mtmd_free_compute(vision)


def heads_stats(memory: int) -> HeadsStats | None:
    """Statistics of an evicting cache; None for other caches."""
    stats = HeadsStats()
    found = llama._lib.llama_memory_heads_stats(memory, ctypes.byref(stats))
    return stats if found else None


def heads_positions(memory: int, layer: int, head_kv: int) -> npt.NDArray[np.int32]:
    """The positions that one KV head holds, ascending: [n] indices of tokens in the sequence.

    Raises:
        SparseMMError: not an evicting cache, or no such layer or head.
    """
    function = llama._lib.llama_memory_heads_positions
    n = function(memory, layer, head_kv, None, 0)
    if n < 0:
        raise SparseMMError(f"no evicting cache, or no KV head {head_kv} in layer {layer}")
    positions = np.empty(n, dtype=np.int32)
    function(memory, layer, head_kv, positions.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)), n)
    return positions


def heads_n_lost(memory: int, layer: int, head_kv: int) -> int:
    """The number of positions that one KV head's residual slot summarises; 0 without a slot.

    Raises:
        SparseMMError: not an evicting cache, or no such layer or head.
    """
    n = int(llama._lib.llama_memory_heads_residual(memory, layer, head_kv, None, None))
    if n < 0:
        raise SparseMMError(f"no evicting cache, or no KV head {head_kv} in layer {layer}")
    return n


def heads_truncate(memory: int, n_tokens: int) -> bool:
    """Drop the end of an evicted sequence, at most its observation window.

    Args:
        memory: llama_memory pointer.
        n_tokens: the tokens that the sequence has then.

    Returns:
        False, and nothing dropped, if some head no longer holds all of that end.
    """
    return bool(llama._lib.llama_memory_heads_truncate(memory, n_tokens))


@dataclass(frozen=True)
class Buffer:
    """A buffer that llama.cpp logged when it made it.

    Attributes:
        backend: where it is: CPU, CPU_Mapped (the model file), CPU_REPACK, Metal, ...
        content: model, or vision (the compute buffer of the image encoder).
        n_bytes: its size, as logged: to 0.01 MiB.
    """

    backend: str
    content: str
    n_bytes: int


class _Log:
    """Receives llama.cpp's log: keeps error lines for messages, and prints everything if asked to."""

    def __init__(self) -> None:
        self.show = False
        self.errors: list[str] = []
        self.buffers: list[Buffer] = []
        self._level = 0
        # the C side keeps a pointer to it: it must live as long as this
        self._callback = llama.llama_log_callback(self._take)

    def install(self) -> None:
        llama.llama_log_set(self._callback, None)
        mtmd.mtmd_helper_log_set(self._callback, None)

    def _take(self, level: int, text: bytes, _: Any) -> None:
        line = text.decode("utf-8", "replace")
        if level == _LOG_CONTINUED:
            level = self._level
        elif level == _LOG_ERROR:
            self.errors.append("")
        self._level = level
        if level == _LOG_ERROR and self.errors:
            self.errors[-1] += line
        elif found := _BUFFER_SIZE.search(line):
            content = "vision" if found[1] == _VISION else found[3]
            if content != "compute":
                self.buffers.append(Buffer(found[2], content, round(float(found[4]) * 2**20)))
        if self.show:
            sys.stderr.write(line)


_log = _Log()


def start(show_log: bool) -> None:
    """Redirect llama.cpp's log and initialise llama.cpp; may be called again."""
    _log.show = show_log
    _log.install()
    _return_freed_blocks()
    llama.llama_backend_init()


_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_MMAP_THRESHOLD = 2**20


@cache
def _return_freed_blocks() -> None:
    """Let glibc give every freed block of a MiB or more back to the system at once.

    By itself it raises this bound, up to 32 MiB, with each block that is freed. Then what a layer of the
    prompt takes lies in the heap, where it stays behind as a hole. Other C libraries have no such function.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)


def failure(what: str) -> SparseMMError:
    """An error that ends with the lines that llama.cpp logged as errors since the last one."""
    lines: list[str] = []
    for text in _log.errors:
        line = " ".join(text.split())
        if line and line not in lines:
            lines.append(line)
    _log.errors.clear()
    return SparseMMError(f"{what}: {'; '.join(lines[:2])}" if lines else what)


def forget_errors() -> None:
    """Discard the error lines so far."""
    _log.errors.clear()


def logged_buffers() -> list[Buffer]:
    """The buffers that llama.cpp made since the last call: the model's and the image encoder's.

    llama.cpp has no function that tells which of them are mapped files.
    """
    buffers, _log.buffers = _log.buffers, []
    return buffers
