"""A multi-turn conversation over one KV cache: each turn computes only its new tokens."""

import codecs
import hashlib
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from sparsemm_edge import defaults
from sparsemm_edge.closing import Closing
from sparsemm_edge.errors import ContextFullError, SparseMMError, check_ranges
from sparsemm_edge.gguf_header import weight_bytes_read
from sparsemm_edge.runtime import library, session_file
from sparsemm_edge.runtime.chat_template import Turn
from sparsemm_edge.runtime.context import N_UBATCH, Context, KVStats, cache_type, n_ubatch_for
from sparsemm_edge.runtime.encode import encode, encode_text
from sparsemm_edge.runtime.eviction import Eviction, HeadBudgetTable, same_budgets
from sparsemm_edge.runtime.first_token import FirstToken, Part
from sparsemm_edge.runtime.model import VisionModel
from sparsemm_edge.runtime.process import rss_peak_bytes
from sparsemm_edge.runtime.prompt import Prompt, TextPart
from sparsemm_edge.runtime.sampler import Sampler, Sampling, StopTexts


@dataclass(frozen=True)
class Timings:
    """Milliseconds. decode_ms_per_token is a mean over the decoded tokens, None if there was none."""

    load_ms: float
    image_ms: float
    prompt_ms: float
    decode_ms_per_token: float | None


@dataclass(frozen=True)
class GenerationStats:
    """Statistics of one answer.

    Attributes:
        tokens: ids of the generated tokens, without the end token.
        ended: whether the model ended its turn or a stop text appeared; False if the context or n_predict ran
            out, or the caller stopped early.
        n_prompt: cache positions of the question; in later turns only the new ones.
        kv, timings: bytes and milliseconds.
        first_token: the parts of the time to the first token.
        read_bytes_per_s: memory bandwidth of decoding (weights, K and V); None if nothing was decoded.
        rss_peak_bytes: the largest resident size of this process so far.
    """

    tokens: tuple[int, ...]
    ended: bool
    n_prompt: int
    kv: KVStats
    timings: Timings
    first_token: FirstToken
    read_bytes_per_s: float | None
    rss_peak_bytes: int

    @property
    def n_generated(self) -> int:
        return len(self.tokens)

    def to_dict(self, text: str) -> dict[str, Any]:
        """The figures as `generate --json` prints them, with the generated text."""
        return {
            "text": text,
            "tokens": list(self.tokens),
            "n_prompt": self.n_prompt,
            "n_generated": self.n_generated,
            "kv": asdict(self.kv),
            "timings": asdict(self.timings),
            "first_token": self.first_token.to_dict(self.read_bytes_per_s),
            "rss_peak_bytes": self.rss_peak_bytes,
        }


@dataclass(frozen=True, eq=False)
class _Asked:
    """The last message: its length, text tokens, the logits after it, and its timing."""

    n_prompt: int
    said: Sequence[int]
    logits: npt.NDArray[np.float32]
    image_ms: float
    first_token: FirstToken  # its total and its last part are not known yet


