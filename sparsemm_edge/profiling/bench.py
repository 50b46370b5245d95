"""Benchmark: prompt speed, decoding speed and memory over prompt lengths and budgets.

Each setting runs twice: in its own process, to measure memory, and interleaved with the others in one
process, to compare speeds.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.gguf_header import GGUFHeader, bytes_of, read_header, weight_bytes, weight_bytes_read
from sparsemm_edge.gguf_metadata import check_supported, model_shape, sparsemm_metadata
from sparsemm_edge.profiling import machine as this_machine
from sparsemm_edge.profiling import shapes
from sparsemm_edge.profiling.figures import ModelFigures, SettingFigures, Spread, full_f16_of, spread
from sparsemm_edge.profiling.jobs import CacheSetting, Event, Task
from sparsemm_edge.profiling.profile import check_some_ran, run_and_say
from sparsemm_edge.profiling.progress import Progress
from sparsemm_edge.profiling.runs import run_worker
from sparsemm_edge.resources import machine_memory
from sparsemm_edge.runtime.context import N_UBATCH
from sparsemm_edge.runtime.loading import Loading

_N_PREDICT = 16  # tokens that a setting decodes in its own process
_EMPTY = "depth 0"


@dataclass(frozen=True)
class Interleaved:
    """Decoding speed of one setting, interleaved with a full one.

    Attributes:
        tps: tokens per second, median over tokens.
        ratio: speed-up over the full one, over turns.
    """

    tps: float
    ratio: Spread


@dataclass(frozen=True)
class Limits:
    """What limits decoding. None: not measured.

    Attributes:
        weight_bytes: read per token.
        weight_bytes_per_s: their read rate at depth 0.
        bandwidth_share: that rate over the measured memory bandwidth.
        attention_share: fraction of a token's time beyond that at depth 0, by setting.
    """

    weight_bytes: int
    weight_bytes_per_s: float | None = None
    bandwidth_share: float | None = None
    attention_share: dict[str, float] | None = None


@dataclass(frozen=True)
class Length:
    """Results at one prompt length.

    Attributes:
        n_prompt: positions.
        settings: each in its own process.
        n_rounds: interleaved runs of each setting; 0: none.
        interleaved_status, interleaved_reason: their outcome, see Run.
        prompt_ms, decode_ms: by setting.
        decode_tps: tokens per second, by setting.
        depth_0_tps: with an empty cache.
        against: for each full setting, the settings interleaved with it.
        not_in_breakdown: by setting, see _not_in_breakdown.
        limits: what limits decoding.
    """

    n_prompt: int
    settings: list[SettingFigures]
    n_rounds: int
    interleaved_status: str
    interleaved_reason: str
    prompt_ms: dict[str, Spread]
    decode_ms: dict[str, Spread]
    decode_tps: dict[str, float]
    depth_0_tps: float | None
    against: dict[str, dict[str, Interleaved]]
    not_in_breakdown: dict[str, int]
    limits: Limits

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"settings": [setting.to_dict() for setting in self.settings]}


@dataclass(frozen=True)
class BenchRow:
    """One prompt length and budget against the full f16 cache at its better flash-attention setting.

    Speeds are tokens per second. Bytes are from the runs in separate processes. None: not measured, because a
    setting could not run. `_full`: of the full settings, the fastest or the smallest.

    Attributes:
        n_prompt, budget, status: of the evicted setting.
        decode_tps, decode_tps_full, decode_tps_depth_0: in the same turns.
        full_setting: the faster full setting at decoding.
        decode_ratio: evicted over full; decode_ratio_low, decode_ratio_high: quartiles over turns.
        decode_limit_ratio: depth 0 over full, the upper bound of eviction.
        decode_limit_share: fraction of that bound.
        kv_bytes, kv_bytes_peak: K and V after the reply, and at their peak.
        kv_bytes_full: of the same positions in a full cache.
        rss_peak, anon_peak, peak_over_weights, after_over_weights: see SettingFigures.
        memory_setting: the smallest full setting.
        memory_difference: anon_peak (or rss_peak) minus that setting's.
        memory_difference_allocated: the same for K and V at their peak and compute buffers, as llama.cpp
            reports them, and for what it does not report (_not_in_breakdown).
        status_full: of each full setting.
    """

    n_prompt: int
    budget: int
    status: str
    decode_tps: float | None
    decode_tps_full: float | None
    decode_tps_depth_0: float | None
    full_setting: str | None
    decode_ratio: float | None
    decode_ratio_low: float | None
    decode_ratio_high: float | None
    decode_limit_ratio: float | None
    decode_limit_share: float | None
    decode_tps_full_flash_attn: float | None
    decode_tps_full_no_flash_attn: float | None
    decode_tps_full_q8_0: float | None
    prompt_tps: float | None
    prompt_tps_full: float | None
    kv_bytes: int | None
    kv_bytes_peak: int | None
    kv_bytes_full: int | None
    rss_peak: int
    rss_peak_full: int | None
    anon_peak: int | None
    anon_peak_full: int | None
    peak_over_weights: int | None
    peak_over_weights_full: int | None
    after_over_weights: int | None
    after_over_weights_full: int | None
    memory_setting: str | None
    memory_difference: int | None
    memory_difference_allocated: int | None
    status_full: dict[str, str]


@dataclass(frozen=True)
class Bench:
    """The results of bench().

    Attributes:
        machine: see machine.machine, with `n_threads`, and `memory_bandwidth` in bytes per second.
        model: the model.
        scores: where the head scores come from.
        rows: for each prompt length and budget.
        lengths: for each prompt length.
    """

    machine: dict[str, Any]
    model: ModelFigures
    scores: str
    rows: list[BenchRow]
    lengths: list[Length]

    def to_dict(self) -> dict[str, Any]:
        """The content of bench.json."""
        return asdict(self) | {"lengths": [length.to_dict() for length in self.lengths]}


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
) -> Bench:
    """Measure a model on prompts of random tokens.

    Args:
        model: a GGUF file.
        n_prompts: prompt lengths in positions.
        budgets: mean head budgets in positions.
        progress: shows progress.
        scores: head scores; None: those of the model file, or the published distribution.
        n_rounds: interleaved runs of each setting and prompt; 0: measure only memory, of the full f16 cache
            with flash attention, which needs least, and of evicted ones.
        n_threads: None: the physical cores.
        n_ubatch: prompt tokens computed at a time in every setting; None: 512.
        loading: how the model is loaded; None: llama.cpp's defaults.

    Raises:
        SparseMMError: an unsupported model, not enough memory, or no setting could run.
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
    check_memory(weight_bytes(model) + shape.n_layer * shape.n_head_kv * shape.kv_bytes(max(n_prompts)))
    n_threads = n_threads or this_machine.usable_cores()
    settings = [CacheSetting(n_ubatch=n_ubatch)]
    if n_rounds:
        settings += [
            CacheSetting(flash_attn=False, n_ubatch=n_ubatch),
            CacheSetting(cache_type="q8_0", n_ubatch=n_ubatch),
        ]
    settings += [CacheSetting(budget, n_ubatch=n_ubatch) for budget in dict.fromkeys(budgets)]
    task = Task(model, n_predict=_N_PREDICT, n_threads=n_threads, loading=loading or Loading())
    progress.doing("reading memory")
    bandwidth = this_machine.memory_bandwidth(n_threads)

    with shapes.scores_file(shape, metadata, scores) as (path, source):
        task = replace(task, eviction=replace(task.eviction, scores=path))
        lengths = [
            _measure(replace(task, n_prompt=n_prompt), header, settings, n_rounds, bandwidth, progress)
            for n_prompt in dict.fromkeys(n_prompts)
        ]
    return Bench(
        this_machine.machine() | {"n_threads": n_threads, "memory_bandwidth": bandwidth},
        ModelFigures.of(header),
        source,
        [_row(length, budget) for length in lengths for budget in dict.fromkeys(budgets)],
        lengths,
    )


