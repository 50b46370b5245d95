"""Run every question with every setting, and save the results as they come."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES

from sparsemm_edge.budgets import FULL, POOL_KERNEL
from sparsemm_edge.closing import Closing
from sparsemm_edge.errors import SparseMMError, os_errors
from sparsemm_edge.evaluation.datasets import DataSet, Question
from sparsemm_edge.evaluation.metrics import METRICS, Logits, compare
from sparsemm_edge.evaluation.settings import Setting
from sparsemm_edge.runtime import VisionModel
from sparsemm_edge.runtime.context import Context, SequenceState, cache_type, n_ubatch_for
from sparsemm_edge.runtime.encode import encode, encode_text, n_uncut
from sparsemm_edge.runtime.eviction import Eviction, HeadBudgetTable, check_scores, model_scores
from sparsemm_edge.runtime.loading import Loading
from sparsemm_edge.runtime.prompt import Prompt, TextPart
from sparsemm_edge.workers import map_processes

_REFERENCE = Setting("full")
_IMAGE_MEMORY = 256  # MiB
# flash attention on the CPU computes in tiles of 64 rows, and smaller batches take longer
_MIN_UBATCH = 64


@dataclass(frozen=True)
class EvalJob:
    """Model files and generation limits of one evaluation.

    Attributes:
        model, mmproj: GGUF files of the text model and its image encoder.
        scores: a head scores file; None: the model file's own scores.
        n_predict: most tokens of an answer.
        n_ctx: most positions of prompts and answers; None: what the model was trained for.
        n_threads: threads of a process; None: the physical cores.
        loading: how the model is loaded; encoded images are always kept in memory.
        chat_template: jinja text to use instead of the model's own template.
        n_turns: most questions of a conversation; 1: no follow-ups.
        cross: whether a second question is also asked in place of the first.
    """

    model: Path
    mmproj: Path
    scores: Path | None
    n_predict: int
    n_ctx: int | None = None
    n_threads: int | None = None
    loading: Loading = field(default_factory=Loading)
    chat_template: str | None = None
    n_turns: int = 1
    cross: bool = False

    def asked(self, question: Question) -> list["Asked"]:
        """A question and what follows it, in the order in which it is asked."""
        later = question.later[: self.n_turns - 1]
        asked = [Asked(question)]
        asked += [Asked(each, question, place) for place, each in enumerate(later, 2)]
        if self.cross and question.later:
            asked.append(Asked(question.later[0], question, instead=True))
        return asked


@dataclass(frozen=True)
class Asked:
    """A question and its context in the cache.

    Attributes:
        question: the question.
        first: the first question of its conversation; None: this is the first.
        place: in the conversation, from 1.
        instead: asked in place of `first`, which the cache was evicted for.
    """

    question: Question
    first: Question | None = None
    place: int = 1
    instead: bool = False

    @property
    def name(self) -> str:
        """A unique name for files of results."""
        if self.first is None:
            return self.question.name
        where = "in the place of" if self.instead else f"{self.place} after"
        return f"{self.question.name}, {where} {self.first.name}"


@dataclass(frozen=True)
class Record:
    """The result of one question with one setting.

    Attributes:
        question: Asked.name.
        page, task: the question's.
        setting: its key.
        place, instead: as in Asked.
        first_task: the task of the conversation's first question.
        error: why it failed; the fields below are then empty.
        skipped: why this combination cannot be run; likewise.
        answer: the text.
        score: 0 to 1; None without accepted answers.
        n_prompt: length of the sequence when its answer began.
        budget, window: for the first prompt, in positions; None for the full cache.
        kept: positions kept then, mean over KV heads.
        kv_bytes: K and V of these positions and of residual slots.
        kv_full_bytes: K and V of the whole sequence in a full f16 cache.
        kv_allocated: allocated for K and V, room for the answers included.
        agreement, first_divergence, kl: see metrics.compare; of a later question against the full cache's
            own conversation.
    """

    question: str
    page: str
    task: str
    setting: str
    place: int = 1
    instead: bool = False
    first_task: str = ""
    error: str | None = None
    skipped: str | None = None
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
    """The state of one conversation while it is run with each setting.

    Attributes:
        asked: the first question, its follow-ups, and the one in its place.
        prompt: the first question's.
        appended: by Asked.name, the tokens that append a question to the turn before it.
        n_ctx: room for all of it.
        in_place: the tokens of the question in the first one's place; None: not made yet.
        full: by Asked.name, the full cache's answer: tokens, end token included, and the logits of each.
        prefix: the KV cache of all but the prompt's last tokens; None if it cannot be split there.
        prefix_of: cache type and number of last tokens that `prefix` is for.
    """

    asked: list[Asked]
    prompt: Prompt
    appended: dict[str, npt.NDArray[np.int32]]
    n_ctx: int = 0
    in_place: npt.NDArray[np.int32] | None = None
    full: dict[str, tuple[list[int], Logits]] = field(default_factory=dict)
    prefix: SequenceState | None = None
    prefix_of: tuple[str, int] = ("", 0)


class Evaluator(Closing):
    """Answers questions with different settings. Close it or use it in a `with`."""

    def __init__(self, job: EvalJob) -> None:
        self._job = job
        # an image is read again for every question and setting, and encoded once
        loading = replace(job.loading, image_memory=_IMAGE_MEMORY)
        self._model = VisionModel.load(job.model, job.mmproj, n_threads=job.n_threads, loading=loading)
        try:
            self._scores = model_scores(job.scores, self._model.metadata, self._model.shape)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._model.close()

    def check(self, settings: Sequence[Setting]) -> None:
        """Raise SparseMMError if a setting does not work with this model."""
        shape = self._model.shape
        for setting in settings:
            block, _ = GGML_QUANT_SIZES[cache_type(setting.cache_type)]
            if shape.n_embd_head_k % block or shape.n_embd_head_v % block:
                raise SparseMMError(
                    f"{setting.cache_type} holds blocks of {block} numbers, and the heads of"
                    f" {self._job.model} have {shape.n_embd_head_k}: leave it out of --cache-types, and full"
                    " out of --policies"
                )
            if setting.policy != "full":
                n_prompt = 4096 if setting.budget is None else setting.budget + 1
                self._table(n_prompt, setting)

    def answer(self, question: Question, settings: Sequence[Setting]) -> list[Record]:
        """Answer a question and its follow-ups with all settings. Failures become records too."""
        asked = self._job.asked(question)
        try:
            with self._first_prompt(question) as prompt:
                reading = _Reading(asked, prompt, {each.name: self._in_turn(each) for each in asked[1:]})
                reading.n_ctx = self._n_ctx(reading)
                reference = self._converse(reading, _REFERENCE)
                records = []
                # those that share a prefix in a row, so that one at a time takes memory
                for setting in sorted(settings, key=lambda each: (each.cache_type, _n_rest(each))):
                    records += reference if setting == _REFERENCE else self._converse(reading, setting)
                return records
        except SparseMMError as error:
            return [_record(each, setting, error=str(error)) for setting in settings for each in asked]

    def _n_ctx(self, reading: _Reading) -> int:
        """Context size for the conversation, within the limit."""
        limit, n_prompt = self._job.n_ctx or self._model.n_ctx_train, reading.prompt.n_tokens
        if n_prompt >= limit:
            raise SparseMMError(f"the prompt takes {n_prompt} positions, the context has {limit}")
        # and a token that an answer which was cut off leaves for the next prompt
        later = [len(tokens) + 1 for tokens in reading.appended.values()]
        return min(n_prompt + sum(later) + self._job.n_predict * (1 + len(later)), limit)

    def _in_turn(self, asked: Asked) -> npt.NDArray[np.int32]:
        """The tokens of a follow-up, from the end of the previous turn on: [n]."""
        text = self._model.chat_prompt(asked.question.prompt, 0, self._job.chat_template, first=False)
        with self._model.tokenize(text, first=False) as prompt:
            return prompt.at_last_image()[1]

    def _in_place(self, reading: _Reading, asked: Asked) -> npt.NDArray[np.int32]:
        """The tokens after the image if this were the first question: [n]."""
        if reading.in_place is None:
            with self._first_prompt(asked.question) as prompt:
                before, tokens = prompt.at_last_image()
                if not len(tokens) or _content(before) != _content(reading.prompt.at_last_image()[0]):
                    raise SparseMMError("the chat template does not put the whole question after the image")
                reading.in_place = tokens
        return reading.in_place

    def _first_prompt(self, question: Question) -> Prompt:
        text = self._model.chat_prompt(question.prompt, 1, self._job.chat_template)
        return self._model.tokenize(text, [question.open_image()])

    def _start(self, reading: _Reading, setting: Setting, table: HeadBudgetTable | None) -> Context:
        longest = max((len(tokens) - 1 for tokens, _ in reading.full.values()), default=0)
        return Context(
            self._model,
            table,
            n_ctx=reading.n_ctx,
            cache_type_k=setting.cache_type,
            cache_type_v=setting.cache_type,
            n_ubatch=n_ubatch_for(self._model, reading.prompt),
            n_outputs=max(2, longest),
        )

    def _converse(self, reading: _Reading, setting: Setting) -> list[Record]:
        """Run a conversation with one setting; the full f16 cache first, whose answers `reading` keeps."""
        table, prefix, prompt = None, None, reading.prompt
        before, after = prompt.at_last_image()
        if setting.policy != "full":
            table = self._table(reading.prompt.n_tokens, setting)
            if setting.later == "image":
                prompt = before
            prefix = self._prefix(reading, setting)
            if prefix is not None and prompt.n_tokens - prefix.n_tokens < setting.window:
                prefix = None  # a part of the window is in it
        with self._start(reading, setting, table) as context:
            encoded = encode(self._model, prompt)
            if prefix is not None:
                context.restore(prefix)
                encoded = encoded.split(prefix.n_tokens)[1]
            context.prefill(encoded)
            evicted = context.state() if reading.asked[-1].instead and table is not None else None
            if prompt is not reading.prompt:
                context.append(encode_text(after, context.n_past))
            record, tokens = self._answer(context, reading, setting, reading.asked[0])
            records = [record]
            why_not = None
            for asked in reading.asked[1:]:
                try:
                    if asked.instead:
                        if evicted is not None:
                            context.restore(evicted)
                        record = self._ask_in_place(context, reading, setting, asked)
                    elif why_not is None:
                        self._read_later(context, reading, setting, asked, tokens)
                        record, tokens = self._answer(context, reading, setting, asked)
                    else:
                        record = _record(asked, setting, error=why_not)
                except SparseMMError as error:
                    why_not = str(error)
                    record = _record(asked, setting, error=why_not)
                records.append(record)
        return records

    def _table(self, n_prompt: int, setting: Setting) -> HeadBudgetTable:
        spec = setting.spec(n_prompt, Eviction().spec(self._model.metadata))
        check_scores(spec, self._scores, self._job.model)
        return HeadBudgetTable.of(spec, spec.table(self._scores, self._model.shape.kv_heads, n_prompt))

    def _read_later(
        self, context: Context, reading: _Reading, setting: Setting, asked: Asked, tokens: list[int]
    ) -> None:
        """Append a question to the answer before it, `tokens`."""
        # the question's text has the end of the turn; the last token of a cut answer is not in the cache yet
        pending = [] if self._model.ends_turn(tokens[-1]) else tokens[-1:]
        appended = np.concatenate([np.array(pending, np.int32), reading.appended[asked.name]])
        n_tokens = context.n_tokens + len(appended)
        if n_tokens >= reading.n_ctx:
            raise SparseMMError(
                f"with this question the conversation takes {n_tokens} positions, the context has"
                f" {reading.n_ctx}"
            )
        encoded = encode_text(appended, context.n_past)
        if setting.later != "again" and setting.policy != "full":
            context.append(encoded)
        else:
            context.prefill(encoded)

    def _ask_in_place(self, context: Context, reading: _Reading, setting: Setting, asked: Asked) -> Record:
        """Replace the first question by another, without restoring what was evicted from the image.

        Called with the cache as it was after the first question.
        """
        before, _ = reading.prompt.at_last_image()
        if not context.truncate(before.n_pos, before.n_tokens):
            return _record(
                asked, setting, skipped="the question that is taken back is longer than the window"
            )
        context.append(encode_text(self._in_place(reading, asked), context.n_past))
        return self._answer(context, reading, setting, asked)[0]

    def _prefix(self, reading: _Reading, setting: Setting) -> SequenceState | None:
        """The KV cache of all but the prompt's last tokens, not evicted; None if it cannot be split there."""
        wanted = (setting.cache_type, _n_rest(setting))
        if reading.prefix_of != wanted:
            reading.prefix, reading.prefix_of = None, wanted
            n_prefix = reading.prompt.n_tokens - _n_rest(setting)
            everything = np.full(self._model.shape.kv_heads, FULL, dtype=np.uint32)
            if n_prefix > 0 and not n_uncut(self._model, reading.prompt):
                with self._start(reading, setting, HeadBudgetTable(everything, 1, POOL_KERNEL)) as context:
                    context.append(encode(self._model, reading.prompt).split(n_prefix)[0])
                    reading.prefix = context.state()
        return reading.prefix

    def _answer(
        self, context: Context, reading: _Reading, setting: Setting, asked: Asked
    ) -> tuple[Record, list[int]]:
        """Answer the question in the cache; returns its record and tokens, end token included.

        The cache then holds all of these tokens but the last.
        """
        held = self._held(reading, setting, context)
        n_predict = min(self._job.n_predict, reading.n_ctx - context.n_tokens)
        first = context.logits()
        if asked.name not in reading.full:
            rows = [first]
            tokens = self._greedy(context, n_predict, [int(first.argmax())], rows)
            full_tokens, full_logits = reading.full[asked.name] = tokens, np.stack(rows)
            logits = full_logits
        else:
            # follow the full cache's answer for the distributions, and leave it where this cache would
            full_tokens, full_logits = reading.full[asked.name]
            followed = full_tokens[:n_predict]
            rest = context.decode_all(np.array(followed[:-1], dtype=np.int32))
            logits = np.concatenate([first[None], rest])
            choices = logits.argmax(axis=1).tolist()
            tokens = followed
            if choices != followed:
                place = next(i for i, token in enumerate(followed) if choices[i] != token)
                context.truncate_reply(place)
                tokens = self._greedy(context, n_predict, choices[: place + 1])
        ended = self._model.ends_turn(tokens[-1])
        answer = self._model.text_of(tokens[:-1] if ended else tokens)
        question, score = asked.question, None
        if question.metric is not None:
            # a model's reply often begins with a space that belongs to no answer
            score = METRICS[question.metric](answer.strip(), question.answers)
        compared = compare(full_tokens, tokens, full_logits[: len(logits)], logits)
        return _record(asked, setting, answer=answer, score=score, **held, **compared), tokens

    def _greedy(
        self, context: Context, n_predict: int, tokens: list[int], rows: list[Logits] | None = None
    ) -> list[int]:
        """Decode greedily from the last of `tokens` to the end of the answer."""
        while len(tokens) < n_predict and not self._model.ends_turn(tokens[-1]):
            context.decode(tokens[-1])
            found = context.logits()
            if rows is not None:
                rows.append(found)
            tokens.append(int(found.argmax()))
        return tokens

    def _held(self, reading: _Reading, setting: Setting, context: Context) -> dict[str, Any]:
        """The cache's statistics after a prompt, as fields of Record."""
        stats, shape, n_first = context.kv_stats(), self._model.shape, reading.prompt.n_tokens
        evicts = setting.policy != "full"
        n_places = stats.positions_kept_mean + context.n_residual() / (shape.n_layer * shape.n_head_kv)
        return {
            "n_prompt": context.n_tokens,
            "budget": setting.budget_of(n_first) if evicts else None,
            "window": setting.window_of(n_first) if evicts else None,
            "kept": stats.positions_kept_mean,
            "kv_bytes": stats.bytes_full * n_places / context.n_tokens,
            "kv_full_bytes": shape.kv_bytes(context.n_tokens * shape.n_layer * shape.n_head_kv),
            "kv_allocated": stats.bytes_now,
        }


