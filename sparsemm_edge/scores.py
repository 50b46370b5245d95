"""Head scores: how much each query head of a model looks at the image region being read.

Source: SparseMM (arXiv 2506.05344), section 3.1. A score is the mean over pages of the target response;
only the ratios between heads matter.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.files import atomic_path, decode_text, parse_json, read_bytes

FORMAT = "sparsemm-edge/head-scores"
VERSION = 1

_REFERENCE_KEY = re.compile(r"(\d+)-(\d+)")
_OWN_KEYS = ("format", "version", "model", "n_layer", "n_head", "n_head_kv", "scores")


def group_scores(scores: npt.NDArray[np.floating[Any]], n_head_kv: int) -> npt.NDArray[np.float64]:
    """Sum query-head scores over each GQA group and normalise.

    Args:
        scores: [n_layer, n_head], not negative, not all zero. Query heads of one KV head are neighbours.
        n_head_kv: KV heads per layer, a divisor of n_head.

    Returns:
        [n_layer, n_head_kv], sum 1.
    """
    n_layer, n_head = scores.shape
    if n_head_kv < 1 or n_head % n_head_kv:
        raise SparseMMError(f"{n_head} query heads cannot be divided among {n_head_kv} KV heads")
    grouped = scores.astype(np.float64).reshape(n_layer, n_head_kv, n_head // n_head_kv).sum(axis=2)
    return grouped / grouped.sum()


@dataclass(frozen=True)
class HeadScores:
    """The scores of all query heads of one model.

    Attributes:
        model: the scored model's name.
        scores: [n_layer, n_head], raw: mean target response over the pages.
        n_head_kv: KV heads per layer of the scored model; None if the file does not say.
        provenance: the file's other entries (`dataset`, `n_pages`, `n_tokens_scored`, ...).
        source: the file they came from, "" if none yet.
        sha256: of that file's bytes, "" if none yet.

    Raises:
        SparseMMError: the scores are not a table, hold NaN, infinite or negative values, or are all zero.
    """

    model: str
    scores: npt.NDArray[np.float64]
    n_head_kv: int | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    sha256: str = ""

    def __post_init__(self) -> None:
        where = self.source or f"head scores of {self.model}"
        if self.scores.ndim != 2 or not self.scores.size:
            raise SparseMMError(f"{where}: expected a table of layers x heads, found {self.scores.shape}")
        for what, bad in (("not finite", ~np.isfinite(self.scores)), ("negative", self.scores < 0)):
            if bad.any():
                layer, head = np.argwhere(bad)[0]
                value = self.scores[layer, head]
                raise SparseMMError(f"{where}: the score of layer {layer}, head {head} is {what} ({value})")
        if not self.scores.any():
            raise SparseMMError(f"{where}: all scores are zero, so no head can be told from another")
        if self.n_head_kv is not None and (self.n_head_kv < 1 or self.n_head % self.n_head_kv):
            raise SparseMMError(f"{where}: n_head_kv is {self.n_head_kv}, no divisor of n_head {self.n_head}")

    @property
    def n_layer(self) -> int:
        return int(self.scores.shape[0])

    @property
    def n_head(self) -> int:
        return int(self.scores.shape[1])

    def normalised(self) -> npt.NDArray[np.float64]:
        """The scores divided by their sum: [n_layer, n_head], sum 1."""
        return self.scores / self.scores.sum()

    def check_fits(self, n_layer: int, n_head: int, n_head_kv: int | None = None) -> None:
        """Raise SparseMMError, naming both shapes, unless the scores are those of a model of this shape."""
        kv_differs = None not in (self.n_head_kv, n_head_kv) and self.n_head_kv != n_head_kv
        if (self.n_layer, self.n_head) != (n_layer, n_head) or kv_differs:
            raise SparseMMError(
                f"{self.source or self.model}: the scores do not fit the model: they are for"
                f" {_shape(self.n_layer, self.n_head, self.n_head_kv)},"
                f" the model has {_shape(n_layer, n_head, n_head_kv)}"
            )

    def label(self) -> str:
        """Where the scores come from, in one line: model, data set and the file's checksum."""
        return f"{self.model}; data set {self.provenance.get('dataset', 'unknown')}; sha256 {self.sha256}"

    def save(self, path: Path) -> None:
        """Write the project's own format (version 1)."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "n_layer": self.n_layer,
            "n_head": self.n_head,
            "n_head_kv": self.n_head_kv,
            **self.provenance,
            "scores": self.scores.tolist(),
        }
        with atomic_path(path) as part:
            part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "HeadScores":
        """Read the project's own format or the reference's `{"layer-head": [score per page, ...]}`.

        Raises:
            SparseMMError: naming the file and what is wrong with it.
        """
        data = read_bytes(path)
        content = parse_json(decode_text(data, str(path)), str(path))
        if not isinstance(content, dict):
            raise SparseMMError(f"{path}: expected a JSON object, found {type(content).__name__}")
        if "format" in content:
            found = _own(content, str(path))
        elif any(_REFERENCE_KEY.fullmatch(key) for key in content):
            found = _reference(content, path)
        else:
            raise SparseMMError(
                f'{path}: no head scores: expected "format": "{FORMAT}", or the reference\'s'
                ' "layer-head" keys'
            )
        return cls(*found, source=str(path), sha256=hashlib.sha256(data).hexdigest())


_Parsed = tuple[str, npt.NDArray[np.float64], int | None, dict[str, Any]]
"""The first four attributes of HeadScores, from a file's content."""


