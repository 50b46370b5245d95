"""The run: every question under every setting, through the runtime, saved as it goes."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

from sparsemm_edge.budgets import BY_SCORE, FULL
from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.evaluation import fidelity, metrics
from sparsemm_edge.evaluation.datasets import DataSet, Question
from sparsemm_edge.evaluation.settings import Setting
from sparsemm_edge.gguf_metadata import POOL_KERNEL
from sparsemm_edge.runtime import VisionModel
from sparsemm_edge.runtime.eviction import HeadBudgetTable
from sparsemm_edge.runtime.prompt import ImagePart, Prompt
from sparsemm_edge.runtime.session import Prefix, Session, cache_type
from sparsemm_edge.scores import HeadScores, group_scores
from sparsemm_edge.workers import in_processes

_REFERENCE = Setting("full")
# flash attention on the CPU computes in tiles of 64 rows, and smaller batches take longer
_MIN_REST = 64


@dataclass(frozen=True)
class Job:
    """What is run, and on what.

    Attributes:
        model, mmproj: GGUF files of the text model and its image encoder.
        scores: a head scores file; None: the model file's own scores.
        n_predict: most tokens of an answer.
        n_ctx: most positions of prompt and answer; None: what the model was trained for.
        n_threads: threads of a process; None: the physical cores.
        chat_template: jinja text to use instead of the model's own template.
    """

    model: Path
    mmproj: Path
    scores: Path | None
    n_predict: int
    n_ctx: int | None = None
    n_threads: int | None = None
    chat_template: str | None = None


@dataclass(frozen=True)
class Record:
    """One question under one setting.

    Attributes:
        question, page, task: the question's.
        setting: its key.
        error: why there is no answer; the fields below are then empty.
        answer: the text.
        score: 0 to 1; None without accepted answers.
        n_prompt: the prompt's length in positions.
        budget, window: as shared out for this prompt, in positions; None for the full cache.
        kept: positions held after the prompt, mean over KV heads.
        kv_bytes: K and V of these positions.
        kv_full_bytes: K and V of the whole prompt in a full f16 cache.
        kv_allocated: allocated for K and V, room for the answer included.
        agreement, first_divergence, kl: see fidelity.Fidelity.
    """

    question: str
    page: str
    task: str
    setting: str
    error: str | None = None
    answer: str = ""
    score: float | None = None
    n_prompt: int = 0
    budget: int | None = None
    window: int | None = None
    kept: float = 0.0
    kv_bytes: float = 0.0
    kv_full_bytes: float = 0.0
    kv_allocated: int = 0
    agreement: float = 0.0
    first_divergence: int | None = None
    kl: float = 0.0


@dataclass
class _Reading:
    """One question's prompt while its settings are gone through.

    Attributes:
        embeddings: of the prompt's images.
        n_predict: tokens that fit after the prompt.
        full, full_logits: the full cache's answer, end token included, and the logits before each token.
        prefix: the prompt but for its last tokens, None if it cannot be cut there.
        prefix_of: cache type, and how many tokens are left out, that `prefix` was read for.
    """

    question: Question
    prompt: Prompt
    embeddings: list[npt.NDArray[np.float32]]
    n_predict: int
    full: list[int] = field(default_factory=list)
    full_logits: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))
    prefix: Prefix | None = None
    prefix_of: tuple[str, int] = ("", 0)


class Evaluator:
    """A loaded model that answers questions under settings. Close it, or use it in a `with`."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._model = VisionModel.load(job.model, job.mmproj, n_threads=job.n_threads)
        self._page = ""
        self._embeddings: list[npt.NDArray[np.float32]] = []
        try:
            self._scores = self._read_scores()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._model.close()

    def __enter__(self) -> "Evaluator":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def check(self, settings: Sequence[Setting]) -> None:
        """Raise SparseMMError if a setting cannot be run with this model, before anything is run."""
        for setting in settings:
            if cache_type(setting.cache_type).name.startswith("Q4") and setting.policy != "full":
                raise SparseMMError(f"a cache that evicts cannot hold {setting.cache_type}: f16 or q8_0")
            if setting.policy in BY_SCORE and self._scores is None:
                raise SparseMMError(
                    f"{self._job.model} holds no head scores: convert it first (sparsemm-edge convert), or"
                    " give --scores"
                )
            if setting.policy != "full":
                n_prompt = 4096 if setting.budget is None else setting.budget + 1
                setting.table(self._scores, self._model.shape, n_prompt)

    def answer(self, question: Question, settings: Sequence[Setting]) -> list[Record]:
        """One question under all of these settings; if it fails, a record of the failure for each."""
        try:
            text = self._model.chat_prompt(question.prompt, 1, self._job.chat_template)
            with self._model.tokenize(text, [question.open_image()]) as prompt:
                reading = _Reading(
                    question, prompt, self._encode(question.page, prompt), self._n_predict(prompt)
                )
                reference = self._answer_full(reading)
                # those that share a prefix in a row, so that one at a time takes memory
                return [
                    reference if setting == _REFERENCE else self._answer_setting(reading, setting)
                    for setting in sorted(settings, key=lambda each: (each.cache_type, _n_rest(each)))
                ]
        except SparseMMError as error:
            return [
                Record(question.name, question.page, question.task, setting.key, error=str(error))
                for setting in settings
            ]

    def _read_scores(self) -> npt.NDArray[np.float64] | None:
        shape, metadata = self._model.shape, self._model.metadata
        if self._job.scores is not None:
            given = HeadScores.load(self._job.scores)
            given.check_fits(shape.n_layer, shape.n_head, shape.n_head_kv)
            return given.grouped(shape.n_head_kv)
        return None if metadata is None else group_scores(metadata.head_scores, shape.n_head_kv)

    def _encode(self, page: str, prompt: Prompt) -> list[npt.NDArray[np.float32]]:
        """The prompt's images through the vision tower, once for all questions about a page in a row."""
        if page != self._page:
            self._embeddings = [
                self._model.encode_image(part) for part in prompt.parts if isinstance(part, ImagePart)
            ]
            self._page = page
        return self._embeddings

    def _n_predict(self, prompt: Prompt) -> int:
        limit = self._job.n_ctx or self._model.n_ctx_train
        if prompt.n_tokens >= limit:
            raise SparseMMError(f"the prompt takes {prompt.n_tokens} positions, the context has {limit}")
        return min(self._job.n_predict, limit - prompt.n_tokens)

    def _start(
        self, reading: _Reading, setting: Setting, table: HeadBudgetTable | None, n_ubatch: int | None = None
    ) -> Session:
        return self._model.start_with(
            reading.prompt,
            table,
            n_ctx=reading.prompt.n_tokens + reading.n_predict,
            n_ubatch=n_ubatch,
            cache_type_k=setting.cache_type,
            cache_type_v=setting.cache_type,
            embeddings=reading.embeddings,
            n_outputs=max(1, len(reading.full) - 1),
        )

    def _answer_full(self, reading: _Reading) -> Record:
        """The full cache's greedy answer as llama.cpp gives it; kept in `reading` for the others."""
        with self._start(reading, _REFERENCE, None) as session:
            session.read_prompt()
            record = self._record(reading, _REFERENCE, session)
            logits = [session.logits()]
            tokens = self._greedy(session, reading, [int(logits[0].argmax())], logits)
        reading.full, reading.full_logits = tokens, np.stack(logits)
        return self._complete(record, reading, tokens, reading.full_logits)

    def _answer_setting(self, reading: _Reading, setting: Setting) -> Record:
        """Follow the full cache's answer for the distributions, and leave it where this cache would."""
        table, prefix, n_ubatch = None, None, None
        if setting.policy != "full":
            n_prompt = reading.prompt.n_tokens
            table = HeadBudgetTable(
                setting.table(self._scores, self._model.shape, n_prompt),
                setting.window_of(n_prompt),
                POOL_KERNEL,
            )
            prefix = self._prefix(reading, setting)
            n_ubatch = _n_rest(setting) if prefix else None
        with self._start(reading, setting, table, n_ubatch) as session:
            session.read_prompt(prefix)
            record = self._record(reading, setting, session)
            first = session.logits()
            rest = session.decode_all(np.array(reading.full[:-1], dtype=np.int32))
            logits = np.concatenate([first[None], rest])
            choices = logits.argmax(axis=1)
            differs = np.flatnonzero(choices != np.array(reading.full))
            tokens = reading.full
            if differs.size:
                place = int(differs[0])
                tokens = [*reading.full[:place], int(choices[place])]
                session.forget_reply(place)
                tokens = self._greedy(session, reading, tokens)
        return self._complete(record, reading, tokens, logits)

    def _prefix(self, reading: _Reading, setting: Setting) -> Prefix | None:
        """The prompt but for its last tokens, read and not evicted; None if it cannot be cut there."""
        wanted = (setting.cache_type, _n_rest(setting))
        if reading.prefix_of != wanted:
            reading.prefix, reading.prefix_of = None, wanted
            n_prefix = reading.prompt.n_tokens - _n_rest(setting)
            shape = self._model.shape
            everything = np.full((shape.n_layer, shape.n_head_kv), FULL, dtype=np.uint32)
            if n_prefix > 0:
                with self._start(reading, setting, HeadBudgetTable(everything, 1, POOL_KERNEL)) as session:
                    reading.prefix = session.read_prefix(n_prefix) if session.takes_prefix else None
        return reading.prefix

    def _greedy(
        self,
        session: Session,
        reading: _Reading,
        tokens: list[int],
        logits: list[npt.NDArray[np.float32]] | None = None,
    ) -> list[int]:
        """Go on from the last of `tokens`, which is not decoded yet, to the end of the answer."""
        while len(tokens) < reading.n_predict and not self._model.ends_turn(tokens[-1]):
            session.decode(tokens[-1])
            found = session.logits()
            if logits is not None:
                logits.append(found)
            tokens.append(int(found.argmax()))
        return tokens

    def _record(self, reading: _Reading, setting: Setting, session: Session) -> dict[str, Any]:
        """What the cache holds right after the prompt."""
        stats, shape, n_prompt = session.kv_stats(), self._model.shape, reading.prompt.n_tokens
        evicts = setting.policy != "full"
        question = reading.question
        return {
            "question": question.name,
            "page": question.page,
            "task": question.task,
            "setting": setting.key,
            "n_prompt": n_prompt,
            "budget": setting.budget_of(n_prompt) if evicts else None,
            "window": setting.window_of(n_prompt) if evicts else None,
            "kept": stats.positions_kept_mean,
            "kv_bytes": stats.bytes_full * stats.positions_kept_mean / n_prompt,
            "kv_full_bytes": shape.kv_bytes(n_prompt * shape.n_layer * shape.n_head_kv),
            "kv_allocated": stats.bytes_now,
        }

    def _complete(
        self,
        record: dict[str, Any],
        reading: _Reading,
        tokens: list[int],
        logits: npt.NDArray[np.float32],
    ) -> Record:
        question = reading.question
        ended = self._model.ends_turn(tokens[-1])
        answer = self._model.text_of(tokens[:-1] if ended else tokens)
        score = None
        if question.metric is not None:
            # a model's reply often begins with a space that belongs to no answer
            score = metrics.score(question.metric, answer.strip(), question.answers)
        compared = fidelity.compare(reading.full, tokens, reading.full_logits, logits)
        return Record(**record, answer=answer, score=score, **asdict(compared))