def _record(asked: Asked, setting: Setting, **found: Any) -> Record:
    return Record(
        question=asked.name,
        page=asked.question.page,
        task=asked.question.task,
        setting=setting.key,
        place=asked.place,
        instead=asked.instead,
        first_task=(asked.first or asked.question).task,
        **found,
    )


def _n_rest(setting: Setting) -> int:
    """Number of prompt tokens after the prefix; they include the window, which votes."""
    return max(_MIN_UBATCH, setting.window)


def _content(prompt: Prompt) -> list[Any]:
    """What tells prompts with the same images apart: tokens of text, and how many each image takes."""
    return [part.tokens.tolist() if isinstance(part, TextPart) else part.n_tokens for part in prompt.parts]


# --- results on disk


class Results(Closing):
    """The results file: one JSON object per line, the first of which describes the run."""

    def __init__(self, path: Path, job: EvalJob, data: DataSet, *, resume: bool) -> None:
        """Open or resume the file.

        Raises:
            SparseMMError: it exists without `resume`, or is of another run.
        """
        self.records: dict[tuple[str, str], Record] = {}
        head = {
            "format": "sparsemm-edge/eval-results",
            "version": 2,
            "model": _identity(job.model),
            "mmproj": _identity(job.mmproj),
            "scores": _identity(job.scores) if job.scores else None,
            "data": data.name,
            "n_predict": job.n_predict,
            "n_ctx": job.n_ctx,
            "chat_template": job.chat_template,
            # None where nothing is said, as files read that older versions wrote
            "loras": [[_identity(Path(lora.path)), lora.scale] for lora in job.loading.loras] or None,
            "image_min_tokens": job.loading.image_min_tokens,
            "image_max_tokens": job.loading.image_max_tokens,
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

    def missing(self, asked: Sequence[Asked], settings: Sequence[Setting]) -> list[Setting]:
        """The settings under which not all of this was answered."""
        names = [each.name for each in asked]
        return [each for each in settings if not all((name, each.key) in self.records for name in names)]

    def close(self) -> None:
        self._file.close()

    def _write(self, content: dict[str, Any]) -> None:
        self._file.write(json.dumps(content) + "\n")

    def _read(self, path: Path, head: dict[str, Any]) -> None:
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]  # a run that was killed may leave half a line
        if len(whole) < len(data):
            os.truncate(path, len(whole))
        if not whole:
            return
        try:
            found, *rows = map(json.loads, whole.decode("utf-8").splitlines())
            records = [Record(**row) for row in rows]
        except (ValueError, TypeError) as error:
            raise SparseMMError(
                f"{path} is not a file of eval's results ({error}): choose another --out"
            ) from error
        known = found if isinstance(found, dict) else dict.fromkeys(head, found)
        for key, value in head.items():
            if (was := known.get(key)) != value:
                raise SparseMMError(
                    f"{path} is of another run, --resume cannot go on with it: {key} was {was}, is {value}"
                )
        for record in records:
            if record.error is None:  # what failed is tried again
                self.records[record.question, record.setting] = record