def check_memory(needed: int) -> None:
    """Raise SparseMMError if weights and full cache do not fit into memory."""
    available = machine_memory()[1]
    if needed > available:
        raise SparseMMError(
            f"weights and full cache take {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB of memory are"
            " available: cut the model with --layers, or shorten the prompts with --n-prompt"
        )


def _measure(
    task: Task,
    header: GGUFHeader,
    settings: list[CacheSetting],
    n_rounds: int,
    bandwidth: float,
    progress: Progress,
) -> Length:
    """Measure each setting in its own process, then interleaved."""
    progress.done(f"prompt of {task.n_prompt} positions")
    found = [run_and_say(task, setting, progress) for setting in settings]
    check_some_ran(found)
    able = [(figures, figures.done) for figures in found if figures.done is not None]
    prompts = {figures.name: [done.prompt_ms] for figures, done in able}
    decode: dict[str, list[float]] = {}
    turns: list[Event] = []
    status, reason = "ok", ""
    if n_rounds:
        progress.doing("interleaved: loading")
        run = run_worker(
            task, [each.setting for each, _ in able], progress.phases("interleaved, "), n_rounds=n_rounds
        )
        status, reason = run.status, run.reason
        if status != "ok":
            progress.done(f"interleaved: {status}: {reason}")
        turns = [event for event in run.events if event["event"] == "turn"]
        for event in run.events:
            if event["event"] == "prompt":
                prompts[event["setting"]].append(event["prompt_ms"])
        for event in turns:
            decode.setdefault(event["setting"], []).extend(event["decode_ms"])
    tps = {name: 1000 / float(np.median(times)) for name, times in decode.items()}
    depth_0, weights = tps.pop(_EMPTY, None), weight_bytes_read(header)
    limits = Limits(weights)
    if depth_0 is not None:
        shares = {name: 1 - each / depth_0 for name, each in tps.items()}
        limits = Limits(weights, weights * depth_0, weights * depth_0 / bandwidth, shares)
    return Length(
        n_prompt=task.n_prompt,
        settings=found,
        n_rounds=n_rounds,
        interleaved_status=status,
        interleaved_reason=reason,
        prompt_ms={name: spread(times) for name, times in prompts.items()},
        decode_ms={name: spread(times) for name, times in decode.items()},
        decode_tps={figures.name: tps[figures.name] for figures, _ in able if figures.name in tps},
        depth_0_tps=depth_0,
        against={
            against: _interleaved(turns, against) for against in dict.fromkeys(e["against"] for e in turns)
        },
        not_in_breakdown={
            figures.name: _not_in_breakdown(header, figures.setting, task.n_prompt) for figures in found
        },
        limits=limits,
    )


