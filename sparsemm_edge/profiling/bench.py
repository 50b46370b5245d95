"""What eviction would give here: prompt and decode speed and memory over prompt lengths and budgets.

Every setting is run twice over: in a process of its own, which tells its memory, and by turns with the others
in one process, which tells the speeds that are compared.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.gguf_header import GGUFHeader, read_header, weight_bytes, weight_bytes_read
from sparsemm_edge.gguf_metadata import check_supported, model_shape, sparsemm_metadata
from sparsemm_edge.kv_layout import full_cache, row_bytes
from sparsemm_edge.profiling import machine as this_machine
from sparsemm_edge.profiling import shapes
from sparsemm_edge.profiling.figures import spread
from sparsemm_edge.profiling.jobs import Event, Setting, Task, full
from sparsemm_edge.profiling.profile import check_some_ran, run_and_say
from sparsemm_edge.profiling.progress import Progress
from sparsemm_edge.profiling.runs import run_by_turns
from sparsemm_edge.resources import machine_memory
from sparsemm_edge.runtime.loading import Loading
from sparsemm_edge.runtime.session import N_UBATCH

_N_PREDICT = 16  # tokens that a setting decodes in its own process


def bench(
    model: Path,
    n_prompts: Sequence[int],
    budgets: Sequence[int],
    progress: Progress,
    *,
    scores: Path | None = None,
    n_rounds: int = 2,
    n_threads: int | None = None,
    n_ubatch: int | None = None,
    loading: Loading | None = None,
) -> dict[str, Any]:
    """Measure a model on prompts of random tokens.

    Args:
        model: a GGUF file.
        n_prompts: prompt lengths in positions.
        budgets: mean head budgets in positions.
        progress: told what goes on.
        scores: head scores; None: those in the file, or ones like the published.
        n_rounds: how often each setting reads each prompt by turns.
        n_threads: None: the physical cores.
        n_ubatch: prompt tokens computed at a time in every setting; None: llama.cpp's default for the full
            cache, the whole prompt where it is evicted.
        loading: how the model is loaded; None: as llama.cpp does it.

    Returns:
        `machine`, `model`, `scores` (where they come from), `rows` (see _row), and `lengths`: for each prompt
        length its `settings` (see setting_figures), `decode_tps` by setting, `depth_0_tps`, `limits`, and
        `against`: for each full setting what was decoded by turns with it (see _by_turns).

    Raises:
        SparseMMError: a model that cannot be evicted, not enough memory, or not one setting could run.
    """
    header = read_header(model)
    shape, metadata = model_shape(header), sparsemm_metadata(header)
    check_supported(header, shape)
    n_ctx_train = header.value(f"{shape.arch}.context_length", 0)
    for n_prompt in n_prompts:
        if n_prompt < 2:
            raise SparseMMError(f"a prompt of {n_prompt} positions: it must have at least 2")
        if n_ctx_train and n_prompt >= n_ctx_train:
            raise SparseMMError(
                f"a prompt of {n_prompt} positions is too long: {model.name} was trained for {n_ctx_train}"
            )
    weights = weight_bytes(model)
    check_memory(weights + full_cache(shape, max(n_prompts)).now)
    n_threads = n_threads or this_machine.usable_cores()
    full_settings = [
        full(n_ubatch=n_ubatch),
        full(flash_attn=False, n_ubatch=n_ubatch),
        full("q8_0", n_ubatch=n_ubatch),
    ]
    settings = full_settings + [Setting(budget, n_ubatch=n_ubatch) for budget in dict.fromkeys(budgets)]
    task = Task(str(model), n_predict=_N_PREDICT, n_threads=n_threads, loading=loading or Loading())
    progress.doing("reading memory")
    bandwidth = this_machine.memory_bandwidth(n_threads)

    with shapes.scores_file(shape, metadata, scores) as (path, source):
        task = replace(task, scores=None if path is None else str(path))
        lengths = [
            _measure(replace(task, n_prompt=n_prompt), settings, n_rounds, progress)
            for n_prompt in dict.fromkeys(n_prompts)
        ]
    for length in lengths:
        length["not_in_breakdown"] = {
            figures["name"]: _not_in_breakdown(header, figures, length["n_prompt"])
            for figures in length["settings"]
        }
        length["limits"] = _limits(length, weight_bytes_read(header), bandwidth)
    return {
        "machine": this_machine.machine() | {"n_threads": n_threads, "memory_bandwidth": bandwidth},
        "model": {
            "name": shape.name,
            "file": model.name,
            "n_layer": shape.n_layer,
            "n_head": shape.n_head,
            "n_head_kv": shape.n_head_kv,
            "weight_bytes": weights,
        },
        "scores": source,
        "rows": [_row(length, budget) for length in lengths for budget in dict.fromkeys(budgets)],
        "lengths": lengths,
    }


def check_memory(needed: int) -> None:
    """Raise SparseMMError if this many bytes of weights and full cache are more than there is."""
    available = machine_memory()[1]
    if needed > available:
        raise SparseMMError(
            f"weights and full cache take {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB of memory are"
            " available: cut the model with --layers, or shorten the prompts with --n-prompt"
        )


def _measure(task: Task, settings: list[Setting], n_rounds: int, progress: Progress) -> dict[str, Any]:
    """One prompt length: every setting in its own process, then those that ran by turns."""
    progress.done(f"prompt of {task.n_prompt} positions")
    found = [run_and_say(task, setting, progress) for setting in settings]
    check_some_ran(found)
    names = [figures["name"] for figures in found if figures["status"] == "ok"]
    able = [setting for setting in settings if setting.name in names]

    def listen(event: Event) -> None:
        if event["event"] == "phase":
            progress.doing(f"by turns, {event['name']}")

    progress.doing("by turns: loading")
    run = run_by_turns(task, able, n_rounds, listen)
    if run.status != "ok":
        progress.done(f"by turns: {run.status}: {run.reason}")
    turns = [event for event in run.events if event["event"] == "turn"]
    prompts: dict[str, list[float]] = {figures["name"]: [] for figures in found}
    for figures in found:
        if figures["status"] == "ok":
            prompts[figures["name"]].append(figures["prompt_ms"])
    for event in run.events:
        if event["event"] == "prompt":
            prompts[event["setting"]].append(event["prompt_ms"])
    decode: dict[str, list[float]] = {}
    for event in turns:
        decode.setdefault(event["setting"], []).extend(event["decode_ms"])
    return {
        "n_prompt": task.n_prompt,
        "settings": found,
        "by_turns": {"status": run.status, "reason": run.reason, "n_rounds": n_rounds},
        "prompt_ms": {name: spread(times) for name, times in prompts.items() if times},
        "decode_ms": {name: spread(times) for name, times in decode.items()},
        "decode_tps": {name: 1000 / float(np.median(decode[name])) for name in names if name in decode},
        "depth_0_tps": 1000 / float(np.median(decode[_EMPTY])) if _EMPTY in decode else None,
        "against": {against: _by_turns(turns, against) for against in {e["against"] for e in turns}},
    }


_EMPTY = "depth 0"


def _by_turns(turns: Sequence[Event], against: str) -> dict[str, dict[str, Any]]:
    """What was decoded by turns with one full setting: for each setting `tps` and, turn by turn, `ratio`.

    `tps` is the median over the tokens; `ratio` the spread over the turns of how much faster than `against`.
    """
    tokens: dict[str, list[float]] = {}
    by_turn: dict[tuple[int, int], dict[str, float]] = {}
    for event in turns:
        if event["against"] == against:
            tokens.setdefault(event["setting"], []).extend(event["decode_ms"])
            medians = by_turn.setdefault((event["round"], event["turn"]), {})
            medians[event["setting"]] = float(np.median(event["decode_ms"]))
    whole = [medians for medians in by_turn.values() if len(medians) == len(tokens)]
    return {
        name: {
            "tps": 1000 / float(np.median(times)),
            "ratio": spread([medians[against] / medians[name] for medians in whole]),
        }
        for name, times in tokens.items()
    }


def _row(length: dict[str, Any], budget: int) -> dict[str, Any]:
    """One prompt length and budget against the full f16 cache at its better flash-attention setting.

    Speeds are tokens a second, bytes are those of the runs in processes of their own. What was not measured,
    because a setting could not run, is None.

    - decode_tps, decode_tps_full and decode_tps_depth_0, in the same turns, and what follows from them:
      decode_ratio, evicted over full, with the quartiles of the turns (decode_ratio_low, decode_ratio_high);
      decode_limit_ratio, depth 0 over full, which is what eviction can give at most; decode_limit_share, how
      much of it is there
    - decode_tps_full_flash_attn, decode_tps_full_no_flash_attn, decode_tps_full_q8_0
    - prompt_tps, prompt_tps_full (better setting)
    - kv_bytes: of K and V after the reply; kv_bytes_peak; kv_bytes_full: of the same positions unevicted
    - rss_peak, rss_peak_full (smaller setting); anon_peak, anon_peak_full: what no file backs
    - memory_difference: anon_peak (or rss_peak) less that of the full setting, memory_setting, that has the
      smaller one; memory_difference_allocated: the same of K and V at their peak and compute buffers, as
      llama.cpp says, and of what it does not say (_not_in_breakdown), which should explain it
    """
    settings = {figures["name"]: figures for figures in length["settings"]}
    evicted = next(figures for figures in length["settings"] if figures["budget"] == budget)
    full_f16 = [
        figures
        for figures in length["settings"]
        if figures["budget"] is None and figures["cache_type"] == "f16"
    ]
    tps = length["decode_tps"]
    better = max((f["name"] for f in full_f16 if f["name"] in tps), key=tps.__getitem__, default=None)
    turns = length["against"].get(better, {})
    mine, empty = turns.get(evicted["name"]), turns.get(_EMPTY)
    decode, decode_empty = mine and mine["tps"], empty and empty["tps"]
    decode_full = turns[better]["tps"] if better is not None else None
    prompt_ms = length["prompt_ms"]

    def prompt_tps(name: str) -> float | None:
        return length["n_prompt"] / prompt_ms[name]["median"] * 1000 if name in prompt_ms else None

    def least(key: str) -> int | None:
        values = (f[key] for f in full_f16 if f["status"] == "ok" and f[key] is not None)
        return min(values, default=None)

    kv = evicted.get("kv")
    measured = "rss_peak" if evicted["anon_peak"] is None else "anon_peak"
    ran = [f for f in full_f16 if f["status"] == "ok"]
    small = min(ran, key=lambda figures: figures[measured], default=None)
    compares = small is not None and evicted["status"] == "ok"
    plain, no_flash = full(), full(flash_attn=False)
    return {
        "n_prompt": length["n_prompt"],
        "budget": budget,
        "status": evicted["status"],
        "decode_tps": decode,
        "decode_tps_full": decode_full,
        "decode_tps_depth_0": decode_empty,
        "full_setting": better,
        "decode_ratio": decode and decode_full and decode / decode_full,
        "decode_ratio_low": mine and mine["ratio"]["low"],
        "decode_ratio_high": mine and mine["ratio"]["high"],
        "decode_limit_ratio": decode_empty and decode_full and decode_empty / decode_full,
        "decode_limit_share": decode and decode_empty and decode / decode_empty,
        "decode_tps_full_flash_attn": tps.get(plain.name),
        "decode_tps_full_no_flash_attn": tps.get(no_flash.name),
        "decode_tps_full_q8_0": tps.get(full("q8_0").name),
        "prompt_tps": prompt_tps(evicted["name"]),
        "prompt_tps_full": max((t for f in full_f16 if (t := prompt_tps(f["name"]))), default=None),
        "kv_bytes": kv and kv["bytes_now"],
        "kv_bytes_peak": kv and kv["bytes_peak"],
        "kv_bytes_full": kv and kv["bytes_full"],
        "rss_peak": evicted["rss_peak"],
        "rss_peak_full": least("rss_peak"),
        "anon_peak": evicted["anon_peak"],
        "anon_peak_full": least("anon_peak"),
        "memory_setting": small and small["name"],
        "memory_difference": evicted[measured] - small[measured] if compares and small else None,
        "memory_difference_allocated": _allocated(evicted, length) - _allocated(small, length)
        if compares and small
        else None,
        "status_full": {name: f["status"] for name, f in settings.items() if f["budget"] is None},
    }


def _allocated(figures: dict[str, Any], length: dict[str, Any]) -> int:
    """Bytes of K and V and of compute buffers at the peak, as far as they are written."""
    sizes = figures["breakdown"]
    said = sizes["kv_peak"] + sizes["compute"] + sizes["output"]
    return int(said + length["not_in_breakdown"][figures["name"]])


def _not_in_breakdown(header: GGUFHeader, figures: dict[str, Any], n_prompt: int) -> int:
    """Bytes that a prompt of tokens takes besides llama.cpp's breakdown, on the CPU; may be negative.

    The compute buffer has an input for embeddings (f32), which tokens leave unwritten. ggml's CPU backend has
    a buffer beside it for the largest activation of a product with quantised weights, as q8_0 (ggml-cpu.c,
    ggml_graph_plan).
    """
    arch = header.value("general.architecture")
    n_embd, n_ff = (
        int(np.max(header.value(f"{arch}.{key}_length", 0)))  # a list where layers differ
        for key in ("embedding", "feed_forward")
    )
    n_rows = min(figures["n_ubatch"] or N_UBATCH, n_prompt)
    return row_bytes("q8_0", max(n_embd, n_ff) * n_rows) - 4 * n_embd * n_rows


def _limits(length: dict[str, Any], weights: int, bandwidth: float) -> dict[str, Any]:
    """What decoding waits for.

    `weight_bytes` read for a token; `weight_bytes_per_s` at depth 0, and `bandwidth_share` of what memory was
    measured to give; `attention_share` of the time of a token that is not there at depth 0, by setting.
    """
    empty = length["depth_0_tps"]
    if empty is None:
        return {"weight_bytes": weights}
    return {
        "weight_bytes": weights,
        "weight_bytes_per_s": weights * empty,
        "bandwidth_share": weights * empty / bandwidth,
        "attention_share": {name: 1 - tps / empty for name, tps in length["decode_tps"].items()},
    }