def _n_rest(setting: Setting) -> int:
    """Tokens of the prompt to read after the prefix; the window is among them, so that it can vote."""
    return max(_MIN_REST, setting.window)


# --- results on disk


class Results:
    """The file of records, one JSON object a line, the first of which says what they are of."""

    def __init__(self, path: Path, job: Job, data: DataSet, *, resume: bool) -> None:
        """Open or go on with the file.

        Raises:
            SparseMMError: it exists and `resume` is not wanted, or it is of another run.
        """
        self.records: dict[tuple[str, str], Record] = {}
        head = {
            "format": "sparsemm-edge/eval-results",
            "version": 1,
            "model": _identity(job.model),
            "mmproj": _identity(job.mmproj),
            "scores": _identity(job.scores) if job.scores else None,
            "data": data.name,
            "n_predict": job.n_predict,
            "n_ctx": job.n_ctx,
            "chat_template": job.chat_template,
        }
        if path.exists():
            if not resume:
                raise SparseMMError(
                    f"{path} exists already: --resume goes on with it, or choose another --out"
                )
            self._read(path, head)
        self._file: TextIO = path.open("a", encoding="utf-8")
        if self._file.tell() == 0:
            self._write(head)

    def add(self, records: Sequence[Record]) -> None:
        for record in records:
            self._write(asdict(record))
            self.records[record.question, record.setting] = record
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _write(self, content: dict[str, Any]) -> None:
        self._file.write(json.dumps(content) + "\n")

    def _read(self, path: Path, head: dict[str, Any]) -> None:
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]  # a run that was killed may leave half a line
        if len(whole) < len(data):
            with path.open("r+b") as file:
                file.truncate(len(whole))
        lines = whole.decode("utf-8").splitlines()
        if not lines:
            return
        try:
            found = json.loads(lines[0])
            records = [Record(**json.loads(line)) for line in lines[1:]]
        except (ValueError, TypeError) as error:
            raise SparseMMError(
                f"{path} is not a file of eval's results ({error}): choose another --out"
            ) from error
        differs = [key for key in head if not isinstance(found, dict) or found.get(key) != head[key]]
        if differs:
            key = differs[0]
            was = found.get(key) if isinstance(found, dict) else found
            raise SparseMMError(
                f"{path} is of another run, --resume cannot go on with it: {key} was {was}, is {head[key]}"
            )
        for record in records:
            if record.error is None:  # what failed is tried again
                self.records[record.question, record.setting] = record


