"""Results of runs, from their events and memory samples."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from sparsemm_edge.gguf_header import GGUFHeader, weight_bytes
from sparsemm_edge.gguf_metadata import model_shape
from sparsemm_edge.profiling.jobs import CacheSetting
from sparsemm_edge.profiling.memory import SAMPLED, MemoryTrace
from sparsemm_edge.profiling.runs import Phase, Run
from sparsemm_edge.runtime import KVStats
from sparsemm_edge.runtime.first_token import FirstToken
from sparsemm_edge.runtime.library import Buffer, ContextSizes

_N_SAMPLES = 400  # of a trace in the JSON


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Breakdown:
    """Allocated bytes by purpose; weights and vision_compute are as llama.cpp logged them, the others exact.

    Attributes:
        weights_mapped: of the mapped model file.
        weights_copied: repacked for this processor, or on a GPU.
        compute, output: buffers of the context.
        hidden: what a prompt that is read layer by layer takes besides.
        vision_compute, vision_weights: of the image encoder.
        kv_peak, kv_now: K and V at their peak, and after the reply.
    """

    weights_mapped: int
    weights_copied: int
    compute: int
    hidden: int
    vision_compute: int
    output: int
    vision_weights: int
    kv_peak: int
    kv_now: int

    @classmethod
    def of(
        cls, buffers: Sequence[Buffer], context: ContextSizes, kv: KVStats, vision_weights: int
    ) -> "Breakdown":
        """From what llama.cpp logged, what the context takes, and the image encoder's weights in bytes."""
        logged = Counter[str]()
        for buffer in buffers:
            weights = "mapped" if buffer.backend.endswith("_Mapped") else "copied"
            logged[weights if buffer.content == "model" else "vision"] += buffer.n_bytes
        return cls(
            weights_mapped=logged["mapped"],
            weights_copied=logged["copied"],
            compute=context.compute,
            hidden=context.hidden + context.idxs,
            vision_compute=logged["vision"],
            output=context.output,
            vision_weights=vision_weights,
            kv_peak=kv.bytes_peak,
            kv_now=kv.bytes_now,
        )


@dataclass(frozen=True)
class Measured:
    """Results of a complete run.

    Attributes:
        n_prompt, n_predict: positions of the prompt, tokens decoded after it.
        load_ms, image_ms, prompt_ms: loading, image encoder, text model reading the prompt.
        prompt_tps, decode_tps: tokens per second; for decoding from the median.
        first_token: the parts of the time to the first token.
        read_bytes_per_s: memory bandwidth of decoding (weights, K and V).
        decode_ms: per token.
        kv: statistics of the cache.
        breakdown: memory by purpose.
        buffers: as llama.cpp logged them: backend, content, n_bytes.
    """

    n_prompt: int
    n_predict: int
    load_ms: float
    image_ms: float
    prompt_ms: float
    prompt_tps: float
    first_token: FirstToken
    read_bytes_per_s: float
    decode_ms: Spread
    decode_tps: float
    kv: KVStats
    breakdown: Breakdown
    buffers: list[Buffer]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"first_token": self.first_token.to_dict(self.read_bytes_per_s)}


@dataclass(frozen=True)
class SettingFigures:
    """The results of one setting.

    Attributes:
        setting: the setting.
        status, reason: see Run.
        phases: in seconds since phase `load` began.
        rss_peak: the largest resident size in bytes.
        anon_peak, file_peak, pss_peak, footprint_peak: the largest of MemoryTrace's; None if not known.
        anon_loaded: anonymous memory with the model loaded, before the context.
        anon_after: anonymous memory after the last token.
        memory: over time, see samples.
        measured: None if the run is incomplete.
    """

    setting: CacheSetting
    status: str
    reason: str
    phases: list[Phase]
    rss_peak: int
    anon_peak: int | None
    file_peak: int | None
    pss_peak: int | None
    footprint_peak: int | None
    anon_loaded: int | None
    anon_after: int | None
    memory: dict[str, list[Any]]
    measured: Measured | None

    @property
    def name(self) -> str:
        return self.setting.name

    @property
    def done(self) -> Measured | None:
        """The results, if the run succeeded."""
        return self.measured if self.status == "ok" else None

    @property
    def peak_over_weights(self) -> int | None:
        """Peak anonymous memory, beyond that of the loaded model."""
        return self._over_weights(self.anon_peak)

    @property
    def after_over_weights(self) -> int | None:
        """The same after the last token."""
        return self._over_weights(self.anon_after)

    def _over_weights(self, anon: int | None) -> int | None:
        return None if anon is None or self.anon_loaded is None else anon - self.anon_loaded

    def to_dict(self) -> dict[str, Any]:
        """For JSON, as one flat object."""
        own = {name: value for name, value in vars(self).items() if name not in ("setting", "measured")}
        return {
            "name": self.name,
            **asdict(self.setting),
            **own,
            "phases": [asdict(phase) for phase in self.phases],
            "peak_over_weights": self.peak_over_weights,
            "after_over_weights": self.after_over_weights,
            **({} if self.measured is None else self.measured.to_dict()),
        }