class Conversation(Closing):
    """A multi-turn conversation. Close it or use it in a `with`: it owns llama.cpp memory.

        with Conversation(model, n_ctx=4096) as conversation:
            for piece in conversation.ask("What is written here?", ["page.png"]):
                print(piece, end="", flush=True)
            for piece in conversation.ask("And on this one?", ["other.png"]):
                print(piece, end="", flush=True)

    The context is created for the first question and sized so that it is one batch. The cache evicts after
    each question that leaves a head above its budget.
    """

    def __init__(
        self,
        model: VisionModel,
        *,
        n_ctx: int | None = None,
        n_ubatch: int | None = None,
        cache_type_k: str = "f16",
        cache_type_v: str = "f16",
        system: str | None = None,
        chat_template: str | None = None,
        template_options: Mapping[str, Any] | None = None,
        eviction: Eviction | None = None,
        multi_turn: bool = True,
        resume: Path | None = None,
        reuse_evicted: bool = False,
    ) -> None:
        """Args:
        model: the model, which must outlive the conversation.
        n_ctx: context size in positions; None: enough for the first question and its answer.
        n_ubatch, cache_type_k, cache_type_v: as Context takes them.
        system: the system message.
        chat_template: jinja text to use instead of the model's own template, or a name of llama.cpp's.
        template_options: extra variables for the template, such as {"enable_thinking": False}.
        eviction: None: the settings of the model file, or of the resumed conversation.
        multi_turn: more questions may follow. Head budgets are then computed for n_ctx if the first question
            fits into the budget.
        resume: a file of save(); the next question continues that conversation.
        reuse_evicted: evict the images of the first question by their own last positions, before the question
            is read, and keep the sequence in the model's disk cache: where it is there already, neither the
            images nor what stands before them is read. The first question evicts nothing then.

        Raises:
            SparseMMError: an argument out of its range, or a file that cannot be resumed with this model and
                these arguments.
        """
        check_ranges(n_ctx=n_ctx, n_ubatch=n_ubatch)
        cache_type(cache_type_k), cache_type(cache_type_v)
        self._model = model
        self._n_ctx_given = n_ctx
        self._n_ubatch = n_ubatch
        self._types = (cache_type_k, cache_type_v)
        self.system = system
        self._template = chat_template
        self._template_options = template_options
        self._eviction = eviction or Eviction()
        # the length that head budgets are for, where more questions follow
        self._n_later = n_ctx if multi_turn else None
        self._kept = model.disk_cache if reuse_evicted else None
        if reuse_evicted and self._kept is None:
            raise SparseMMError("evicted images are kept in a folder: give one with --image-cache")
        self._context: Context | None = None
        self._n_ctx = 0
        self._table: HeadBudgetTable | None = None
        self._planned: tuple[int, int | None] = (0, None)
        self._pending: tuple[int, ...] = ()  # said, but not in the cache yet
        self._asked: _Asked | None = None
        self.last_stats: GenerationStats | None = None
        self._resumed: session_file.SavedConversation | None = None
        if resume is not None:
            if system is not None:
                raise SparseMMError(
                    f"{resume}: a conversation that has begun takes no system message (--system)"
                )
            self._resumed = session_file.read(resume)
            self._check_resumed(resume, self._resumed)
            self._pending = self._resumed.pending

    def close(self) -> None:
        """Free the context. The next question starts a new conversation."""
        if self._context is not None:
            self._context.close()
            self._context = None
        self._pending, self._resumed, self._asked, self.last_stats = (), None, None, None

    @property
    def context(self) -> Context | None:
        """The context; None before the first question."""
        return self._context

    @property
    def n_held(self) -> int:
        """Positions of all turns so far, kept or evicted."""
        return 0 if self._context is None else self._context.n_tokens + len(self._pending)

    @property
    def is_full(self) -> bool:
        """Whether the context is full."""
        return self._context is not None and self.n_held >= self._n_ctx

    @property
    def n_ctx(self) -> int:
        """Context size in positions; 0 before the first question."""
        return self._n_ctx

    def stats(self) -> GenerationStats:
        """Statistics of the last answer, complete or not."""
        if self.last_stats is None:
            raise SparseMMError("nothing was generated yet")
        return self.last_stats

    def ask(
        self,
        question: str,
        images: Sequence[str | Path | Image.Image] = (),
        *,
        n_predict: int = 256,
        sampling: Sampling | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Generator[str, None, None]:
        """Stream the answer to one message; stats() has its statistics afterwards.

        If the caller stops early, the part that was generated stays in the conversation.

        Args:
            question: the user's message.
            images: files or PIL images, shown before the text.
            n_predict: most tokens to generate.
            sampling: how tokens are sampled; None: greedy.
            cancelled: polled while the prompt is computed; True cancels it.

        Yields:
            Pieces of text, always whole characters.

        Raises:
            SparseMMError: an unreadable image, no image encoder or chat template, a question that does not
                fit into the context, or an argument out of range. The conversation is unchanged.
            Cancelled: `cancelled` returned True. The conversation is unchanged.
        """
        first = self._context is None and self._resumed is None
        text = self._text(question, len(images), first)
        yield from self._answer(text, images, first, n_predict, sampling or Sampling(), cancelled)

    def begin(
        self,
        turns: Sequence[Turn],
        images: Sequence[str | Path | Image.Image] = (),
        *,
        n_predict: int = 256,
        sampling: Sampling | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Generator[str, None, None]:
        """Start a new conversation from several turns and answer the last one; otherwise as ask().

        Args:
            turns: a system message or none, then what user and assistant said.
            images: of all turns, in order.
        """
        self.close()
        text = self._model.turns_prompt(turns, self._template, template_options=self._template_options)
        yield from self._answer(text, images, True, n_predict, sampling or Sampling(), cancelled)

    def retry(self, *, n_predict: int = 256, sampling: Sampling | None = None) -> Generator[str, None, None]:
        """Discard the last answer and generate another one; arguments as for ask().

        The message is not computed again.

        Raises:
            SparseMMError: no message yet, an answer that cannot be dropped (max_tail), or an argument out of
                range.
        """
        started = time.perf_counter()
        check_ranges(n_predict=n_predict)
        context, asked, sampling = self._context, self._asked, sampling or Sampling()
        if context is None or asked is None:
            raise SparseMMError("no message yet: there is nothing to answer again")
        with self._model.sampler(sampling, asked.said) as sampler:
            context.truncate_reply()
            self._pending = ()
            asked = replace(asked, first_token=FirstToken())  # nothing is read again
            yield from self._reply(context, asked, n_predict, sampler, sampling.stop, started)

    def check(self, sampling: Sampling | None = None) -> None:
        """Raise SparseMMError if template, cache types or budgets do not work with this model."""
        model = self._model
        with (
            model.tokenize(self._text("?", 0, first=True)) as prompt,
            model.sampler(sampling or Sampling()),
        ):
            n_ctx = model.n_ctx_for(prompt, 1, self._n_ctx_given)
            table = model.plan(self._eviction, prompt.n_tokens, self._n_later)
            type_k, type_v = self._types
            small = min(n_ctx, prompt.n_tokens + 1)
            Context(model, table, n_ctx=small, cache_type_k=type_k, cache_type_v=type_v).close()

    def save(self, path: Path) -> None:
        """Write the conversation to a file, for `resume`.

        Raises:
            SparseMMError: nothing was asked yet, or the file cannot be written.
        """
        if self._context is None:
            raise SparseMMError("no message yet: there is nothing to save")
        session_file.write(path, self._saved(self._context))

    def _saved(self, context: Context) -> session_file.SavedConversation:
        return session_file.SavedConversation(
            model=self._model.fingerprint,
            model_name=self._model.path.name,
            cache_types=self._types,
            table=self._table,
            planned=self._planned,
            n_ubatch=context.n_ubatch,
            pending=self._pending,
            state=context.state(),
        )

    def _answer(
        self,
        text: str,
        images: Sequence[str | Path | Image.Image],
        first: bool,
        n_predict: int,
        sampling: Sampling,
        cancelled: Callable[[], bool] | None,
    ) -> Generator[str, None, None]:
        """Read the text of a prompt and reply to it."""
        started = time.perf_counter()
        check_ranges(n_predict=n_predict)
        with ExitStack() as stack:
            with self._model.tokenize(text, images, first=first) as prompt:
                prompt.prepend(self._pending)
                said = [token for part in prompt.parts if isinstance(part, TextPart) for token in part.tokens]
                sampler = stack.enter_context(self._model.sampler(sampling, said))
                before, after = prompt.at_last_image()
                apart = first and self._kept is not None and before.n_tokens > 0 and len(after) > 0
                context = self._context_for(prompt, n_predict, before if apart else None)
                try:
                    if apart:
                        vision = self._read_images(context, before, cancelled)
                        context.append(encode_text(after, context.n_past))
                    else:
                        encoded = encode(self._model, prompt, context.n_past, cancelled)
                        vision = encoded.vision
                        context.prefill(encoded, cancelled)
                except BaseException:
                    if first or not context.n_tokens:
                        self.close()
                    raise
                self._pending = ()
                parts = FirstToken(images=Part(prompt.images_ms), vision=vision, prompt=context.prompt_part)
                self._asked = _Asked(prompt.n_tokens, said, context.logits(), vision.ms, parts)
            yield from self._reply(context, self._asked, n_predict, sampler, sampling.stop, started)

    def _read_images(self, context: Context, images: Prompt, cancelled: Callable[[], bool] | None) -> Part:
        """Let the context hold images, and what stands before them, evicted by their own last positions.

        They are read if they are not kept from another time. Returns the time to encode them.
        """
        assert self._kept is not None
        name = f"{self._digest(images)}.sequence"

        def restore(path: Path) -> bool:
            try:
                saved = session_file.read(path)
            except SparseMMError as error:
                raise SparseMMError(f"{path}: not a kept sequence, or a damaged one") from error
            context.restore(saved.state)
            return True

        if self._kept.read(name, restore):
            return Part()
        encoded = encode(self._model, images, cancelled=cancelled)
        context.prefill(encoded, cancelled)
        saved = self._saved(context)
        self._kept.write(name, lambda path: session_file.write(path, saved))
        return encoded.vision

    def _digest(self, images: Prompt) -> str:
        """Names a sequence that begins with images: by all that it depends on."""
        model, table = self._model, self._table
        parts: list[Any] = []
        for part in images.parts:
            if isinstance(part, TextPart):
                parts.append(part.tokens.tolist())
            else:
                assert part.key is not None  # a model with a disk cache always tells
                parts.append(model.image_digest(part.key))
        evicts = None
        if table is not None:
            votes = (table.window, table.pool_kernel, table.vote, table.residual)
            evicts = (table.head_budgets.tolist(), *votes, table.max_tail)
        # as requested: a context's own n_ubatch also depends on the rest of the prompt
        n_ubatch = self._n_ubatch or N_UBATCH
        known = (model.fingerprint, library.build(), parts, self._types, n_ubatch, evicts)
        return hashlib.sha256(repr(known).encode()).hexdigest()

    def _text(self, question: str, n_images: int, first: bool) -> str:
        return self._model.chat_prompt(
            question,
            n_images,
            self._template,
            first=first,
            system=self.system if first else None,
            template_options=self._template_options,
        )

    def _context_for(self, prompt: Prompt, n_predict: int, images: Prompt | None) -> Context:
        """The context, with room for this prompt: made for the first one.

        `images`: the first half of the prompt, if that is evicted by itself.
        """
        if self._context is not None:
            if self._context.n_tokens + prompt.n_tokens >= self._n_ctx:
                raise ContextFullError(
                    f"the context of {self._n_ctx} positions is full: {self._context.n_tokens} are taken and"
                    f" the message takes {prompt.n_tokens}; --n-ctx makes it larger"
                )
            return self._context

        saved, model = self._resumed, self._model
        n_ctx = model.n_ctx_for(
            prompt, n_predict, self._n_ctx_given, before=saved.state.n_tokens if saved is not None else 0
        )
        n_ubatch = self._n_ubatch
        if saved is not None:
            self._planned, self._table = saved.planned, saved.table
            n_ubatch = saved.n_ubatch  # computed as if there had been no break
        else:
            evicted, eviction = images or prompt, self._eviction
            self._planned = (evicted.n_tokens, self._n_later)
            self._table = model.plan(eviction, *self._planned)
            if images is not None and self._table is not None and eviction.window is None:
                window = min(self._table.window, defaults.IMAGE_WINDOW)
                self._table = model.plan(replace(eviction, window=window), *self._planned)
        context = Context(
            model,
            self._table,
            n_ctx=n_ctx,
            n_ubatch=n_ubatch_for(model, prompt, n_ubatch),
            cache_type_k=self._types[0],
            cache_type_v=self._types[1],
            n_outputs=1 if images is None else 2,
        )
        if saved is not None:
            try:
                context.restore(saved.state)
            except BaseException:
                context.close()
                raise
            self._resumed = None
        self._n_ctx = n_ctx
        self._context = context
        return context

    def _check_resumed(self, path: Path, saved: session_file.SavedConversation) -> None:
        """Raise SparseMMError if the saved conversation does not fit the model or the options."""
        if saved.model != self._model.fingerprint:
            raise SparseMMError(
                f"{path}: saved with another model, {saved.model_name}, or with other --lora: give that one,"
                f" not {self._model.path}"
            )
        if saved.cache_types != self._types:
            was, now = ("/".join(types) for types in (saved.cache_types, self._types))
            raise SparseMMError(
                f"{path}: saved with cache types {was}, not {now}: give --cache-type-k {saved.cache_types[0]}"
                f" --cache-type-v {saved.cache_types[1]}"
            )
        wanted = self._eviction
        if wanted == Eviction():
            return
        leave_out = "leave the options of eviction out, the file knows them"
        budgets = replace(wanted, max_tail=None)
        if budgets != Eviction() and not same_budgets(self._model.plan(budgets, *saved.planned), saved.table):
            raise SparseMMError(f"{path}: saved with other head budgets than these options give: {leave_out}")
        max_tail = None if saved.table is None else saved.table.max_tail
        if wanted.max_tail != max_tail:
            was = "without --kv-max-tail" if max_tail is None else f"with --kv-max-tail {max_tail}"
            raise SparseMMError(f"{path}: saved {was}, and cannot go on otherwise: {leave_out}")

    def _reply(
        self,
        context: Context,
        asked: "_Asked",
        n_predict: int,
        sampler: Sampler,
        stop: Sequence[str],
        asked_at: float,
    ) -> Generator[str, None, None]:
        """Sample and decode until the turn ends, a stop text appears, or n_predict tokens are generated.

        `asked_at`: time.perf_counter when the question was asked.
        """
        n_predict = min(n_predict, self._n_ctx - context.n_tokens)
        model = self._model
        tokens: list[int] = []
        decode_ms: list[float] = []
        text = codecs.getincrementaldecoder("utf-8")(errors="replace")
        stops, turn_ended = StopTexts(stop), False
        first_token = asked.first_token
        try:
            while len(tokens) < n_predict and not stops.found:
                started, logits = time.perf_counter(), asked.logits
                if tokens:
                    context.decode(tokens[-1])
                    self._pending = ()
                    logits = context.logits()
                token = sampler.sample(logits)
                now = time.perf_counter()
                if tokens:
                    decode_ms.append((now - started) * 1000)
                else:
                    chosen = Part((now - started) * 1000)
                    first_token = replace(first_token, total_ms=(now - asked_at) * 1000, token=chosen)
                if turn_ended := model.ends_turn(token):
                    break
                sampler.accept(token)
                tokens.append(token)
                self._pending = (token,)
                if piece := stops.add(text.decode(model.piece(token))):
                    yield piece
            if rest := stops.add(text.decode(b"", final=True)) + stops.rest():
                yield rest
        finally:
            per_token = sum(decode_ms) / len(decode_ms) if decode_ms else None
            timings = Timings(model.load_ms, asked.image_ms, context.prompt_ms, per_token)
            kv = context.kv_stats()
            per_token_bytes = weight_bytes_read(model.header) + kv.bytes_now
            self.last_stats = GenerationStats(
                tuple(tokens),
                turn_ended or stops.found,
                asked.n_prompt,
                kv,
                timings,
                first_token,
                per_token_bytes / per_token * 1000 if per_token else None,
                rss_peak_bytes(),
            )
