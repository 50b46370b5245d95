"""Compute what a KV cache will allocate.

The full cache is llama.cpp's: every layer has rows for the whole context. For the evicting cache this repeats
the rules of llama-kv-cache-heads.cpp (patches/): how KV heads are grouped by length, how rows are padded, how
room for appended tokens grows. tests/cli/test_fit.py compares both with real allocations.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from sparsemm_edge.gguf_metadata import ModelShape

_CELLS_PAD = 256  # cells of a context
_ALIGNMENT = 32  # bytes, of the tensors in one buffer

# the constants of llama-kv-cache-heads.cpp
_N_ROOM = 48
_N_ROOM_DENSE = 256
_N_SLOTS_PAD = 16
_N_GROUPS_MAX = 8
_N_PAD_FRACTION = 12


@dataclass(frozen=True)
class KVBytes:
    """Bytes of K and V together.

    Attributes:
        now: allocated after the prompt and the reply.
        peak: the largest allocation.
    """

    now: int
    peak: int


def row_bytes(cache_type: str, n: int) -> int:
    """Bytes of n numbers of a cache type (f16, q8_0, ...)."""
    block, n_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[cache_type.upper()]]
    return n // block * n_bytes


def full_cache(shape: ModelShape, n_ctx: int, type_k: str = "f16", type_v: str = "f16") -> KVBytes:
    """The cache of a context without eviction: allocated at once, for all of n_ctx."""
    allocated = _cells(shape, _pad(n_ctx, _CELLS_PAD), type_k, type_v)
    return KVBytes(allocated, allocated)


def evicting_cache(
    shape: ModelShape,
    head_budgets: npt.NDArray[np.integer[Any]],
    *,
    n_prompt: int,
    n_reply: int,
    n_ctx: int,
    max_tail: int | None = None,
    type_k: str = "f16",
    type_v: str = "f16",
) -> KVBytes:
    """The cache of a context that evicts.

    Args:
        shape: the model's.
        head_budgets: [n_layer, n_head_kv] positions that a KV head keeps, window included.
        n_prompt: positions of the prompt.
        n_reply: tokens decoded after it, one at a time.
        n_ctx: context size in positions.
        max_tail: most generated positions per head; None: no limit.
        type_k, type_v: cache types.
    """
    n_ctx = _pad(n_ctx, _CELLS_PAD)
    row = row_bytes(type_k, shape.n_embd_head_k) + row_bytes(type_v, shape.n_embd_head_v)
    # nothing to evict, now or later: a plain cache that grows
    if max_tail is None and int(head_budgets.min()) >= n_prompt:
        rows, peak = np.zeros(shape.n_layer, dtype=np.int64), 0
        for n in range(n_prompt, n_prompt + n_reply + 1):
            if n > rows[0] // shape.n_head_kv:
                slots = min(_pad(n, _N_ROOM_DENSE), max(n, n_ctx))
                grown = np.full_like(rows, shape.n_head_kv * _pad(slots, _N_SLOTS_PAD))
                rows, peak = grown, max(peak, row * _growing(rows, grown))
        return KVBytes(row * int(rows.sum()), peak)

    # one more than the bound: what a token replaces is there until the next one comes
    n_tail = n_reply if max_tail is None else min(n_reply, max_tail + 1)
    kept = np.minimum(head_budgets, n_prompt).astype(np.int64)
    groups = [_groups(layer) for layer in kept]
    room = _room(0, max_tail)
    rows = _store_rows(groups, room)
    # a layer of the prompt, and what all layers keep
    peak = row * (shape.n_head_kv * _pad(n_prompt, _N_SLOTS_PAD) + int(rows.sum()))
    while room < n_tail:  # appending token room + 1 finds no room left
        room = _room(room + 1, max_tail)
        grown = _store_rows(groups, room)
        rows, peak = grown, max(peak, row * _growing(rows, grown))
    return KVBytes(row * int(rows.sum()), peak)


def _growing(rows: npt.NDArray[np.int64], grown: npt.NDArray[np.int64]) -> int:
    """The largest number of rows while layers are copied to larger ones, one by one; both are [n_layer]."""
    return int(max(grown[: il + 1].sum() + rows[il:].sum() for il in range(len(rows))))


def _room(n_tokens: int, max_tail: int | None) -> int:
    """Appended tokens that a store has room for when it is created, or grown, for n_tokens."""
    room = n_tokens + _N_ROOM
    return room if max_tail is None else min(room, max_tail + 1)


def _groups(kept: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """One layer's KV heads in groups of similar length: (heads, longest of them) of each group.

    The cheapest split of the sorted lengths into g groups, for the smallest g whose padding is little.
    """
    lengths = np.sort(kept)[::-1]
    n = len(lengths)
    least = int(lengths.sum())
    cost = np.full(n + 1, np.inf)  # cost[i]: rows for the first i heads
    cost[0] = 0
    # starts[g][i]: where the last of g + 1 groups over the first i heads begins
    starts: list[npt.NDArray[np.int64]] = []
    while len(starts) < min(n, _N_GROUPS_MAX):
        g = len(starts)
        following, start = np.full(n + 1, np.inf), np.zeros(n + 1, dtype=np.int64)
        for i in range(g + 1, n + 1):
            first = np.arange(g, i)
            rows = cost[first] + (i - first) * lengths[first]
            start[i] = first[int(rows.argmin())]
            following[i] = rows.min()
        cost = following
        starts.append(start)
        if cost[n] <= least + least // _N_PAD_FRACTION:
            break
    groups, end = [], n
    for start in reversed(starts):
        begin = int(start[end])
        groups.append((end - begin, int(lengths[begin])))
        end = begin
    return groups


def _store_rows(groups: list[list[tuple[int, int]]], room: int) -> npt.NDArray[np.int64]:
    """Rows of each layer with room for this many appended tokens in every head: [n_layer]."""
    return np.array(
        [sum(heads * _pad(longest + room, _N_SLOTS_PAD) for heads, longest in layer) for layer in groups]
    )


def _cells(shape: ModelShape, n_cells: int, type_k: str, type_v: str) -> int:
    """Bytes of the K and V tensors of all layers, with a row of all KV heads in each cell."""
    sizes = (
        n_cells * row_bytes(kind, n_embd * shape.n_head_kv)
        for kind, n_embd in ((type_k, shape.n_embd_head_k), (type_v, shape.n_embd_head_v))
    )
    return shape.n_layer * sum(_pad(size, _ALIGNMENT) for size in sizes)


def _pad(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