def _interleaved(turns: Sequence[Event], against: str) -> dict[str, Interleaved]:
    """Decoding speeds interleaved with one full setting, by setting."""
    tokens: dict[str, list[float]] = {}
    by_turn: dict[tuple[int, int], dict[str, float]] = {}
    for event in turns:
        if event["against"] == against:
            tokens.setdefault(event["setting"], []).extend(event["decode_ms"])
            medians = by_turn.setdefault((event["round"], event["turn"]), {})
            medians[event["setting"]] = float(np.median(event["decode_ms"]))
    whole = [medians for medians in by_turn.values() if len(medians) == len(tokens)]
    return {
        name: Interleaved(
            1000 / float(np.median(times)), spread([medians[against] / medians[name] for medians in whole])
        )
        for name, times in tokens.items()
    }


def _row(length: Length, budget: int) -> BenchRow:
    evicted = next(figures for figures in length.settings if figures.setting.budget == budget)
    done, full_f16 = evicted.done, full_f16_of(length.settings)
    tps = length.decode_tps
    better = max((f.name for f in full_f16 if f.name in tps), key=tps.__getitem__, default=None)
    turns = {} if better is None else length.against.get(better, {})
    mine, empty, whole = (
        turns.get(name) if name is not None else None for name in (evicted.name, _EMPTY, better)
    )

    def prompt_tps(name: str) -> float | None:
        return length.n_prompt / length.prompt_ms[name].median * 1000 if name in length.prompt_ms else None

    ran = [figures for figures in full_f16 if figures.done is not None]
    memory: dict[str, Any] = {}
    for name in ("rss_peak", "anon_peak", "peak_over_weights", "after_over_weights"):
        known = [value for figures in ran if (value := getattr(figures, name)) is not None]
        memory |= {name: getattr(evicted, name), f"{name}_full": min(known, default=None)}

    def measured(figures: SettingFigures) -> int:
        return figures.rss_peak if figures.anon_peak is None else figures.anon_peak

    small = min(ran, key=measured, default=None)
    less = None if done is None else small  # to compare with
    difference = None if less is None else _allocated(evicted, length) - _allocated(less, length)
    return BenchRow(
        n_prompt=length.n_prompt,
        budget=budget,
        status=evicted.status,
        decode_tps=None if mine is None else mine.tps,
        decode_tps_full=None if whole is None else whole.tps,
        decode_tps_depth_0=None if empty is None else empty.tps,
        full_setting=better,
        decode_ratio=None if mine is None or whole is None else mine.tps / whole.tps,
        decode_ratio_low=None if mine is None else mine.ratio.low,
        decode_ratio_high=None if mine is None else mine.ratio.high,
        decode_limit_ratio=None if empty is None or whole is None else empty.tps / whole.tps,
        decode_limit_share=None if mine is None or empty is None else mine.tps / empty.tps,
        decode_tps_full_flash_attn=tps.get(CacheSetting().name),
        decode_tps_full_no_flash_attn=tps.get(CacheSetting(flash_attn=False).name),
        decode_tps_full_q8_0=tps.get(CacheSetting(cache_type="q8_0").name),
        prompt_tps=prompt_tps(evicted.name),
        prompt_tps_full=max((t for f in full_f16 if (t := prompt_tps(f.name))), default=None),
        kv_bytes=None if done is None else done.kv.bytes_now,
        kv_bytes_peak=None if done is None else done.kv.bytes_peak,
        kv_bytes_full=None if done is None else done.kv.bytes_full,
        memory_setting=None if small is None else small.name,
        memory_difference=None if less is None else measured(evicted) - measured(less),
        memory_difference_allocated=difference,
        status_full={f.name: f.status for f in length.settings if not f.setting.evicts},
        **memory,
    )


def _allocated(figures: SettingFigures, length: Length) -> int:
    """Bytes of K and V, hidden states and compute buffers at the peak, as far as they are written."""
    assert figures.done is not None
    sizes = figures.done.breakdown
    said = sizes.kv_peak + sizes.compute + sizes.hidden + sizes.output
    return said + length.not_in_breakdown[figures.name]


def _not_in_breakdown(header: GGUFHeader, setting: CacheSetting, n_prompt: int) -> int:
    """Bytes that a text prompt needs beyond llama.cpp's breakdown, on the CPU; may be negative.

    The compute buffer has an input for embeddings (f32) that text prompts do not write. ggml's CPU backend
    has another buffer for the largest activation of a product with quantised weights, as q8_0 (ggml-cpu.c,
    ggml_graph_plan).
    """
    arch = header.value("general.architecture")
    n_embd, n_ff = (
        int(np.max(header.value(f"{arch}.{key}_length", 0)))  # a list where layers differ
        for key in ("embedding", "feed_forward")
    )
    n_rows = min(setting.n_ubatch or N_UBATCH, n_prompt)
    return bytes_of(GGMLQuantizationType.Q8_0, max(n_embd, n_ff) * n_rows) - 4 * n_embd * n_rows
