"""A process that runs one setting, or times several interleaved: python -m sparsemm_edge.profiling.worker.

It reads a pickled job (see runs.run_worker) on stdin and writes events on stdout, pickled too. It exits when
stdin is closed, that is when its parent is gone.
"""

import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.gguf_header import weight_bytes_read
from sparsemm_edge.profiling.figures import Breakdown, Measured, spread
from sparsemm_edge.profiling.jobs import CacheSetting, Task
from sparsemm_edge.profiling.memory import anon_bytes
from sparsemm_edge.runtime import Context, Eviction, Prompt, VisionModel, context_for, encode, library
from sparsemm_edge.runtime.first_token import FirstToken, Part
from sparsemm_edge.runtime.process import rss_peak_bytes
from sparsemm_edge.runtime.prompt import TextPart

N_TURNS, N_PER_TURN = 8, 5
"""Interleaved decoding: each context decodes this many tokens, the first of a turn is not counted. All of
them fit into the room that an evicted cache has from the start."""

_A_TOKEN = 300  # beyond bytes and control tokens in every vocabulary

Emit = Callable[..., None]
"""Sends an event, given its kind and by keyword its content."""


def run(task: Task, setting: CacheSetting, emit: Emit) -> None:
    """Load, compute the prompt, decode: emits each phase as it begins, then what was measured."""

    def phase(name: str) -> None:
        emit("phase", name=name, anon=anon_bytes(), rss_peak=rss_peak_bytes())

    phase("load")
    with _load(task) as model, _prompt(model, task) as prompt:
        loaded = library.logged_buffers()
        phase("context")
        begun = time.perf_counter()
        with _start(model, prompt, task, setting, n_reply=task.n_predict) as context:
            sizes = context.sizes(prompt.n_tokens, task.n_predict)
            if task.images:
                phase("image")
            encoded = encode(model, prompt)
            phase("prompt")
            context.prefill(encoded)
            chosen_at = time.perf_counter()
            token = int(context.logits().argmax())
            now = time.perf_counter()
            first_token = FirstToken(
                prompt.images_ms + (now - begun) * 1000,
                Part(prompt.images_ms),
                encoded.vision,
                context.prompt_part,
                Part((now - chosen_at) * 1000),
            )
            at_prompt = context.kv_stats()
            if setting.evicts and at_prompt.n_evictions:
                phase("eviction")
            phase("decode")
            decode_ms = []
            for _ in range(task.n_predict):
                decode_ms.append(_decode_ms(context, token))
                token = int(context.logits().argmax())
            kv, each = context.kv_stats(), spread(decode_ms)
            phase("end")
            buffers = [*loaded, *library.logged_buffers()]
            measured = Measured(
                n_prompt=prompt.n_tokens,
                n_predict=len(decode_ms),
                load_ms=model.load_ms,
                image_ms=encoded.vision.ms,
                prompt_ms=context.prompt_ms,
                prompt_tps=prompt.n_tokens / context.prompt_ms * 1000,
                first_token=first_token,
                read_bytes_per_s=(weight_bytes_read(model.header) + kv.bytes_now) / each.median * 1000,
                decode_ms=each,
                decode_tps=1000 / each.median,
                kv=kv,
                breakdown=Breakdown.of(buffers, sizes, kv, model.vision_weight_bytes),
                buffers=buffers,
            )
            emit("result", measured=measured)


def run_interleaved(task: Task, settings: list[CacheSetting], n_rounds: int, emit: Emit) -> None:
    """Time prompt and decoding of all settings, with at most one full cache in memory.

    Each full context in turn decodes interleaved with all evicted ones and with a context of two tokens (the
    cost of decoding at depth 0). Each turn is an event with the milliseconds of its tokens.
    """
    n_reply = N_TURNS * N_PER_TURN
    short = Task(task.model, n_prompt=2, loading=task.loading)
    with _load(task) as model, _prompt(model, task) as prompt, _prompt(model, short) as two:

        @contextmanager
        def after_prompt(setting: CacheSetting, round_: int) -> Iterator[Context]:
            emit("phase", name=f"round {round_ + 1}: prompt, {setting.name}")
            with _start(model, prompt, task, setting, n_reply=n_reply) as context:
                context.prefill(encode(model, prompt))
                emit("prompt", setting=setting.name, prompt_ms=context.prompt_ms)
                yield context

        for round_ in range(n_rounds):
            with ExitStack() as stack:
                held = {
                    setting.name: stack.enter_context(after_prompt(setting, round_))
                    for setting in settings
                    if setting.evicts
                }
                empty = CacheSetting(flash_attn=False)
                held["depth 0"] = stack.enter_context(_start(model, two, short, empty, n_reply=n_reply))
                held["depth 0"].prefill(encode(model, two))
                for setting in settings:
                    if not setting.evicts:
                        with after_prompt(setting, round_) as context:
                            emit("phase", name=f"round {round_ + 1}: decoding, {setting.name}")
                            _decode_interleaved({setting.name: context, **held}, setting.name, round_, emit)


def _decode_interleaved(contexts: dict[str, Context], against: str, round_: int, emit: Emit) -> None:
    for context in contexts.values():
        context.truncate_reply()
    for turn in range(N_TURNS):
        # forth and back, so that none is always first
        for name in contexts if turn % 2 == 0 else reversed(contexts):
            times = [_decode_ms(contexts[name], _A_TOKEN) for _ in range(N_PER_TURN)]
            emit("turn", setting=name, against=against, round=round_, turn=turn, decode_ms=times[1:])


def _decode_ms(context: Context, token: int) -> float:
    started = time.perf_counter()
    context.decode(token)
    return (time.perf_counter() - started) * 1000


def _load(task: Task) -> VisionModel:
    return VisionModel.load(task.model, task.mmproj, n_threads=task.n_threads, loading=task.loading)


def _prompt(model: VisionModel, task: Task) -> Prompt:
    if task.prompt is not None:
        text = model.chat_prompt(task.prompt, len(task.images), **task.frame)
        return model.tokenize(text, task.images)
    first = min(_A_TOKEN, model.n_vocab - 1)
    tokens = np.random.default_rng(0).integers(first, model.n_vocab, task.n_prompt)
    return Prompt([TextPart(tokens.astype(np.int32))])


def _start(
    model: VisionModel,
    prompt: Prompt,
    task: Task,
    setting: CacheSetting,
    *,
    n_reply: int,
) -> Context:
    eviction = replace(task.eviction, budget=setting.budget) if setting.evicts else Eviction(False)
    return context_for(
        model,
        prompt,
        n_predict=n_reply,
        n_ctx=prompt.n_tokens + n_reply,
        n_ubatch=setting.n_ubatch,
        cache_type_k=setting.cache_type,
        cache_type_v=setting.cache_type,
        eviction=eviction,
        flash_attn=setting.flash_attn,
    )


def _exit_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


def main() -> int:
    # Ctrl-C reaches the whole process group: end at once, also in the middle of llama.cpp's work
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    task, settings, n_rounds = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    # events have a stream of their own: what anything else prints goes to stderr
    events = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def emit(kind: str, **content: Any) -> None:
        pickle.dump({"event": kind, **content, "t": time.monotonic()}, events)
        events.flush()

    try:
        if n_rounds:
            run_interleaved(task, settings, n_rounds, emit)
        else:
            run(task, settings[0], emit)
    except (SparseMMError, MemoryError) as error:
        emit("failed", reason=str(error) or "out of memory")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
