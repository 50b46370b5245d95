"""Score a model on many pages, in one or more processes, saving progress."""

import functools
import json
import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from sparsemm_edge import __version__
from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.files import atomic_path, read_json
from sparsemm_edge.pages.readers import PageSource, open_pages
from sparsemm_edge.pages.scenes import Scene
from sparsemm_edge.ranking import convergence
from sparsemm_edge.scores import HeadScores
from sparsemm_edge.scoring.sources import Source
from sparsemm_edge.scoring.target_response import score_page
from sparsemm_edge.workers import map_processes

SAVE_EVERY = 30.0  # seconds between two saves

_MOST_HEADS = 1000  # of a layer, and layers, that an unfinished run is believed to have

ACCURACIES = {"reading": "character_accuracy", "scenes": "things_named"}
"""What scores call the accuracy of the answers, by the kind of the pages."""

FEW_TOKENS = 1000
"""Scored tokens below which a ranking is called unsettled (scores/README.md: how that was found)."""

_FIRST_CHECK, _CHECK_EVERY = 20, 10  # pages


@dataclass(frozen=True)
class ScoringJob:
    """Everything that the scores depend on.

    Attributes:
        source: the model.
        data, n_pages, seed, size: as `open_pages` takes them.
        question: asked about each page; None: the page source's question.
        max_new_tokens: most tokens of an answer; None: a little more than the page's text.
        until: stop at this rank correlation between halves of the pages so far; above 1: never.
    """

    source: Source
    data: str
    n_pages: int
    seed: int
    size: tuple[int, int]
    question: str | None
    max_new_tokens: int | None
    until: float = 0.95

    def pages(self) -> PageSource:
        return open_pages(self.data, self.n_pages, seed=self.seed, size=self.size)

    def key(self) -> dict[str, Any]:
        """What must be equal to resume a run."""
        pages = self.pages()
        return self.source.key() | {
            "data": pages.name,
            "question": self.question or pages.prompt,
            "max_new_tokens": self.max_new_tokens,
        }


@dataclass
class ScoringResult:
    """The result of scoring.

    Attributes:
        scores: as saved.
        unread: names of pages whose answer matches nothing on them.
        warnings: reasons to doubt the scores, one line each.
    """

    scores: HeadScores
    unread: list[str]
    warnings: list[str]