def _own(content: dict[str, Any], where: str) -> _Parsed:
    if content["format"] != FORMAT:
        raise SparseMMError(f'{where}: format is {content["format"]!r}, expected "{FORMAT}"')
    if content.get("version") != VERSION:
        raise SparseMMError(
            f"{where}: format version {content.get('version')!r}, this program reads version {VERSION}"
        )
    missing = [key for key in _OWN_KEYS if key not in content]
    if missing:
        raise SparseMMError(f"{where}: {missing[0]} is missing")
    if not isinstance(content["model"], str):
        raise SparseMMError(f"{where}: model is {content['model']!r}, expected a name")
    for key in ("n_layer", "n_head", "n_head_kv"):
        if type(content[key]) is not int and (key, content[key]) != ("n_head_kv", None):
            raise SparseMMError(f"{where}: {key} is {content[key]!r}, expected a whole number")
    rows = content["scores"]
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise SparseMMError(f"{where}: scores must be a list of n_layer lists of n_head numbers")
    scores = _table(rows, where)
    if scores.shape != (content["n_layer"], content["n_head"]):
        raise SparseMMError(
            f"{where}: n_layer x n_head is {content['n_layer']} x {content['n_head']},"
            f" but scores are {scores.shape[0]} x {scores.shape[1]}"
        )
    _check_provenance(content, where)
    provenance = {key: value for key, value in content.items() if key not in _OWN_KEYS}
    return content["model"], scores, content["n_head_kv"], provenance


def _reference(content: dict[str, Any], path: Path) -> _Parsed:
    pages: dict[tuple[int, int], Any] = {}
    for key, value in content.items():
        if not (match := _REFERENCE_KEY.fullmatch(key)):
            raise SparseMMError(f'{path}: key {key!r} is not of the form "layer-head"')
        pages[int(match[1]), int(match[2])] = value
    n_layer, n_head = (1 + max(numbers) for numbers in zip(*pages, strict=True))
    if len(pages) != n_layer * n_head:
        layer, head = next((il, ih) for il in range(n_layer) for ih in range(n_head) if (il, ih) not in pages)
        raise SparseMMError(f"{path}: head {layer}-{head} of {n_layer} x {n_head} is missing")
    heads = [pages[il, ih] for il in range(n_layer) for ih in range(n_head)]
    if not all(isinstance(head, list) and head for head in heads):
        raise SparseMMError(f"{path}: every head needs a list of scores, one for each page")
    table = _table(heads, str(path))
    model = path.name.removesuffix(".json").removesuffix(".head-scores")
    return model, table.mean(axis=1).reshape(n_layer, n_head), None, {"n_pages": table.shape[1]}


def _check_provenance(content: dict[str, Any], where: str) -> None:
    """Raise SparseMMError unless what `scores show` reads of a file's other entries can be shown."""
    for key in ("character_accuracy", "things_named"):
        if type(content.get(key, 0)) not in (int, float):
            raise SparseMMError(f"{where}: {key} is {content[key]!r}, expected a number")
    steps = content.get("convergence", [])
    for step in steps if isinstance(steps, list) else [steps]:
        figures = step if isinstance(step, dict) else {}
        if any(type(figures.get(key)) not in (int, float) for key in ("n_pages", "spearman", "top_overlap")):
            raise SparseMMError(
                f"{where}: convergence holds {step!r}, expected n_pages, spearman and top_overlap"
            )


def _shape(n_layer: int, n_head: int, n_head_kv: int | None) -> str:
    kv = "" if n_head_kv is None else f" ({n_head_kv} KV heads)"
    return f"{n_layer} layers x {n_head} heads{kv}"


def _table(rows: list[list[Any]], where: str) -> npt.NDArray[np.float64]:
    """Rows of numbers of one length as an array, or a SparseMMError."""
    for row in rows:
        for value in row:
            if type(value) not in (int, float):
                raise SparseMMError(f"{where}: {value!r} where a score was expected")
        if len(row) != len(rows[0]):
            raise SparseMMError(f"{where}: rows of {len(rows[0])} and {len(row)} scores in one table")
    try:
        return np.array(rows, dtype=np.float64).reshape(len(rows), len(rows[0]) if rows else 0)
    except OverflowError as error:
        raise SparseMMError(f"{where}: a score is too large for a number") from error
