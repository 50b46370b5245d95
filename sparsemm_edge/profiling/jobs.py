"""Jobs of worker processes, and the events that they send."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsemm_edge.runtime.eviction import Eviction
from sparsemm_edge.runtime.loading import Loading


@dataclass(frozen=True)
class CacheSetting:
    """A cache configuration to measure.

    Attributes:
        budget: mean head budget in positions; None keeps the full cache.
        cache_type: of K and V.
        flash_attn: an evicting cache always uses it.
        n_ubatch: prompt tokens computed at a time; None: 512.
    """

    budget: int | None = None
    cache_type: str = "f16"
    flash_attn: bool = True
    n_ubatch: int | None = None

    @property
    def name(self) -> str:
        if self.budget is not None:
            return f"evicted, budget {self.budget}"
        name = "full" if self.cache_type == "f16" else f"full, {self.cache_type}"
        return name if self.flash_attn else f"{name}, no flash attention"

    @property
    def evicts(self) -> bool:
        return self.budget is not None


@dataclass(frozen=True)
class Task:
    """A model, a prompt and the number of tokens to decode.

    Attributes:
        model, mmproj: GGUF files.
        images: files.
        prompt: the user's message; None: n_prompt random tokens.
        frame: system, chat_template and template_options, see VisionModel.chat_prompt.
        n_prompt: see prompt.
        n_predict: tokens to decode; the end of the answer does not stop it.
        n_threads: None: the physical cores.
        eviction: of an evicting cache, whose budget is CacheSetting's.
        loading: how the model is loaded.
    """

    model: Path
    mmproj: Path | None = None
    images: tuple[Path, ...] = ()
    prompt: str | None = None
    frame: Mapping[str, Any] = field(default_factory=dict)
    n_prompt: int = 0
    n_predict: int = 32
    n_threads: int | None = None
    eviction: Eviction = field(default_factory=Eviction)
    loading: Loading = field(default_factory=Loading)


Event = dict[str, Any]
"""An event of a worker: `event` is phase, result, prompt, turn or failed; `t` is its time.monotonic."""
