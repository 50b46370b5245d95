"""What eviction gives on this machine: LLaVA-1.5-7B's text model, cut to 8 layers, with random weights.

    python scripts/measure_7b_shape.py MODEL.gguf [--runs 3] [--n-prompt 2944] [--budget 256] [--threads 2]

MODEL.gguf is made if it is not there (1.1 GB, Q4_0). One prompt is read by the same library with eviction
(head scores of LLaVA-NeXT-Vicuna-7B) and without it at both flash-attention settings, by turns, and each
context then decodes in turn, so that a noisy machine treats all alike. Medians are printed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import quantize

from sparsemm_edge.budgets import head_budgets
from sparsemm_edge.runtime import VisionModel, library
from sparsemm_edge.runtime.prompt import Prompt, TextPart
from sparsemm_edge.runtime.session import Session
from sparsemm_edge.scores import HeadScores

SCORES = Path(__file__).parent.parent / "scores" / "llava-v1.6-vicuna-7b.head-scores.json"
N_LAYER, N_HEAD, HEAD_DIM, N_FF, N_VOCAB = 8, 32, 128, 11008, 32000
WINDOW, POOL_KERNEL = 32, 7
SETTINGS = {"evicted": (True, True), "full, flash attention": (False, True), "full": (False, False)}


def make_model(path: Path) -> None:
    """A LLaMA of the 7B shape with 8 layers: each matrix repeats 256 random rows of Q4_0 blocks."""
    n_embd = N_HEAD * HEAD_DIM
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(8192)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(N_LAYER)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_vocab_size(N_VOCAB)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL] * (N_VOCAB - len(tokens))
    tokens += [f"t{i}" for i in range(len(tokens), N_VOCAB)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * N_VOCAB)
    writer.add_token_types(kinds)

    def matrix(name: str, n_out: int, n_in: int) -> None:
        rows = rng.standard_normal((256, n_in), dtype=np.float32) / np.sqrt(n_in)
        blocks = quantize(rows, gguf.GGMLQuantizationType.Q4_0)
        writer.add_tensor(name, blocks[rng.integers(0, 256, n_out)], raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    matrix("token_embd.weight", N_VOCAB, n_embd)
    for il in range(N_LAYER):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{il}.{name}.weight", np.ones(n_embd, np.float32))
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"blk.{il}.{name}.weight", n_embd, n_embd)
        matrix(f"blk.{il}.ffn_gate.weight", N_FF, n_embd)
        matrix(f"blk.{il}.ffn_up.weight", N_FF, n_embd)
        matrix(f"blk.{il}.ffn_down.weight", n_embd, N_FF)
    writer.add_tensor("output_norm.weight", np.ones(n_embd, np.float32))
    matrix("output.weight", N_VOCAB, n_embd)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--runs", type=int, default=3, help="times that the prompt is read")
    parser.add_argument("--n-prompt", type=int, default=2944)
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if not arguments.model.exists():
        make_model(arguments.model)

    scores = HeadScores.load(SCORES).scores[:N_LAYER]
    table = head_budgets(
        "sparsemm",
        scores / scores.sum(),
        n_layer=N_LAYER,
        n_head_kv=N_HEAD,
        budget=arguments.budget,
        window=WINDOW,
        n_prompt=arguments.n_prompt,
    )
    ids = np.random.default_rng(0).integers(300, N_VOCAB, arguments.n_prompt).astype(np.int32)
    prompt_s: dict[str, list[float]] = {name: [] for name in SETTINGS}
    decode_s: dict[str, list[float]] = {name: [] for name in (*SETTINGS, "depth 0")}
    with VisionModel.load(arguments.model, n_threads=arguments.threads) as model, ExitStack() as stack:
        library.set_head_budgets(model.pointer, table, WINDOW, POOL_KERNEL)

        def start(evict: bool, flash_attn: bool, tokens: np.ndarray) -> Session:
            library.set_head_eviction(model.pointer, evict)
            return Session(model, Prompt([TextPart(tokens)]), n_ctx=len(tokens) + 128, flash_attn=flash_attn)

        sessions: dict[str, Session] = {}
        for run in range(arguments.runs):
            for name, (evict, flash_attn) in SETTINGS.items():
                session = start(evict, flash_attn, ids)
                prompt_s[name].append(seconds(session.read_prompt))
                if run + 1 < arguments.runs:
                    session.close()
                else:
                    sessions[name] = stack.enter_context(session)
        at_peak = sessions["evicted"].kv_stats()
        sessions["depth 0"] = stack.enter_context(start(False, False, ids[:2]))
        sessions["depth 0"].read_prompt()
        for _ in range(12):
            for name, session in sessions.items():
                session.decode(300)  # after a pause, not counted
                decode_s[name] += [seconds(lambda session=session: session.decode(301)) for _ in range(4)]

    print(f"{'':24}{'prompt s':>12}{'decode ms':>12}")
    for name, times in decode_s.items():
        prompt = f"{np.median(prompt_s[name]):12.1f}" if name in prompt_s else " " * 12
        print(f"{name:24}{prompt}{np.median(times) * 1e3:12.1f}")
    better = min(np.median(decode_s["full"]), np.median(decode_s["full, flash attention"]))
    print(f"decode ratio {better / np.median(decode_s['evicted']):.2f}", end=", ")
    print(f"limit (depth 0) {better / np.median(decode_s['depth 0']):.2f}")
    print(f"K and V after the prompt {at_peak.bytes_now / at_peak.bytes_full:.1%} of full", end=", ")
    print(f"at their peak {at_peak.bytes_peak / at_peak.bytes_full:.1%}")


if __name__ == "__main__":
    main()
