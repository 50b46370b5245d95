"""What a worker process is asked to do, and what it says while it does it."""

from dataclasses import dataclass, field
from typing import Any

from sparsemm_edge.runtime.loading import Loading, Lora


@dataclass(frozen=True)
class CacheSetting:
    """One way to run the model.

    Attributes:
        budget: mean head budget in positions; None keeps the full cache.
        cache_type: of K and V.
        flash_attn: whether attention is fused; an evicting cache always has it.
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


def full(cache_type: str = "f16", flash_attn: bool = True, n_ubatch: int | None = None) -> CacheSetting:
    """A full cache, as llama.cpp would run it if nothing else is said."""
    return CacheSetting(None, cache_type, flash_attn, n_ubatch)


@dataclass(frozen=True)
class Task:
    """A prompt for a model, and how much to decode after it.

    Attributes:
        model, mmproj: GGUF files.
        images: files.
        prompt: what the user asks; None: n_prompt random tokens instead.
        system, chat_template, template_options: what is written around it, see VisionModel.generate.
        n_prompt: see prompt.
        n_predict: tokens to decode; the end of the answer does not stop it.
        n_threads: None: the physical cores.
        scores: head scores file; None: those in the model file.
        policy, window, vote, residual: of an evicting cache; None: the file's.
        max_tail: most generated positions that a head of an evicting cache holds; None: all.
        loading: how the model is loaded.
    """

    model: str
    mmproj: str | None = None
    images: tuple[str, ...] = ()
    prompt: str | None = None
    system: str | None = None
    chat_template: str | None = None
    template_options: dict[str, Any] | None = None
    n_prompt: int = 0
    n_predict: int = 32
    n_threads: int | None = None
    scores: str | None = None
    policy: str | None = None
    window: int | None = None
    max_tail: int | None = None
    vote: str | None = None
    residual: bool | None = None
    loading: Loading = field(default_factory=Loading)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Task":
        """The task whose dataclasses.asdict went through JSON."""
        loading = content["loading"]
        loras = tuple(Lora(**lora) for lora in loading["loras"])
        given = {"images": tuple(content["images"]), "loading": Loading(**{**loading, "loras": loras})}
        return cls(**{**content, **given})


Event = dict[str, Any]
"""What a worker says: `event` is phase, kv, result, turn or failed; `t` is its time.monotonic."""
