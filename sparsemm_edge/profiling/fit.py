"""Compute whether a model fits into memory, with a full and an evicting cache, without running it."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.gguf_header import read_header, weight_bytes
from sparsemm_edge.gguf_metadata import ModelShape, check_supported, model_shape
from sparsemm_edge.profiling import shapes
from sparsemm_edge.profiling.jobs import CacheSetting
from sparsemm_edge.resources import machine_memory
from sparsemm_edge.runtime.context import N_UBATCH
from sparsemm_edge.runtime.estimate import Estimate
from sparsemm_edge.runtime.eviction import Eviction, HeadBudgetTable


@dataclass(frozen=True)
class FitRow:
    """Memory of one setting, in bytes.

    Attributes:
        name: of the setting.
        budget: mean head budget in positions; None: a full cache.
        weights: of the text model.
        vision: weights and compute buffer of the image encoder.
        compute: compute buffers and hidden states: what the context takes at its peak besides kv_peak.
        kv, kv_peak: K and V after the reply, and at their peak.
        program: this program without a model.
        limit: what must suffice.
    """

    name: str
    budget: int | None
    weights: int
    vision: int
    compute: int
    kv: int
    kv_peak: int
    program: int
    limit: int

    @property
    def total(self) -> int:
        """At the peak."""
        return self.program + self.weights + self.vision + self.compute + self.kv_peak

    @property
    def fits(self) -> bool:
        return self.total <= self.limit

    def to_dict(self) -> dict[str, Any]:
        content = {name: value for name, value in vars(self).items() if name != "limit"}
        return {**content, "total": self.total, "fits": self.fits}


@dataclass(frozen=True)
class Fit:
    """The result of fit().

    Attributes:
        memory_total, memory_available: of this machine, in bytes.
        memory: to fit into, in bytes.
        model: shape of the model.
        image_tokens: KV cache positions of each image.
        n_prompt, n_ctx: positions of the prompt and of the context.
        rows: the full caches, then the evicted one.
        largest: the largest budget that fits; None if none does.
        scores: where the head scores come from.
    """

    memory_total: int
    memory_available: int
    memory: int
    model: ModelShape
    image_tokens: list[int]
    n_prompt: int
    n_ctx: int
    rows: list[FitRow]
    largest: FitRow | None
    scores: str

    def to_dict(self) -> dict[str, Any]:
        """As `fit --json` prints it."""
        model = self.model
        return {
            "machine": {"memory_bytes": self.memory_total, "memory_available_bytes": self.memory_available},
            "memory": self.memory,
            "model": {"name": model.name, "n_layer": model.n_layer, "n_head_kv": model.n_head_kv},
            "image_tokens": self.image_tokens,
            "n_prompt": self.n_prompt,
            "n_ctx": self.n_ctx,
            "rows": [row.to_dict() for row in self.rows],
            "largest_budget": None if self.largest is None else self.largest.budget,
            "largest_budget_bytes": None if self.largest is None else self.largest.total,
            "scores": self.scores,
        }


def fit(
    model: Path,
    mmproj: Path | None = None,
    image_sizes: Sequence[tuple[int, int]] = (),
    *,
    n_text: int = 64,
    n_predict: int = 256,
    n_ctx: int | None = None,
    cache_type_k: str = "f16",
    cache_type_v: str = "f16",
    budget: int | None = None,
    window: int | None = None,
    max_tail: int | None = None,
    n_ubatch: int | None = None,
    n_gpu_layers: int | None = None,
    scores: Path | None = None,
    memory: int | None = None,
) -> Fit:
    """Compute the memory that a prompt and its reply need, with full caches and with eviction.

    Args:
        model, mmproj: GGUF files.
        image_sizes: (width, height) of each image in pixels.
        n_text: positions of the prompt's text, template included.
        n_predict: tokens of the reply.
        n_ctx: context size in positions; None: as prompt and reply need.
        cache_type_k, cache_type_v: of K and V where the cache is evicted.
        budget: mean head budget; None: the file's, or the default.
        window: observation window; None: the file's, or the default.
        max_tail: most generated positions per head of the evicting cache; None: no limit.
        n_ubatch: prompt tokens computed at a time; None: 512.
        n_gpu_layers: see Loading; buffer sizes depend on the number of devices.
        scores: head scores file; None: those of the model file, or the published distribution.
        memory: bytes to fit into; None: this machine's.

    Raises:
        SparseMMError: a file that cannot be used, a missing image encoder, or a prompt that is too long.
    """
    header = read_header(model)
    shape = model_shape(header)
    check_supported(header, shape)
    if image_sizes and mmproj is None:
        raise SparseMMError("an image needs the model's image encoder: give its file with --mmproj")
    program = psutil.Process().memory_info().rss
    total, available = machine_memory()
    limit = memory or available
    weights = weight_bytes(model)
    with (
        Estimate(model, mmproj, n_gpu_layers) as estimate,
        shapes.scores_file(shape, estimate.metadata, scores) as (scores_path, source),
    ):
        images = estimate.image_tokens(image_sizes) if image_sizes else []
        n_prompt = n_text + sum(images)
        n_places = n_ctx or n_prompt + n_predict
        if n_prompt >= n_places:
            raise SparseMMError(
                f"the prompt takes {n_prompt} positions ({sum(images)} of images), --n-ctx allows {n_places}"
            )
        n_reply = min(n_predict, n_places - n_prompt)
        vision = estimate.vision_weight_bytes + estimate.vision_compute_bytes  # 0 without an image encoder

        def row(
            name: str, type_k: str, type_v: str, budget: int | None, table: HeadBudgetTable | None
        ) -> FitRow:
            sizes = estimate.context_sizes(
                n_prompt=n_prompt,
                n_predict=n_reply,
                n_ctx=n_places,
                n_ubatch=min(n_ubatch or N_UBATCH, n_places),
                type_k=type_k,
                type_v=type_v,
                table=table,
            )
            compute = sizes.peak - sizes.kv_peak
            return FitRow(name, budget, weights, vision, compute, sizes.kv, sizes.kv_peak, program, limit)

        full = [CacheSetting(cache_type=kind) for kind in ("f16", "q8_0", "q4_0")]
        rows = [row(each.name, each.cache_type, each.cache_type, None, None) for each in full]

        def evicted(budget: int) -> FitRow:
            wanted = Eviction(True, None, budget, window, scores_path, max_tail)
            found = estimate.plan(wanted, n_prompt)
            assert found is not None
            types = (cache_type_k, cache_type_v)
            kind = "" if types == ("f16", "f16") else f", {' and '.join(dict.fromkeys(types))}"
            return row(f"evicted, budget {budget}{kind}", *types, budget, found)

        rows.append(evicted(budget or Eviction().spec(estimate.metadata).budget))
        budgets = range((window or 1) + 1, n_prompt + 1)  # a default window shrinks with the budget
        n_fit = bisect_left(budgets, True, key=lambda budget: not evicted(budget).fits)
        largest = evicted(budgets[n_fit - 1]) if n_fit else None
    return Fit(total, available, limit, shape, images, n_prompt, n_places, rows, largest, source)
