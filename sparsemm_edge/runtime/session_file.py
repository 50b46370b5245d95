"""A conversation in a file: one line of JSON that says what it fits, then llama.cpp's state."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.files import atomic_path
from sparsemm_edge.runtime.eviction import HeadBudgetTable
from sparsemm_edge.runtime.session import SessionState

_FORMAT, _VERSION = "sparsemm-edge/session", 2
_MAX_HEADER = 2**24  # bytes: the head budgets of the largest models take a tenth of a percent of it


@dataclass(frozen=True)
class SavedConversation:
    """What it takes to go on with a conversation.

    Attributes:
        model: files.fingerprint() of the model file; model_name: the file's name, for messages.
        cache_types: of K and V, names in CACHE_TYPES.
        table: what the cache evicts by; None: nothing.
        planned: what the table was planned for: n_prompt and n_later of eviction.plan.
        n_ubatch: prompt tokens computed at a time.
        pending: tokens that were generated but are not in the cache yet.
        state: the sequence.
    """

    model: str
    model_name: str
    cache_types: tuple[str, str]
    table: HeadBudgetTable | None
    planned: tuple[int, int | None]
    n_ubatch: int
    pending: tuple[int, ...]
    state: SessionState


def write(path: Path, saved: SavedConversation) -> None:
    """Write a conversation, all of it or nothing.

    Raises:
        SparseMMError: the file cannot be written.
    """
    table = saved.table
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "model": saved.model,
        "model_name": saved.model_name,
        "cache_types": saved.cache_types,
        "eviction": None
        if table is None
        else {
            "head_budgets": table.head_budgets.tolist(),
            "window": table.window,
            "pool_kernel": table.pool_kernel,
            "max_tail": table.max_tail,
            "vote": table.vote,
            "residual": table.residual,
        },
        "planned": saved.planned,
        "n_ubatch": saved.n_ubatch,
        "pending": saved.pending,
        "n_past": saved.state.n_past,
        "n_tokens": saved.state.n_tokens,
        "n_bytes": len(saved.state.data),
        "sha256": hashlib.sha256(saved.state.data.data).hexdigest(),
    }
    with atomic_path(path) as part, part.open("wb") as file:
        file.write(json.dumps(header).encode() + b"\n")
        file.write(saved.state.data.data)


def read(path: Path) -> SavedConversation:
    """Read what write() wrote.

    Raises:
        SparseMMError: the file cannot be read, is of another kind, or is damaged.
    """
    try:
        with path.open("rb") as file:
            line = file.readline(_MAX_HEADER)
            data = np.frombuffer(file.read(), dtype=np.uint8).copy()
    except OSError as error:
        raise SparseMMError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        header = json.loads(line)
        kind, version = header["format"], header["version"]
    except (ValueError, TypeError, KeyError, RecursionError):
        kind = version = None
    if kind != _FORMAT:
        raise SparseMMError(f"{path}: not a saved conversation (generate --save-session writes one)")
    if version != _VERSION:
        raise SparseMMError(f"{path}: a saved conversation of version {version!r}, this reads {_VERSION}")
    try:
        intact = len(data) == header["n_bytes"] and hashlib.sha256(data).hexdigest() == header["sha256"]
        saved = _saved(header, data)
    except (KeyError, TypeError, ValueError, OverflowError):
        intact = False
    if not intact:
        raise SparseMMError(f"{path}: the saved conversation is damaged: save it again")
    return saved


def _saved(header: dict[str, Any], data: Any) -> SavedConversation:
    def number(value: Any, least: int = 0) -> int:
        if not isinstance(value, int) or not least <= value <= 2**31 - 1:
            raise ValueError(f"{value!r} is no number that was saved")
        return value

    table = None
    if (wanted := header["eviction"]) is not None:
        max_tail = wanted["max_tail"]
        table = HeadBudgetTable(
            np.array(wanted["head_budgets"], dtype=np.uint32),
            number(wanted["window"], 1),
            number(wanted["pool_kernel"], 1),
            None if max_tail is None else number(max_tail, 1),
            str(wanted["vote"]),
            bool(wanted["residual"]),
        )
    type_k, type_v = map(str, header["cache_types"])
    n_prompt, n_later = header["planned"]
    return SavedConversation(
        model=str(header["model"]),
        model_name=str(header["model_name"]),
        cache_types=(type_k, type_v),
        table=table,
        planned=(number(n_prompt), None if n_later is None else number(n_later)),
        n_ubatch=number(header["n_ubatch"], 1),
        pending=tuple(map(number, header["pending"])),
        state=SessionState(number(header["n_past"]), number(header["n_tokens"]), data),
    )
