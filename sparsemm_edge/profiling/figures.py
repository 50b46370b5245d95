"""What a run's events and samples come to: the figures of one setting, ready for JSON."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from sparsemm_edge.profiling.jobs import Setting
from sparsemm_edge.profiling.memory import MemoryTrace
from sparsemm_edge.profiling.runs import Run

_N_SAMPLES = 400  # of a trace in the JSON


def setting_figures(setting: Setting, run: Run) -> dict[str, Any]:
    """One setting: what it was, how it ended, phases, memory over time, and if it got there its figures.

    Times in seconds count from the start of phase `load`.
    """
    phases = run.phases()
    zero = phases[0]["start"] if phases else 0.0
    for phase in phases:
        phase["start"], phase["end"] = round(phase["start"] - zero, 4), round(phase["end"] - zero, 4)
    trace = run.memory
    figures: dict[str, Any] = {
        "name": setting.name,
        "budget": setting.budget,
        "cache_type": setting.cache_type,
        "flash_attn": setting.flash_attn,
        "n_ubatch": setting.n_ubatch,
        "status": run.status,
        "reason": run.reason,
        "phases": phases,
        "rss_peak": trace.rss_peak,
        "anon_peak": trace.peak("anon"),
        "file_peak": trace.peak("file"),
        "pss_peak": trace.peak("pss"),
        "footprint_peak": trace.peak("footprint"),
        "memory": samples(trace, run.start + zero, phases[-1]["end"] if phases else 0.0),
    }
    result = run.result
    if result is None:
        return figures
    text_ms = result["prompt_ms"]
    figures |= {
        # a short run can end between two samples
        "rss_peak": max(trace.rss_peak, result["rss_peak_bytes"]),
        "n_prompt": result["n_prompt"],
        "n_predict": len(result["decode_ms"]),
        "load_ms": result["load_ms"],
        "image_ms": result["image_ms"],
        "prompt_ms": text_ms,
        "first_token": result["first_token"],
        "prompt_tps": result["n_prompt"] / text_ms * 1000,
        "decode_ms": spread(result["decode_ms"]),
        "decode_tps": 1000 / float(np.median(result["decode_ms"])),
        "kv": result["kv"],
        "breakdown": breakdown(result),
        "buffers": result["buffers"],
    }
    return figures


def breakdown(result: dict[str, Any]) -> dict[str, int]:
    """Bytes by what they are for, as llama.cpp allocated them; KV exact, the others as logged.

    `weights_mapped` are in the model file, which the system can drop and read again; `weights_copied` were
    rearranged for this processor, or are on a GPU.
    """
    sizes = {"weights_mapped": 0, "weights_copied": 0, "compute": 0, "vision_compute": 0, "output": 0}
    names = {"compute": "compute", "vision": "vision_compute", "output": "output"}
    for buffer in result["buffers"]:
        if buffer["content"] == "model":
            mapped = buffer["backend"].endswith("_Mapped")
            sizes["weights_mapped" if mapped else "weights_copied"] += buffer["n_bytes"]
        elif buffer["content"] in names:
            sizes[names[buffer["content"]]] += buffer["n_bytes"]
    kv = result["kv"]
    return sizes | {
        "vision_weights": result["vision_weight_bytes"],
        "kv_peak": kv["bytes_peak"],
        "kv_now": kv["bytes_now"],
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.percentile(values, (25, 50, 75))
    return {"median": float(median), "low": float(low), "high": float(high)}


def samples(trace: MemoryTrace, zero: float, end: float) -> dict[str, list[Any]]:
    """The trace from 0 to `end` as lists of at most _N_SAMPLES entries, each the largest of some samples.

    `t` is in seconds since `zero`, the others in bytes; what the system does not tell is left out. The sample
    before 0 is what there was at 0: between 0 and a near end there may be none.
    """
    begin, stop = np.searchsorted(np.array(trace.t) - zero, (0, end))
    begin = max(0, begin - 1)
    edges = np.unique(np.linspace(begin, stop, _N_SAMPLES + 1).astype(int))
    spans = [slice(begin, end) for begin, end in pairwise(edges)]
    kept: dict[str, list[Any]] = {"t": [round(max(0.0, trace.t[span][0] - zero), 3) for span in spans]}
    for name in ("rss", "anon", "file", "pss", "footprint"):
        values = getattr(trace, name)
        if name == "rss" or any(value is not None for value in values):
            known = ([value for value in values[span] if value is not None] for span in spans)
            kept[name] = [max(part, default=None) for part in known]
    return kept
