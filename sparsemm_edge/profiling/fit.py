"""Compute whether a model fits into memory, with a full and an evicting cache, without running it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.gguf_header import read_header, weight_bytes
from sparsemm_edge.gguf_metadata import ModelShape, check_supported, model_shape, sparsemm_metadata
from sparsemm_edge.profiling import shapes
from sparsemm_edge.resources import machine_memory
from sparsemm_edge.runtime.context import N_UBATCH
from sparsemm_edge.runtime.estimate import Estimate
from sparsemm_edge.runtime.eviction import Eviction, HeadBudgetTable, plan


@dataclass(frozen=True)
class FitRequest:
    """What should fit into memory.

    Attributes:
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
    """

    model: Path
    mmproj: Path | None = None
    image_sizes: tuple[tuple[int, int], ...] = ()
    n_text: int = 64
    n_predict: int = 256
    n_ctx: int | None = None
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    budget: int | None = None
    window: int | None = None
    max_tail: int | None = None
    n_ubatch: int | None = None
    n_gpu_layers: int | None = None
    scores: Path | None = None
    memory: int | None = None


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
        content = asdict(self)
        del content["limit"]
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
        machine = {"memory_bytes": self.memory_total, "memory_available_bytes": self.memory_available}
        return {
            "machine": machine,
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


def fit(request: FitRequest) -> Fit:
    """Compute the memory that a request needs, with full caches and with eviction.

    Raises:
        SparseMMError: a file that cannot be used, a missing image encoder, or a prompt that is too long.
    """
    header = read_header(request.model)
    shape = model_shape(header)
    check_supported(header, shape)
    if request.image_sizes and request.mmproj is None:
        raise SparseMMError("an image needs the model's image encoder: give its file with --mmproj")
    program = psutil.Process().memory_info().rss
    total, available = machine_memory()
    memory = request.memory or available
    weights = weight_bytes(request.model)
    metadata = sparsemm_metadata(header)
    with (
        Estimate(header, request.mmproj, request.n_gpu_layers) as estimate,
        shapes.scores_file(shape, metadata, request.scores) as (scores, source),
    ):
        images = estimate.image_tokens(request.image_sizes) if request.image_sizes else []
        n_images = sum(images)
        n_prompt = request.n_text + n_images
        n_ctx = request.n_ctx or n_prompt + request.n_predict
        if n_prompt >= n_ctx:
            raise SparseMMError(
                f"the prompt takes {n_prompt} positions ({n_images} of images), --n-ctx allows {n_ctx}"
            )
        n_reply = min(request.n_predict, n_ctx - n_prompt)
        vision = 0
        if request.mmproj is not None:
            vision = weight_bytes(request.mmproj) + estimate.vision_compute_bytes

        n_ubatch = min(request.n_ubatch or N_UBATCH, n_ctx)

        def row(
            name: str,
            type_k: str,
            type_v: str,
            budget: int | None = None,
            table: HeadBudgetTable | None = None,
        ) -> FitRow:
            sizes = estimate.context_sizes(
                n_prompt=n_prompt,
                n_predict=n_reply,
                n_ctx=n_ctx,
                n_ubatch=n_ubatch,
                type_k=type_k,
                type_v=type_v,
                table=table,
            )
            compute = sizes.peak - sizes.kv_peak
            return FitRow(name, budget, weights, vision, compute, sizes.kv, sizes.kv_peak, program, memory)

        rows = [
            row("full" if kind == "f16" else f"full, {kind}", kind, kind) for kind in ("f16", "q8_0", "q4_0")
        ]

        def evicted(budget: int) -> FitRow:
            wanted = Eviction(True, None, budget, request.window, scores, request.max_tail)
            found = plan(wanted, metadata, shape, n_prompt, request.model)
            assert found is not None
            types = (request.cache_type_k, request.cache_type_v)
            kind = "" if types == ("f16", "f16") else f", {' and '.join(dict.fromkeys(types))}"
            return row(f"evicted, budget {budget}{kind}", *types, budget, found)

        budget = request.budget or Eviction().spec(metadata).budget
        rows.append(evicted(budget))
        least = (request.window or 1) + 1  # a default window shrinks with the budget
        largest = _largest(evicted, least, n_prompt)
    return Fit(total, available, memory, shape, images, n_prompt, n_ctx, rows, largest, source)


def _largest(evicted: Callable[[int], FitRow], least: int, most: int) -> FitRow | None:
    """The row of the largest budget from least to most that fits; None if none does."""
    if least > most or not (best := evicted(least)).fits:
        return None
    low, high = least, most + 1  # low fits, high may not
    while high - low > 1:
        middle = (low + high) // 2
        row = evicted(middle)
        if row.fits:
            best, low = row, middle
        else:
            high = middle
    return best
