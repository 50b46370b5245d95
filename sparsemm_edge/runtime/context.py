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
from sparsemm_edge.errors import SparseMMError, check_ranges
from sparsemm_edge.gguf_header import bytes_of, weight_bytes_read
from sparsemm_edge.gguf_metadata import check_supported
from sparsemm_edge.resources import machine_memory
from sparsemm_edge.runtime import library
from sparsemm_edge.runtime.attention import StrongestPositions
from sparsemm_edge.runtime.encode import Batch, Cancelled, EncodedPrompt, n_uncut, text_batch
from sparsemm_edge.runtime.eviction import Eviction, HeadBudgetTable
from sparsemm_edge.runtime.first_token import Part
from sparsemm_edge.runtime.library import ContextSizes, llama
from sparsemm_edge.runtime.model import VisionModel
from sparsemm_edge.runtime.prompt import Prompt

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
class SequenceState:
    """A saved sequence.

    Attributes:
        n_past: the next position.
        n_tokens: its length in tokens, evicted or not; with M-RoPE more than n_past.
        data: [n] bytes as llama.cpp saves them.
    """

    n_past: int
    n_tokens: int
    data: npt.NDArray[np.uint8]


class Context(Closing):
    """A llama.cpp context with one sequence. Close it or use it in a `with`: it owns llama.cpp memory.

        with Context(model, n_ctx=4096) as context:
            context.prefill(encode(model, prompt))
            context.decode(int(context.logits().argmax()))

    Attributes:
        n_past: the next position, which is not n_tokens with M-RoPE.
        n_tokens: length of the sequence in tokens, evicted or not.
        prompt_ms: time to compute the last prompt.
    """

    def __init__(
        self,
        model: VisionModel,
        table: HeadBudgetTable | None = None,
        *,
        n_ctx: int,
        n_ubatch: int | None = None,
        cache_type_k: str = "f16",
        cache_type_v: str = "f16",
        flash_attn: bool = True,
        n_outputs: int = 1,
        attention: StrongestPositions | None = None,
    ) -> None:
        """Args:
            model: the model, which must outlive the context.
            table: eviction parameters; None: no eviction.
            n_ctx: context size for all prompts and replies.
            n_ubatch: prompt tokens computed at a time, see n_ubatch_for; None: N_UBATCH.
            cache_type_k, cache_type_v: one of CACHE_TYPES.
            flash_attn: False is for comparisons; an evicting context always uses flash attention.
            n_outputs: most tokens of one decode_all; append needs 2.
            attention: records which positions the heads attend to; needs flash_attn=False and no eviction.

        Raises:
            SparseMMError: the model's layers cannot evict, or the context needs more memory than there is.
        """
        if table is not None:
            check_supported(model.header, model.shape)
        n_ubatch = min(n_ubatch or N_UBATCH, n_ctx)
        _check_room(model, n_ctx, n_ubatch, table)
        self.n_past = 0
        self.n_tokens = 0
        self.prompt_ms = 0.0
        self._model = model
        self._n_batches = 0  # ubatches of the last prompt
        self._after_prompt = (0, 0)
        self._cancelled: Callable[[], bool] | None = None
        self._types = (cache_type(cache_type_k), cache_type(cache_type_v))

        params = context_params(n_ctx, n_ubatch, *self._types, flash_attn, evicts=table is not None)
        params.n_outputs_max = n_outputs
        params.n_threads = model.n_threads
        params.n_threads_batch = model.n_threads_batch
        self._attention = attention  # the context calls it as long as it lives
        if attention is not None:
            params.cb_eval = attention.callback
            params.cb_eval_user_data = attention.user_data
        self._pointer: int | None = library.new_context(model.pointer, params, table)
        model.adapters.apply(self._pointer)

    def close(self) -> None:
        if self._pointer:
            llama.llama_free(self._pointer)
            self._pointer = None

    @property
    def pointer(self) -> int:
        """llama_context pointer."""
        if self._pointer is None:
            raise SparseMMError("the context is closed")
        return self._pointer

    @property
    def prompt_part(self) -> Part:
        """Timing of the text model for the last prompt."""
        weights = weight_bytes_read(self._model.header)
        return Part(self.prompt_ms, self._model.n_threads_batch, self._n_batches * weights)

    @property
    def n_ubatch(self) -> int:
        """Prompt tokens computed at a time."""
        return int(llama.llama_n_ubatch(self.pointer))

    def prefill(self, prompt: EncodedPrompt, cancelled: Callable[[], bool] | None = None) -> None:
        """Compute a prompt, the first or a later one; logits() are then those of the first new token.

        Args:
            prompt: what to append. An evicting cache computes all of it with the last batch.
            cancelled: polled; True cancels.

        Raises:
            Cancelled: `cancelled` returned True. The sequence is unchanged.
            SparseMMError: llama.cpp failed. The sequence is unchanged, or lost, as the error says.
        """
        if (n := prompt.n_uncut) > self.n_ubatch:
            raise SparseMMError(f"an image of {n} tokens cannot be cut: it needs --n-ubatch {n}")
        n_past, n_tokens = self.n_past, self.n_tokens
        self._cancelled = cancelled
        # asked once a node of the graph
        callback = llama.ggml_abort_callback(*([lambda _: cancelled()] if cancelled else []))
        llama.llama_set_abort_callback(self.pointer, callback, None)
        self.prompt_ms, self._n_batches = 0.0, 0
        try:
            self._read(prompt, n_outputs=1)
        except BaseException as error:
            self.n_past, self.n_tokens = n_past, n_tokens
            if not self._back_to(n_past) and isinstance(error, Exception):
                raise SparseMMError(f"{error or 'interrupted'}; the conversation so far is lost") from error
            raise
        finally:
            self._cancelled = None
            llama.llama_set_abort_callback(self.pointer, llama.ggml_abort_callback(), None)

    def append(self, prompt: EncodedPrompt) -> None:
        """Compute at least two tokens more of a prompt without eviction; needs n_outputs of 2."""
        # llama.cpp takes it for the end of a prompt only where the last token alone asks for logits
        self._read(prompt, n_outputs=2)

    def _read(self, prompt: EncodedPrompt, n_outputs: int) -> None:
        """Append a prompt, whose last n_outputs tokens ask for logits."""
        started = time.perf_counter()
        for batch in prompt.batches:
            self._decode(batch, n_outputs if batch is prompt.batches[-1] else 0)
        llama.llama_synchronize(self.pointer)
        self.prompt_ms += (time.perf_counter() - started) * 1000
        self._n_batches += -(-prompt.n_tokens // self.n_ubatch)
        self._after_prompt = (self.n_past, self.n_tokens)

    def _back_to(self, n_past: int) -> bool:
        """Drop what a failed prompt left, from position n_past on. False: the whole sequence is lost."""
        memory = self._memory()
        done = bool(llama.llama_memory_seq_rm(memory, 0, n_past, -1))
        if done and (not n_past or llama.llama_memory_seq_pos_max(memory, 0) >= 0):
            return True
        llama.llama_memory_seq_rm(memory, 0, -1, -1)
        self.n_past, self.n_tokens = 0, 0
        return False

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
            self.n_past, self.n_tokens = n_past, n_tokens
        return done

    def decode(self, token: int) -> None:
        """Append one token; logits() are then those of the next one."""
        self._decode_tokens(np.array([token], dtype=np.int32), n_outputs=1)

    def decode_all(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Append tokens in one batch, without eviction; returns the logits after each, [n, n_vocab]."""
        if not len(tokens):
            return np.empty((0, self._model.n_vocab), dtype=np.float32)
        self._decode_tokens(tokens, n_outputs=len(tokens))
        pointer = llama.llama_get_logits(self.pointer)
        return np.ctypeslib.as_array(pointer, shape=(len(tokens), self._model.n_vocab)).copy()

    def logits(self) -> npt.NDArray[np.float32]:
        """The logits of the next token: [n_vocab], a copy."""
        pointer = llama.llama_get_logits_ith(self.pointer, -1)
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

    def sizes(self, n_prompt: int, n_predict: int) -> ContextSizes:
        """What the context takes for a first prompt and n_predict tokens more. Ask before it is computed."""
        return library.context_sizes(self.pointer, n_prompt, n_predict)

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
        allocated = per_position * llama.llama_n_ctx(self.pointer)
        return KVStats(
            n_positions=self.n_tokens,
            bytes_now=allocated,
            bytes_peak=allocated,
            bytes_full=per_position * self.n_tokens,
            positions_kept_mean=float(self.n_tokens),
            n_evictions=0,
        )

    def state(self) -> SequenceState:
        """The sequence, for restore() of a context with the same model and cache types, and, if it was
        evicted, with the same head budgets."""
        data = np.empty(llama.llama_state_seq_get_size(self.pointer, 0), dtype=np.uint8)
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if llama.llama_state_seq_get_data(self.pointer, pointer, len(data), 0) != len(data):
            raise library.failure("llama.cpp cannot save the KV cache")
        return SequenceState(self.n_past, self.n_tokens, data)

    def restore(self, state: SequenceState) -> None:
        """Restore a saved sequence instead of computing a prompt.

        Raises:
            SparseMMError: llama.cpp rejects the state; the sequence is then empty.
        """
        started = time.perf_counter()
        pointer = state.data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        library.forget_errors()
        if llama.llama_state_seq_set_data(self.pointer, pointer, len(state.data), 0) != len(state.data):
            failed = library.failure("llama.cpp cannot restore the KV cache")
            self._back_to(0)
            self.n_past, self.n_tokens = 0, 0
            raise failed
        self.n_past, self.n_tokens = state.n_past, state.n_tokens
        self.prompt_ms, self._n_batches = (time.perf_counter() - started) * 1000, 0

    def _memory(self) -> int:
        return int(llama.llama_get_memory(self.pointer))

    def _decode_tokens(self, tokens: npt.NDArray[np.int32], n_outputs: int) -> None:
        """Append tokens to the reply, the last n_outputs of which ask for logits."""
        self._decode(text_batch(tokens, self.n_past), n_outputs)
        llama.llama_synchronize(self.pointer)

    def _decode(self, batch: Batch, n_outputs: int) -> None:
        """One llama_decode call. llama.cpp copies the batch, so its arrays need not outlive the call."""
        outputs = np.zeros(len(batch), dtype=np.int8)
        outputs[max(len(batch) - n_outputs, 0) :] = 1
        is_text = batch.content.ndim == 1
        content = batch.content.ctypes.data_as(ctypes.POINTER(ctypes.c_int32 if is_text else ctypes.c_float))
        given = llama.llama_batch(
            n_tokens=len(batch),
            pos=batch.positions.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            logits=outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
            **{"token" if is_text else "embd": content},
        )
        library.forget_errors()
        if batch.non_causal:
            llama.llama_set_causal_attn(self.pointer, False)
        try:
            self._check(llama.llama_decode(self.pointer, given))
        finally:
            if batch.non_causal:
                llama.llama_set_causal_attn(self.pointer, True)
        self.n_past = batch.n_past
        self.n_tokens += len(batch)

    def _check(self, status: int) -> None:
        if status != 0 and self._cancelled is not None and self._cancelled():
            raise Cancelled
        if status == 1:
            raise SparseMMError(f"the context of {llama.llama_n_ctx(self.pointer)} positions is full")
        if status != 0:
            raise library.failure(f"llama.cpp failed to compute (status {status})")


def context_for(
    model: VisionModel,
    prompt: Prompt,
    *,
    n_predict: int,
    n_ctx: int | None = None,
    n_ubatch: int | None = None,
    eviction: Eviction | None = None,
    **options: Any,
) -> Context:
    """A context for one prompt and its reply.

    Args:
        model: the model, which must outlive the context.
        prompt: the prompt, which the caller encodes and passes to prefill.
        n_predict: most tokens of the reply.
        n_ctx: context size; None: as needed.
        n_ubatch: prompt tokens computed at a time; None: N_UBATCH.
        eviction: None: the settings of the model file.
        options: the other keyword arguments of Context.
    """
    check_ranges(n_predict=n_predict, n_ctx=n_ctx, n_ubatch=n_ubatch)
    return Context(
        model,
        model.plan(eviction or Eviction(), prompt.n_tokens),
        n_ctx=model.n_ctx_for(prompt, n_predict, n_ctx),
        n_ubatch=n_ubatch_for(model, prompt, n_ubatch),
        **options,
    )


def n_ubatch_for(model: VisionModel, prompt: Prompt, n_ubatch: int | None = None) -> int:
    """n_ubatch (None: N_UBATCH), or more for an image whose tokens must be computed at once."""
    return max(n_ubatch or N_UBATCH, n_uncut(model, prompt))


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


def context_params(
    n_ctx: int,
    n_ubatch: int,
    type_k: GGMLQuantizationType,
    type_v: GGMLQuantizationType,
    flash_attn: bool,
    evicts: bool,
) -> Any:
    """llama_context_params of a context with one sequence and one output."""
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = n_ctx
    params.n_ubatch = n_ubatch
    params.n_seq_max = params.n_outputs_max = 1
    params.swa_full = not evicts  # True: windows hold all positions, which seq_rm needs
    params.type_k, params.type_v = int(type_k), int(type_v)
    params.flash_attn_type = (
        llama.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attn else llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    return params


def cache_type(name: str) -> GGMLQuantizationType:
    """The number type of a KV cache.

    Raises:
        SparseMMError: not one of CACHE_TYPES.
    """
    if name not in CACHE_TYPES:
        raise SparseMMError(f"unknown cache type {name!r}: expected one of {', '.join(CACHE_TYPES)}")
    return CACHE_TYPES[name]
