"""Saved conversations: one line of JSON with what they fit, then llama.cpp's state."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsemm_edge.runtime.context import SequenceState
from sparsemm_edge.runtime.data_file import DataFile
from sparsemm_edge.runtime.eviction import HeadBudgetTable

_FILE = DataFile(
    "sparsemm-edge/session",
    2,
    "saved conversation",
    (" (generate --save-session writes one)", ": save it again"),
)


@dataclass(frozen=True)
class SavedConversation:
    """A saved conversation.

    Attributes:
        model: files.fingerprint() of the model file; model_name: the file's name, for messages.
        cache_types: of K and V, names in CACHE_TYPES.
        table: eviction parameters; None: no eviction.
        planned: n_prompt and n_later of eviction.plan for the table.
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
    state: SequenceState


def write(path: Path, saved: SavedConversation) -> None:
    """Write a conversation, all of it or nothing.

    Raises:
        SparseMMError: the file cannot be written.
    """
    table = saved.table
    header = {
        "model": saved.model,
        "model_name": saved.model_name,
        "cache_types": saved.cache_types,
        "eviction": table and {**vars(table), "head_budgets": table.head_budgets.tolist()},
        "planned": saved.planned,
        "n_ubatch": saved.n_ubatch,
        "pending": saved.pending,
        "n_past": saved.state.n_past,
        "n_tokens": saved.state.n_tokens,
    }
    _FILE.write(path, header, saved.state.data)


def read(path: Path) -> SavedConversation:
    """Read what write() wrote.

    Raises:
        SparseMMError: the file cannot be read, is of another kind, or is damaged.
    """
    header, data = _FILE.read(path)

    def field(key: str, convert: Callable[[Any], Any]) -> Any:
        try:
            return convert(header[key])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise _FILE.damaged(path, f"{key!r} in its first line is missing or has a wrong value") from error

    return SavedConversation(
        model=field("model", str),
        model_name=field("model_name", str),
        cache_types=field("cache_types", _cache_types),
        table=field("eviction", _table),
        planned=field("planned", _planned),
        n_ubatch=field("n_ubatch", _positive),
        pending=field("pending", lambda tokens: tuple(map(_natural, tokens))),
        state=SequenceState(field("n_past", _natural), field("n_tokens", _natural), data),
    )


def _natural(value: Any, least: int = 0) -> int:
    if not isinstance(value, int) or not least <= value <= 2**31 - 1:
        raise ValueError(f"expected a whole number from {least}, found {value!r}")
    return value


def _positive(value: Any) -> int:
    return _natural(value, 1)


def _cache_types(value: Any) -> tuple[str, str]:
    type_k, type_v = map(str, value)
    return type_k, type_v


def _planned(value: Any) -> tuple[int, int | None]:
    n_prompt, n_later = value
    return _natural(n_prompt), None if n_later is None else _natural(n_later)


def _table(value: Any) -> HeadBudgetTable | None:
    if value is None:
        return None
    return HeadBudgetTable(
        np.array(value["head_budgets"], dtype=np.uint32),
        _positive(value["window"]),
        _positive(value["pool_kernel"]),
        None if value["max_tail"] is None else _positive(value["max_tail"]),
        str(value["vote"]),
        bool(value["residual"]),
    )