def _identity(path: Path) -> str:
    """A file's name and size: enough to notice another file, without reading gigabytes."""
    try:
        return f"{path.name}, {path.stat().st_size} bytes"
    except OSError as error:
        raise SparseMMError(f"cannot read {path}: {error.strerror or error}") from error


# --- the run


def run(
    job: Job,
    data: DataSet,
    settings: Sequence[Setting],
    results: Results,
    *,
    n_jobs: int,
    show_progress: bool,
) -> None:
    """Answer what `results` lacks, and add it there.

    Args:
        job, data, settings: what to run.
        results: gets records as they come.
        n_jobs: processes, each with a model of its own.
        show_progress: a bar with the time left on stderr.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    work = [
        missing
        for _, group in groupby(data.questions, key=lambda question: question.page)
        if (missing := _missing(list(group), settings, results))
    ]
    with Progress(
        TextColumn("pages"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(stderr=True),
        disable=not show_progress,
    ) as progress:
        bar = progress.add_task("pages", total=len(work))
        for records in _answers(job, work, settings, n_jobs):
            results.add(records)
            progress.advance(bar)


_Page = list[tuple[Question, list[Setting]]]
"""The questions about one page, each with the settings that are still to be run."""


def _missing(questions: list[Question], settings: Sequence[Setting], results: Results) -> _Page:
    found = []
    for question in questions:
        left = [setting for setting in settings if (question.name, setting.key) not in results.records]
        if left:
            found.append((question, left))
    return found


def _answers(job: Job, work: list[_Page], settings: Sequence[Setting], n_jobs: int) -> Iterator[list[Record]]:
    if not work:
        return
    with Evaluator(job) as evaluator:  # so that a mistake is one line, and not one of every process
        evaluator.check(settings)
        if n_jobs == 1:
            for page in work:
                yield _answer_page(evaluator, page)
            return
    yield from in_processes(partial(_answer_pages, job), work, n_jobs)


def _answer_pages(job: Job, rank: int, pages: Iterator[_Page]) -> Iterator[list[Record]]:
    with Evaluator(job) as evaluator:
        for page in pages:
            yield _answer_page(evaluator, page)


def _answer_page(evaluator: Evaluator, page: _Page) -> list[Record]:
    return [record for question, settings in page for record in evaluator.answer(question, settings)]
