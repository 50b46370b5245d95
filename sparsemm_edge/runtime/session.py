"""One llama.cpp context: prefill, decode, save and restore its state."""

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from sparsemm_edge.closing import Closing
from sparsemm_edge.defaults import MAX_POSITIONS
from sparsemm_edge.errors import SparseMMError, check_within
from sparsemm_edge.gguf_header import bytes_of, weight_bytes_read
from sparsemm_edge.gguf_metadata import check_supported
from sparsemm_edge.resources import machine_memory
from sparsemm_edge.runtime import library
from sparsemm_edge.runtime.attention import StrongestPositions
from sparsemm_edge.runtime.eviction import Eviction, HeadBudgetTable
from sparsemm_edge.runtime.first_token import Part
from sparsemm_edge.runtime.library import ContextSizes, llama, mtmd
from sparsemm_edge.runtime.model import VisionModel
from sparsemm_edge.runtime.prompt import ImagePart, Prompt, TextPart

CACHE_TYPES = {
    "f16": GGMLQuantizationType.F16,
    "f32": GGMLQuantizationType.F32,
    "bf16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
    "q4_0": GGMLQuantizationType.Q4_0,
}
N_UBATCH = 512  # llama.cpp's default


@dataclass(frozen=True)
class KVStats:
    """Statistics of the KV cache.

    Attributes:
        n_positions: positions of the sequence, kept or evicted.
        bytes_now: allocated for K and V now.
        bytes_peak: the largest allocation, while the prompt is computed.
        bytes_full: the full cache of the same positions.
        positions_kept_mean: kept positions, mean over layers and KV heads.
        n_evictions: prompts so far that exceeded some head's budget.
    """

    n_positions: int
    bytes_now: int
    bytes_peak: int
    bytes_full: int
    positions_kept_mean: float
    n_evictions: int

    def in_words(self) -> str:
        """The size of the cache, beside that of the full cache."""
        now, full = self.bytes_now / 2**20, self.bytes_full / 2**20
        if not self.n_evictions:
            every = f"all {self.n_positions} positions, none evicted"
            return f"{now:.1f} MiB allocated, {full:.1f} MiB in use: {every}"
        kept = f"{self.positions_kept_mean:.0f} of {self.n_positions} positions a head"
        return f"{now:.1f} MiB of {full:.1f} MiB unevicted; {kept}"


@dataclass(frozen=True)
class Prefix:
    """The KV cache of a prompt's first tokens, not evicted. Sessions with any head budgets can start from it.

    Attributes:
        state: as llama.cpp saves it, for a cache of the same types.
        n_tokens: places in the KV cache.
    """

    state: npt.NDArray[np.uint8]
    n_tokens: int


@dataclass(frozen=True)
class SessionState:
    """A saved sequence.

    Attributes:
        n_past: the next position.
        n_tokens: its length in tokens, evicted or not; with M-RoPE more than n_past.
        data: [n] bytes as llama.cpp saves them.
    """

    n_past: int
    n_tokens: int
    data: npt.NDArray[np.uint8]


class Cancelled(Exception):
    """The caller cancelled a prompt; the session is unchanged."""