def score(
    job: ScoringJob,
    out: Path,
    *,
    n_jobs: int = 1,
    resume: bool = False,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ScoringResult:
    """Score a model's heads and write them to `out`.

    Progress is saved to `<out>.partial`, which is removed at the end. The scores do not depend on the number
    of processes or on interruptions: each page is scored alone, and pages are summed in order, up to the
    first number of pages at which the ranking has converged.

    Args:
        n_jobs: processes, each with the model in its own memory (the i-th takes GPU i if there are several).
        resume: continue from `<out>.partial`.
        force: replace `out` and discard a partial result.
        progress: called with the pages done and their number.

    Raises:
        SparseMMError: the model cannot be scored, the pages cannot be read, or a file exists.
    """
    pages = job.pages()
    partial = out.with_name(out.name + ".partial")
    if out.exists() and not force:
        raise SparseMMError(f"{out} exists: choose another --out, or replace it with --force")
    if not out.absolute().parent.is_dir():
        raise SparseMMError(f"cannot write {out}: there is no directory {out.parent}")
    if not job.until > 0:
        raise SparseMMError(f"a rank correlation of {job.until}: it must be above 0")
    done: dict[int, _Page] = {}
    shape: dict[str, int] = {}
    if resume:
        done, shape = _read_partial(partial, job, pages.n_pages)
    elif partial.exists() and not force:
        raise SparseMMError(
            f"{partial} holds an unfinished run: go on with --resume, or start anew with --force"
        )

    settled = _Settled(job.until, pages.n_pages)
    n_pages = settled.after(done, shape)
    todo = [] if n_pages else [index for index in range(pages.n_pages) if index not in done]
    saved = time.monotonic()
    progress(len(done), pages.n_pages)
    try:
        with closing(_results(job, todo, n_jobs)) as results:
            for index, found, result in results:
                if shape not in ({}, found):
                    raise SparseMMError(
                        f"{partial} was made with a model of another shape: start anew with --force"
                    )
                shape = found
                done[index] = result
                progress(len(done), pages.n_pages)
                if n_pages := settled.after(done, shape):
                    break
                if time.monotonic() - saved > SAVE_EVERY:
                    _write_partial(partial, job, shape, done)
                    saved = time.monotonic()
    except BaseException:  # interrupted, too
        if done:
            _write_partial(partial, job, shape, done)
        raise

    report = _report(job, pages, shape, [done[index] for index in range(n_pages or pages.n_pages)])
    report.scores.save(out)
    partial.unlink(missing_ok=True)
    return report


_Page = dict[str, Any]
"""What is saved of a page, as _score_pages makes it."""

_Result = tuple[int, dict[str, int], _Page]
"""A page's index, the model's shape, and what is saved of the page."""


def _results(job: ScoringJob, todo: list[int], n_jobs: int) -> Generator[_Result, None, None]:
    n_jobs = min(n_jobs, len(todo))
    if n_jobs == 1:
        yield from _score_pages(job, 1, 0, iter(todo))
    else:
        yield from map_processes(functools.partial(_score_pages, job, n_jobs), todo, n_jobs)


def _score_pages(job: ScoringJob, n_jobs: int, rank: int, indices: Iterator[int]) -> Iterator[_Result]:
    """Score pages in process `rank` of n_jobs."""
    pages = job.pages()
    with job.source.reader(rank, n_jobs) as reader:
        shape = {"n_layer": reader.n_layer, "n_head": reader.n_head, "n_head_kv": reader.n_head_kv}
        for index in indices:
            page = pages.page(index)
            question = job.question or (page.question if isinstance(page, Scene) else pages.prompt)
            result = score_page(reader, page, question, job.max_new_tokens)
            saved = {
                "name": page.name,
                "n_tokens": result.n_tokens,
                "n_scored": result.n_scored,
                "accuracy": result.accuracy,
                "scores": [
                    [il, ih, float(result.scores[il, ih])] for il, ih in np.argwhere(result.scores).tolist()
                ],
            }
            yield index, shape, saved


class _Settled:
    """Checks at intervals whether two halves of the pages so far agree on the ranking."""

    def __init__(self, until: float, total: int) -> None:
        self._until = until
        self._next = _FIRST_CHECK
        self._total = total

    def after(self, done: dict[int, _Page], shape: dict[str, int]) -> int | None:
        """The number of pages at which the ranking has converged; None if it has not."""
        while self._until <= 1 and self._next < self._total and all(i in done for i in range(self._next)):
            tables = _tables([done[i] for i in range(self._next)], shape)
            if tables.any() and convergence(tables)[-1]["spearman"] >= self._until:
                return self._next
            self._next += _CHECK_EVERY
        return None


def _tables(done: list[_Page], shape: dict[str, int]) -> npt.NDArray[np.float64]:
    """The scores of each page: [n_pages, n_layer, n_head]."""
    tables = np.zeros((len(done), shape["n_layer"], shape["n_head"]))
    for table, page in zip(tables, done, strict=True):
        for il, ih, value in page["scores"]:
            table[il, ih] = value
    return tables


def _write_partial(path: Path, job: ScoringJob, shape: dict[str, int], done: dict[int, _Page]) -> None:
    content = {"key": job.key(), "shape": shape, "pages": {str(index): done[index] for index in sorted(done)}}
    with atomic_path(path) as part:
        part.write_text(json.dumps(content), encoding="utf-8")


def _read_partial(path: Path, job: ScoringJob, n_pages: int) -> tuple[dict[int, _Page], dict[str, int]]:
    if not path.exists():
        raise SparseMMError(f"nothing to resume: there is no {path}")
    content = read_json(path)
    known = isinstance(content, dict)
    key, shape, pages = (content.get(name) if known else None for name in ("key", "shape", "pages"))
    if not (
        isinstance(key, dict)
        and _is_shape(shape)
        and isinstance(pages, dict)
        and all(index.isdecimal() and len(index) < 10 and _is_page(pages[index], shape) for index in pages)
    ):
        raise SparseMMError(f"{path} is no partial result: start anew with --force")
    for name, value in job.key().items():
        if key.get(name) != value:
            raise SparseMMError(
                f"{path} was made with {name} {key.get(name)!r}, not {value!r}: ask for the same,"
                " or start anew with --force"
            )
    return {int(index): page for index, page in pages.items() if int(index) < n_pages}, shape


def _is_shape(found: Any) -> TypeGuard[dict[str, int]]:
    """Whether this is a model shape as _score_pages makes it."""
    names = ("n_layer", "n_head", "n_head_kv")
    return isinstance(found, dict) and all(_is_within(found.get(name), 1, _MOST_HEADS, int) for name in names)


def _is_page(found: Any, shape: dict[str, int]) -> bool:
    """Whether this is a page's result for a model of this shape."""
    return (
        isinstance(found, dict)
        and isinstance(found.get("name"), str)
        and all(_is_within(found.get(name), 0, 2**31, int) for name in ("n_tokens", "n_scored"))
        and _is_within(found.get("accuracy"), 0, 2**31, int, float)
        and isinstance(found.get("scores"), list)
        and all(isinstance(entry, list) and len(entry) == 3 for entry in found["scores"])
        and all(_is_within(il, 0, shape["n_layer"] - 1, int) for il, _, _ in found["scores"])
        and all(_is_within(ih, 0, shape["n_head"] - 1, int) for _, ih, _ in found["scores"])
        and all(_is_within(value, 0, 2**31, int, float) for _, _, value in found["scores"])
    )


def _is_within(value: Any, low: int, high: int, *kinds: type) -> bool:
    return type(value) in kinds and low <= value <= high  # nor NaN


def _report(job: ScoringJob, pages: PageSource, shape: dict[str, int], done: list[_Page]) -> ScoringResult:
    tables = _tables(done, shape)
    n_scored = sum(page["n_scored"] for page in done)
    measure = ACCURACIES[pages.kind]
    unread = [page["name"] for page in done if not page["n_scored"]]
    accuracy = math.fsum(page["accuracy"] for page in done) / len(done)
    if not n_scored:
        raise SparseMMError(
            f"{job.source.label} named nothing that stands on any of {len(done)} pages"
            f" ({measure.replace('_', ' ')} {accuracy:.1%}): it does not read them; try other pages (--data)"
            " or another --prompt"
        )
    if not tables.any():
        raise SparseMMError(
            f"{job.source.label}: no head looked at what was being read, for {n_scored} tokens on"
            f" {len(done)} pages"
        )
    scores = HeadScores(
        model=job.source.label,
        scores=tables.mean(axis=0),
        n_head_kv=shape["n_head_kv"],
        provenance={
            "kind": pages.kind,
            "dataset": pages.name,
            "prompt": job.question or pages.prompt,
            "n_pages": len(done),
            "n_pages_unread": len(unread),
            "n_tokens": sum(page["n_tokens"] for page in done),
            "n_tokens_scored": n_scored,
            measure: round(accuracy, 4),
            "until": job.until,
            "convergence": convergence(tables),
            "created_by": f"sparsemm-edge {__version__}",
            **job.source.provenance(),
        },
    )
    warnings = []
    if n_scored < FEW_TOKENS:
        warnings.append(
            f"only {n_scored} tokens were scored, fewer than {FEW_TOKENS}: the ranking may not have settled;"
            " take more pages"
        )
    if len(unread) > len(done) / 2:
        warnings.append(f"on {len(unread)} of {len(done)} pages the answer named nothing that stands there")
    return ScoringResult(scores, unread, warnings)
