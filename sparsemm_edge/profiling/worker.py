"""A process that runs one setting, or times several interleaved: python -m sparsemm_edge.profiling.worker.

It reads a job as one JSON line on stdin and writes events as JSON lines on stdout. It exits when stdin is
closed, that is when its parent is gone.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.gguf_header import weight_bytes, weight_bytes_read
from sparsemm_edge.profiling.jobs import CacheSetting, Event, Task
from sparsemm_edge.profiling.memory import anon_bytes
from sparsemm_edge.runtime import Context, Eviction, Prompt, VisionModel, context_for, encode, library
from sparsemm_edge.runtime.first_token import FirstToken, Part
from sparsemm_edge.runtime.process import rss_peak_bytes
from sparsemm_edge.runtime.prompt import TextPart

N_TURNS, N_PER_TURN = 8, 5
"""Interleaved decoding: each context decodes this many tokens, the first of a turn is not counted. All of
them fit into the room that an evicted cache has from the start."""

Emit = Callable[[Event], None]


def run(task: Task, setting: CacheSetting, emit: Emit) -> None:
    """Load, compute the prompt, decode: emits each phase as it begins, then one result."""

    def phase(name: str) -> None:
        emit({"event": "phase", "name": name, "anon": anon_bytes()})

    phase("load")
    with _load(task) as model, _prompt(model, task) as prompt:
        loaded = library.logged_buffers()
        phase("context")
        begun = time.perf_counter()
        with _start(model, prompt, task, setting, n_reply=task.n_predict) as session:
            sizes = session.sizes(prompt.n_tokens, task.n_predict)
            if task.images:
                phase("image")
            encoded = encode(model, prompt)
            phase("prompt")
            session.prefill(encoded)
            chosen_at = time.perf_counter()
            token = int(session.logits().argmax())
            now = time.perf_counter()
            first_token = FirstToken(
                prompt.images_ms + (now - begun) * 1000,
                Part(prompt.images_ms),
                encoded.vision,
                session.prompt_part,
                Part((now - chosen_at) * 1000),
            )
            at_prompt = session.kv_stats()
            if setting.evicts and at_prompt.n_evictions:
                phase("eviction")
            phase("decode")
            decode_ms = []
            for _ in range(task.n_predict):
                started = time.perf_counter()
                session.decode(token)
                decode_ms.append((time.perf_counter() - started) * 1000)
                token = int(session.logits().argmax())
            kv = session.kv_stats()
            phase("end")
            emit(
                {
                    "event": "result",
                    "n_prompt": prompt.n_tokens,
                    "n_prompt_calls": len(encoded.batches),
                    "n_threads": model.n_threads,
                    "load_ms": model.load_ms,
                    "image_ms": encoded.vision.ms,
                    "prompt_ms": session.prompt_ms,
                    "first_token": asdict(first_token),
                    "token_bytes": weight_bytes_read(model.header) + kv.bytes_now,
                    "decode_ms": decode_ms,
                    "kv": asdict(kv),
                    "context": asdict(sizes),
                    "rss_peak_bytes": rss_peak_bytes(),
                    "vision_weight_bytes": 0 if task.mmproj is None else weight_bytes(Path(task.mmproj)),
                    "buffers": [asdict(buffer) for buffer in (*loaded, *library.logged_buffers())],
                }
            )


def run_interleaved(task: Task, settings: list[CacheSetting], n_rounds: int, emit: Emit) -> None:
    """Time prompt and decoding of all settings, with at most one full cache in memory.

    Each full context in turn decodes interleaved with all evicted ones and with a context of two tokens (the
    cost of decoding at depth 0). Each turn is an event with the milliseconds of its tokens.
    """
    n_reply = N_TURNS * N_PER_TURN
    short = Task(task.model, n_prompt=2, loading=task.loading)
    with _load(task) as model, _prompt(model, task) as prompt, _prompt(model, short) as two:
        for round_ in range(n_rounds):
            with ExitStack() as stack:
                held: dict[str, Context] = {}

                def open_session(setting: CacheSetting, stack: ExitStack, round_: int = round_) -> Context:
                    emit({"event": "phase", "name": f"round {round_ + 1}: prompt, {setting.name}"})
                    session = stack.enter_context(_start(model, prompt, task, setting, n_reply=n_reply))
                    session.prefill(encode(model, prompt))
                    emit(
                        {
                            "event": "prompt",
                            "setting": setting.name,
                            "round": round_,
                            "n_prompt": prompt.n_tokens,
                            "prompt_ms": session.prompt_ms,
                        }
                    )
                    return session

                for setting in settings:
                    if setting.evicts:
                        held[setting.name] = open_session(setting, stack)
                empty = CacheSetting(flash_attn=False)
                held["depth 0"] = stack.enter_context(_start(model, two, short, empty, n_reply=n_reply))
                held["depth 0"].prefill(encode(model, two))
                for setting in settings:
                    if setting.evicts:
                        continue
                    with ExitStack() as one:
                        session = open_session(setting, one)
                        emit({"event": "phase", "name": f"round {round_ + 1}: decoding, {setting.name}"})
                        _decode_interleaved({setting.name: session, **held}, setting.name, round_, emit)


def _decode_interleaved(sessions: dict[str, Context], against: str, round_: int, emit: Emit) -> None:
    for session in sessions.values():
        session.truncate_reply()
    for turn in range(N_TURNS):
        # forth and back, so that none is always first
        order = list(sessions) if turn % 2 == 0 else list(reversed(sessions))
        for name in order:
            times = []
            for _ in range(N_PER_TURN):
                started = time.perf_counter()
                sessions[name].decode(_A_TOKEN)
                times.append((time.perf_counter() - started) * 1000)
            emit(
                {
                    "event": "turn",
                    "setting": name,
                    "against": against,
                    "round": round_,
                    "turn": turn,
                    "decode_ms": times[1:],
                }
            )


_A_TOKEN = 300  # beyond bytes and control tokens in every vocabulary


def _load(task: Task) -> VisionModel:
    return VisionModel.load(task.model, task.mmproj, n_threads=task.n_threads, loading=task.loading)


def _prompt(model: VisionModel, task: Task) -> Prompt:
    if task.prompt is not None:
        text = model.chat_prompt(
            task.prompt,
            len(task.images),
            task.chat_template,
            system=task.system,
            template_options=task.template_options,
        )
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
    job: dict[str, Any] = json.loads(_read_line())
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    # events have a stream of their own: what anything else prints goes to stderr
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def emit(event: Event) -> None:
        event["t"] = time.monotonic()
        events.write(json.dumps(event) + "\n")
        events.flush()

    task = Task.from_json(job["task"])
    settings = [CacheSetting(**setting) for setting in job["settings"]]
    try:
        if job["n_rounds"]:
            run_interleaved(task, settings, job["n_rounds"], emit)
        else:
            run(task, settings[0], emit)
    except (SparseMMError, MemoryError) as error:
        emit({"event": "failed", "reason": str(error) or "out of memory"})
        return 2
    return 0


def _read_line() -> str:
    """One line of stdin, unbuffered, so that nothing after it is consumed."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            sys.exit(1)
        line += byte
    return line.decode()


if __name__ == "__main__":
    sys.exit(main())