class Session(Closing):
    """A context, sized to its first prompt. Close it or use it in a `with`: it owns llama.cpp memory.

    Attributes:
        n_tokens: length of the sequence in tokens, evicted or not.
        n_prompt_calls: llama_decode calls for the last prompt.
        image_ms, prompt_ms: time to encode its images and to compute it.
    """

    def __init__(
        self,
        model: VisionModel,
        prompt: Prompt,
        table: HeadBudgetTable | None = None,
        *,
        n_ctx: int,
        n_ubatch: int | None = None,
        cache_type_k: str = "f16",
        cache_type_v: str = "f16",
        flash_attn: bool = True,
        on_phase: Callable[[str], None] | None = None,
        n_outputs: int = 1,
        attention: StrongestPositions | None = None,
    ) -> None:
        """Make the context.

        Args:
            model: the model, which must outlive the session.
            prompt: what read_prompt will read; must outlive read_prompt.
            table: eviction parameters; None: no eviction.
            n_ctx: context size for all prompts and replies.
            n_ubatch: prompt tokens computed at a time; None: N_UBATCH.
            cache_type_k, cache_type_v: one of CACHE_TYPES.
            flash_attn: False is for comparisons; an evicting context always uses flash attention.
            on_phase: called with "image" and "prompt" when read_prompt starts to encode an image and to run
                the text model.
            n_outputs: most tokens of one decode_all; append and read_prefix need 2.
            attention: records which positions the heads attend to; needs flash_attn=False and no eviction.
        """
        self.image_ms = 0.0
        self.prompt_ms = 0.0
        self._n_encoded = 0  # images and tiles of the last prompt that were encoded
        self._n_batches = 0  # in how many ubatches it was read
        self.n_prompt_calls = 0
        self._model = model
        self._prompt = prompt
        self._n_past = 0  # the next position, which is not n_tokens with M-RoPE
        self.n_tokens = 0
        self._after_prompt = (0, 0)
        self._n_calls = 0
        self._on_phase = on_phase or (lambda _: None)
        self._cancelled: Callable[[], bool] | None = None
        self._types = (cache_type(cache_type_k), cache_type(cache_type_v))

        params = llama.llama_context_default_params()
        params.n_ctx = params.n_batch = n_ctx
        params.n_ubatch = max(min(n_ubatch or N_UBATCH, n_ctx), self._n_uncut())
        params.n_seq_max = 1
        params.swa_full = table is None  # True: windows hold all positions, which seq_rm needs
        params.n_outputs_max = n_outputs
        params.n_threads = model.n_threads
        params.n_threads_batch = model.n_threads_batch
        params.flash_attn_type = (
            llama.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attn else llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.type_k, params.type_v = (int(kind) for kind in self._types)
        self._attention = attention  # the context calls it as long as it lives
        if attention is not None:
            params.cb_eval = attention.callback
            params.cb_eval_user_data = attention.user_data
        self._context: int | None = library.new_context(model.pointer, params, table)
        model.adapters.apply(self._context)

    def close(self) -> None:
        if self._context:
            llama.llama_free(self._context)
            self._context = None

    @property
    def context(self) -> int:
        """llama_context pointer."""
        if self._context is None:
            raise SparseMMError("the session is closed")
        return self._context

    @property
    def vision_part(self) -> Part:
        """Timing of the image encoder for the last prompt."""
        model = self._model
        return Part(self.image_ms, model.n_threads, self._n_encoded * model.vision_weight_bytes)

    @property
    def prompt_part(self) -> Part:
        """Timing of the text model for the last prompt."""
        weights = weight_bytes_read(self._model.header)
        return Part(self.prompt_ms, self._model.n_threads_batch, self._n_batches * weights)

    @property
    def takes_prefix(self) -> bool:
        """Whether this prompt can be split at any token."""
        return not self._n_uncut()

    @property
    def n_ubatch(self) -> int:
        """Prompt tokens computed at a time."""
        return int(llama.llama_n_ubatch(self.context))

    def read_prefix(self, n_tokens: int) -> Prefix:
        """Compute only the first tokens of the prompt, at least two of one part, without eviction.

        Needs takes_prefix, a context that may evict, and n_outputs of 2.
        """
        self._read_parts(stop=n_tokens, n_outputs=2)
        llama.llama_synchronize(self.context)
        return Prefix(self._state(), n_tokens)

    def read(self, prompt: Prompt, cancelled: Callable[[], bool] | None = None) -> None:
        """Append a prompt, the first or a later one. If that fails, the sequence is unchanged.

        Args:
            prompt: what to append; must live until this returns.
            cancelled: polled; True cancels.

        Raises:
            Cancelled: `cancelled` returned True.
            SparseMMError: llama.cpp failed. n_tokens is unchanged, or 0 if the sequence was lost, as the
                error says.
        """
        self._prompt = prompt
        if (n_uncut := self._n_uncut()) > self.n_ubatch:
            raise SparseMMError(f"an image of {n_uncut} tokens cannot be cut: it needs --n-ubatch {n_uncut}")
        before = (self._n_past, self.n_tokens)
        self._cancelled = cancelled
        # asked once a node of the graph
        callback = llama.ggml_abort_callback(*([lambda _: cancelled()] if cancelled else []))
        llama.llama_set_abort_callback(self.context, callback, None)
        try:
            self.read_prompt()
        except BaseException as error:
            self._n_past, self.n_tokens = before
            if not self._back_to(self._n_past) and isinstance(error, Exception):
                raise SparseMMError(f"{error or 'interrupted'}; the conversation so far is lost") from error
            raise
        finally:
            self._cancelled = None
            llama.llama_set_abort_callback(self.context, llama.ggml_abort_callback(), None)

    def _back_to(self, n_past: int) -> bool:
        """Drop what a failed prompt left, from position n_past on. False: the whole sequence is lost."""
        memory = self._memory()
        done = bool(llama.llama_memory_seq_rm(memory, 0, n_past, -1))
        if done and (not n_past or llama.llama_memory_seq_pos_max(memory, 0) >= 0):
            return True
        llama.llama_memory_seq_rm(memory, 0, -1, -1)
        self._n_past, self.n_tokens = 0, 0
        return False

    def read_prompt(self, prefix: Prefix | None = None) -> None:
        """Encode the images and compute the prompt; logits() are then those of the first new token.

        Args:
            prefix: of read_prefix in another session with the same prompt; only the rest is computed.
        """
        self._on_phase("prompt")
        start, self.image_ms, self._n_calls = time.perf_counter(), 0.0, 0
        before = (self.n_tokens, self._model.n_encoded)
        if prefix is not None:
            self._restore(prefix.state)
            self.n_tokens = prefix.n_tokens
            before = (self.n_tokens, before[1])
        self._read_parts(start=prefix.n_tokens if prefix is not None else 0)
        llama.llama_synchronize(self.context)
        self.prompt_ms = _ms_since(start) - self.image_ms
        self._n_batches = -(-(self.n_tokens - before[0]) // self.n_ubatch)
        self._n_encoded = self._model.n_encoded - before[1]
        self.n_prompt_calls = self._n_calls
        self._after_prompt = (self._n_past, self.n_tokens)

    def append(self, tokens: npt.NDArray[np.int32]) -> None:
        """Append text without eviction; needs n_outputs of 2."""
        # llama.cpp takes it for the end of a prompt only where the last token alone asks for logits
        start = time.perf_counter()
        self._decode_tokens(tokens, n_outputs=2)
        llama.llama_synchronize(self.context)
        self.prompt_ms += _ms_since(start)
        self._n_batches += -(-len(tokens) // self.n_ubatch)
        self._after_prompt = (self._n_past, self.n_tokens)

    def truncate_reply(self, n_keep: int = 0) -> None:
        """Drop the tokens decoded since the last prompt, except the first n_keep."""
        n_past, n_tokens = self._after_prompt
        library.forget_errors()
        if not self.truncate(n_past + n_keep, n_tokens + n_keep):
            raise library.failure("llama.cpp cannot drop the reply")

    def truncate(self, n_past: int, n_tokens: int) -> bool:
        """Drop the end of the sequence, at most the observation window of its last prompt.

        Args:
            n_past: the next position afterwards.
            n_tokens: length of the sequence afterwards.

        Returns:
            False, and nothing dropped, if some head no longer holds all of that end.
        """
        memory = self._memory()
        # where other layers hold something else, only this function asks them too
        mixed = self._model.shape.layers is not None
        if library.heads_stats(memory) is not None and not mixed:
            done = library.heads_truncate(memory, n_tokens)
        else:
            done = bool(llama.llama_memory_seq_rm(memory, 0, n_past, -1))
        if done:
            self._n_past, self.n_tokens = n_past, n_tokens
        return done

    def decode(self, token: int) -> None:
        """Append one token; logits() are then those of the next one."""
        self._decode_tokens(np.array([token], dtype=np.int32), n_outputs=1)
        llama.llama_synchronize(self.context)

    def decode_all(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Append tokens in one batch, without eviction; returns the logits after each, [n, n_vocab]."""
        if not len(tokens):
            return np.empty((0, self._model.n_vocab), dtype=np.float32)
        self._decode_tokens(tokens, n_outputs=len(tokens))
        llama.llama_synchronize(self.context)
        pointer = llama.llama_get_logits(self.context)
        return np.ctypeslib.as_array(pointer, shape=(len(tokens), self._model.n_vocab)).copy()

    def logits(self) -> npt.NDArray[np.float32]:
        """The logits of the next token: [n_vocab], a copy."""
        pointer = llama.llama_get_logits_ith(self.context, -1)
        if not pointer:
            raise SparseMMError("there are no logits before the prompt is read")
        return np.ctypeslib.as_array(pointer, shape=(self._model.n_vocab,)).copy()

    def kept_positions(self, layer: int, head_kv: int) -> npt.NDArray[np.int32]:
        """The positions that one KV head holds, ascending: [n] indices of tokens in the sequence."""
        return library.heads_positions(self._memory(), layer, head_kv)

    def kept(self) -> list[list[npt.NDArray[np.int32]]]:
        """The positions that every KV head holds: kept[layer][head_kv], as kept_positions."""
        shape = self._model.shape
        return [
            [self.kept_positions(layer, head) for head in range(shape.n_head_kv)]
            for layer in range(shape.n_layer)
        ]

    def n_residual(self) -> int:
        """Number of KV heads with a residual slot, over all layers."""
        shape, memory = self._model.shape, self._memory()
        if library.heads_stats(memory) is None:
            return 0
        return sum(
            library.heads_n_lost(memory, layer, head) > 0
            for layer in range(shape.n_layer)
            for head in range(shape.n_head_kv)
        )

    def context_sizes(self, n_predict: int) -> ContextSizes:
        """What the context takes for its prompt and n_predict tokens more. Ask before the prompt is read."""
        return library.context_sizes(self.context, self._prompt.n_tokens, n_predict)

    def kv_stats(self) -> KVStats:
        """Statistics of the KV cache."""
        stats = library.heads_stats(self._memory())
        shape = self._model.shape
        if stats is not None:
            return KVStats(
                n_positions=stats.n_pos,
                bytes_now=stats.size_k + stats.size_v,
                bytes_peak=stats.size_k_peak + stats.size_v_peak,
                bytes_full=stats.size_full,
                positions_kept_mean=stats.n_kept / (shape.n_layer * shape.n_head_kv),
                n_evictions=stats.n_evictions,
            )
        # llama.cpp's plain cache: all of n_ctx is allocated up front, for every layer
        type_k, type_v = self._types
        head = bytes_of(type_k, shape.n_embd_head_k) + bytes_of(type_v, shape.n_embd_head_v)
        per_position = head * shape.n_head_kv * shape.n_layer
        allocated = per_position * llama.llama_n_ctx(self.context)
        return KVStats(
            n_positions=self.n_tokens,
            bytes_now=allocated,
            bytes_peak=allocated,
            bytes_full=per_position * self.n_tokens,
            positions_kept_mean=float(self.n_tokens),
            n_evictions=0,
        )

    def state(self) -> SessionState:
        """The sequence, for restore() of a session with the same model, head budgets and cache types."""
        return SessionState(self._n_past, self.n_tokens, self._state())

    def restore(self, state: SessionState) -> None:
        """Restore a saved sequence instead of computing a prompt.

        Raises:
            SparseMMError: llama.cpp rejects the state; the sequence is then empty.
        """
        start = time.perf_counter()
        try:
            self._restore(state.data)
        except SparseMMError:
            self._back_to(0)
            self._n_past, self.n_tokens = 0, 0
            raise
        self.image_ms, self.prompt_ms = 0.0, _ms_since(start)
        self._n_encoded = self._n_batches = 0
        self._n_past, self.n_tokens = state.n_past, state.n_tokens

    def _images(self) -> list[ImagePart]:
        return [part for part in self._prompt.parts if isinstance(part, ImagePart)]

    def _n_uncut(self) -> int:
        """Tokens of the largest image with non-causal attention, which must be one batch."""
        return max((part.n_tokens for part in self._images() if self._model.is_non_causal(part)), default=0)

    def _memory(self) -> int:
        return int(llama.llama_get_memory(self.context))

    def _read_parts(self, start: int = 0, stop: int | None = None, n_outputs: int = 1) -> None:
        """Compute the prompt's tokens from start to stop, one call per text part and per image.

        The last n_outputs ask for logits. An evicting cache defers the earlier calls and computes them all
        with the last one.
        """
        stop = self._prompt.n_tokens if stop is None else stop
        at = 0
        for part in self._prompt.parts:
            first, last = max(start - at, 0), min(stop - at, part.n_tokens)
            at += part.n_tokens
            if first >= last:
                self._n_past += part.n_pos if last > 0 else 0
                continue
            n = n_outputs if at >= stop else 0
            if isinstance(part, TextPart):
                self._n_past += first
                self._decode_tokens(part.tokens[first:last], n_outputs=n)
            else:
                self._decode_image(part, slice(first, last), n_outputs=n)

    def _decode_image(self, part: ImagePart, rows: slice, *, n_outputs: int) -> None:
        """Append some tokens of an image."""
        non_causal = self._model.is_non_causal(part)
        embeddings = np.ascontiguousarray(self._encode(part)[rows])
        positions = np.ascontiguousarray(self._image_positions(part, self._n_past)[:, rows])
        if part is self._images()[-1]:
            if self._model.loading.unload_mmproj:
                self._model.unload_encoder()
            else:
                self._model.free_encoder_buffers()
        if non_causal:
            llama.llama_set_causal_attn(self.context, False)
        try:
            pointer = embeddings.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            self._decode(positions, n_outputs, embd=pointer)
        finally:
            if non_causal:
                llama.llama_set_causal_attn(self.context, True)
        self._n_past += part.n_pos

    def _encode(self, part: ImagePart) -> npt.NDArray[np.float32]:
        """VisionModel.encode_image, and how long it took: [n_tokens, n_embd_inp]."""
        self._on_phase("image")
        start = time.perf_counter()
        embeddings = self._model.encode_image(part)
        self.image_ms += _ms_since(start)
        self._on_phase("prompt")
        return embeddings

    def _image_positions(self, part: ImagePart, pos: int) -> npt.NDArray[np.int32]:
        """Positions of an image that starts at pos: [1, n], with M-RoPE [4, n] (time, height, width, 0)."""
        if not self._model.uses_mrope:
            return np.arange(pos, pos + part.n_tokens, dtype=np.int32)[None]
        found = (mtmd.mtmd_decoder_pos * part.n_tokens)()
        image = mtmd.mtmd_input_chunk_get_tokens_image(part.chunk)
        mtmd.mtmd_helper_image_get_decoder_pos(image, pos, found)
        t, x, y, z = np.ctypeslib.as_array(found).view(np.uint32).reshape(-1, 4).T
        return np.stack([t, y, x, z]).astype(np.int32)

    def _state(self) -> npt.NDArray[np.uint8]:
        """The KV cache as llama.cpp saves it."""
        state = np.empty(llama.llama_state_seq_get_size(self.context, 0), dtype=np.uint8)
        pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if llama.llama_state_seq_get_data(self.context, pointer, len(state), 0) != len(state):
            raise library.failure("llama.cpp cannot save the KV cache")
        return state

    def _restore(self, state: npt.NDArray[np.uint8]) -> None:
        """Restore what _state returned."""
        pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        library.forget_errors()
        if llama.llama_state_seq_set_data(self.context, pointer, len(state), 0) != len(state):
            raise library.failure("llama.cpp cannot restore the KV cache")

    def _decode_tokens(self, tokens: npt.NDArray[np.int32], *, n_outputs: int) -> None:
        """Append tokens, the last n_outputs of which ask for logits."""
        positions = np.arange(self._n_past, self._n_past + len(tokens), dtype=np.int32)
        self._decode(positions, n_outputs, token=tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)))
        self._n_past += len(tokens)

    def _decode(self, positions: npt.NDArray[np.int32], n_outputs: int, **content: Any) -> None:
        """One llama_decode call. llama.cpp copies the batch, so its arrays need not outlive the call.

        Args:
            positions: [n], with M-RoPE [4, n] for embeddings.
            n_outputs: how many of the last tokens ask for logits.
            content: what the batch holds: a pointer to tokens as `token`, or to embeddings as `embd`.
        """
        n_tokens = positions.shape[-1]
        outputs = np.zeros(n_tokens, dtype=np.int8)
        outputs[max(n_tokens - n_outputs, 0) :] = 1
        batch = llama.llama_batch(
            n_tokens=n_tokens,
            pos=positions.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            logits=outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
            **content,
        )
        library.forget_errors()
        self._check(llama.llama_decode(self.context, batch))
        self.n_tokens += n_tokens
        self._n_calls += 1

    def _check(self, status: int) -> None:
        if status != 0 and self._cancelled is not None and self._cancelled():
            raise Cancelled
        if status == 1:
            raise SparseMMError(f"the context of {llama.llama_n_ctx(self.context)} positions is full")
        if status != 0:
            raise library.failure(f"llama.cpp failed to compute (status {status})")


def start_session(
    model: VisionModel,
    prompt: Prompt,
    *,
    n_predict: int,
    n_ctx: int | None = None,
    n_ubatch: int | None = None,
    cache_type_k: str = "f16",
    cache_type_v: str = "f16",
    eviction: Eviction | None = None,
    flash_attn: bool = True,
    on_phase: Callable[[str], None] | None = None,
) -> Session:
    """Create a session for a prompt; arguments as for Conversation and Session."""
    for name, value in (("n_predict", n_predict), ("n_ctx", n_ctx), ("n_ubatch", n_ubatch)):
        if value is not None:
            check_within(name, value, 1, MAX_POSITIONS)
    cache_type(cache_type_k), cache_type(cache_type_v)
    return start_session_with(
        model,
        prompt,
        model.plan(eviction or Eviction(), prompt.n_tokens),
        n_ctx=model.n_ctx_for(prompt, n_predict, n_ctx),
        n_ubatch=n_ubatch,
        cache_type_k=cache_type_k,
        cache_type_v=cache_type_v,
        flash_attn=flash_attn,
        on_phase=on_phase,
    )


def start_session_with(
    model: VisionModel, prompt: Prompt, table: HeadBudgetTable | None, **options: Any
) -> Session:
    """Create a session that evicts by a table; None: the full cache. Options as for Session."""
    if table is not None:
        check_supported(model.header, model.shape)
    n_ubatch = min(options.get("n_ubatch") or N_UBATCH, options["n_ctx"])
    _check_room(model, options["n_ctx"], n_ubatch, table)
    return Session(model, prompt, table, **options)


def _check_room(model: VisionModel, n_ctx: int, n_ubatch: int, table: HeadBudgetTable | None) -> None:
    """Raise SparseMMError if a context needs more memory than the machine has."""
    # K and V of 4 bits at least; where it evicts the mask of a batch, the attention of the window and its
    # transpose, and seven tables of what the KV heads of a layer hold
    shape = model.shape
    each = shape.kv_bytes(shape.n_layer * shape.n_head_kv, 1) // 2
    if table is not None:
        each = 2 * n_ubatch + 2 * 4 * shape.n_head * table.window + 7 * 4 * shape.n_head_kv
    least, total = n_ctx * each, machine_memory()[0]
    if least > total:
        raise SparseMMError(
            f"a context of {n_ctx} positions takes more than {least / 2**30:.1f} GiB, this machine has"
            f" {total / 2**30:.1f} GiB: --n-ctx makes it smaller"
        )


def cache_type(name: str) -> GGMLQuantizationType:
    """The number type of a KV cache.

    Raises:
        SparseMMError: not one of CACHE_TYPES.
    """
    if name not in CACHE_TYPES:
        raise SparseMMError(f"unknown cache type {name!r}: expected one of {', '.join(CACHE_TYPES)}")
    return CACHE_TYPES[name]


def _ms_since(start: float) -> float:
    return (time.perf_counter() - start) * 1000