@dataclass(frozen=True)
class ModelFigures:
    """The model: name, file name, shape, and bytes of its weights."""

    name: str
    file: str
    n_layer: int
    n_head: int
    n_head_kv: int
    weight_bytes: int

    @classmethod
    def of(cls, header: GGUFHeader) -> "ModelFigures":
        shape, path = model_shape(header), header.path
        heads = (shape.n_layer, shape.n_head, shape.n_head_kv)
        return cls(shape.name, path.name, *heads, weight_bytes(path))


def setting_figures(setting: CacheSetting, run: Run) -> SettingFigures:
    """The figures of one setting's run."""
    phases = run.phases()
    zero = phases[0].start if phases else 0.0
    phases = [Phase(phase.name, round(phase.start - zero, 4), round(phase.end - zero, 4)) for phase in phases]
    # the worker says its memory itself too: on a busy machine samples come late, a short run may have none
    trace, said = run.memory, {event["name"]: event for event in run.events if event["event"] == "phase"}
    anon = {name: event["anon"] for name, event in said.items()}
    return SettingFigures(
        setting=setting,
        status=run.status,
        reason=run.reason,
        phases=phases,
        rss_peak=max(trace.rss_peak, *(event["rss_peak"] for event in said.values()), 0),
        anon_peak=max((n for n in (trace.peak("anon"), *anon.values()) if n is not None), default=None),
        file_peak=trace.peak("file"),
        pss_peak=trace.peak("pss"),
        footprint_peak=trace.peak("footprint"),
        anon_loaded=anon.get("context"),
        anon_after=anon.get("end"),
        memory=samples(trace, run.start + zero, phases[-1].end if phases else 0.0),
        measured=next((event["measured"] for event in run.events if event["event"] == "result"), None),
    )


def full_f16_of(settings: Sequence[SettingFigures]) -> list[SettingFigures]:
    """The full f16 caches among them, with flash attention and without."""
    return [each for each in settings if not each.setting.evicts and each.setting.cache_type == "f16"]


def spread(values: Sequence[float]) -> Spread:
    low, median, high = np.percentile(values, (25, 50, 75))
    return Spread(float(median), float(low), float(high))


def samples(trace: MemoryTrace, zero: float, end: float) -> dict[str, list[Any]]:
    """The trace from 0 to `end` as lists of at most _N_SAMPLES entries, each a maximum over samples.

    `t` is in seconds since `zero`, the others in bytes; unknown quantities are left out. The last sample
    before 0 counts as that at 0.
    """
    begin, stop = np.searchsorted(np.array(trace.t) - zero, (0, end))
    begin = max(0, begin - 1)
    edges = np.unique(np.linspace(begin, stop, _N_SAMPLES + 1).astype(int))
    spans = [slice(begin, end) for begin, end in pairwise(edges)]
    kept: dict[str, list[Any]] = {"t": [round(max(0.0, trace.t[span][0] - zero), 3) for span in spans]}
    for name in SAMPLED:
        values = getattr(trace, name)
        if name == "rss" or any(value is not None for value in values):
            known = ([value for value in values[span] if value is not None] for span in spans)
            kept[name] = [max(part, default=None) for part in known]
    return kept