def _identity(path: Path) -> str:
    """A file's name and size, to notice a different file without hashing it."""
    with os_errors(f"read {path}"):
        return f"{path.name}, {path.stat().st_size} bytes"


# --- the run


def run(
    job: EvalJob,
    data: DataSet,
    settings: Sequence[Setting],
    results: Results,
    *,
    n_jobs: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Run what is missing from `results`.

    Args:
        job, data, settings: what to run.
        results: receives records as they come.
        n_jobs: processes, each with a model of its own.
        progress: called with the pages done and their total.
    """
    work: list[_Page] = []
    for _, questions in groupby(data.questions, key=lambda question: question.page):
        missing = [(question, results.missing(job.asked(question), settings)) for question in questions]
        if page := [(question, left) for question, left in missing if left]:
            work.append(page)
    progress(0, len(work))
    for done, records in enumerate(_answers(job, work, settings, n_jobs), 1):
        results.add(records)
        progress(done, len(work))


_Page = list[tuple[Question, list[Setting]]]
"""The questions about one page, each with the settings that are still to be run."""


def _answers(
    job: EvalJob, work: list[_Page], settings: Sequence[Setting], n_jobs: int
) -> Iterator[list[Record]]:
    if not work:
        return
    with Evaluator(job) as evaluator:  # so that a mistake is one line, and not one of every process
        evaluator.check(settings)
        if n_jobs == 1:
            yield from _answer_pages(evaluator, work)
    if n_jobs > 1:
        yield from map_processes(partial(_answer_in_process, job), work, n_jobs)


def _answer_in_process(job: EvalJob, rank: int, pages: Iterator[_Page]) -> Iterator[list[Record]]:
    with Evaluator(job) as evaluator:
        yield from _answer_pages(evaluator, pages)


def _answer_pages(evaluator: Evaluator, pages: Iterable[_Page]) -> Iterator[list[Record]]:
    for page in pages:
        yield [record for question, settings in page for record in evaluator.answer(question, settings)]
