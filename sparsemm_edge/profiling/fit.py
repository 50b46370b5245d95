"""Whether a model fits into memory, full and evicted, without running it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.gguf_header import read_header, weight_bytes
from sparsemm_edge.gguf_metadata import check_supported, model_shape, sparsemm_metadata
from sparsemm_edge.kv_layout import evicting_cache, full_cache
from sparsemm_edge.profiling import shapes
from sparsemm_edge.resources import machine_memory
from sparsemm_edge.runtime.estimate import Estimate
from sparsemm_edge.runtime.eviction import Eviction, plan
from sparsemm_edge.runtime.session import N_UBATCH


@dataclass(frozen=True)
class Wish:
    """What is to fit.

    Attributes:
        model, mmproj: GGUF files.
        image_sizes: (width, height) of each image in pixels.
        n_text: positions of the prompt's text, template included.
        n_predict: tokens of the reply.
        n_ctx: places in the KV cache; None: what prompt and reply need.
        cache_type_k, cache_type_v: of K and V where the cache is evicted.
        budget: mean head budget; None: the file's, or the default.
        window: observation window; None: the file's, or the default.
        max_tail: most generated positions that a head holds where the cache is evicted; None: all of them.
        n_ubatch: prompt tokens computed at a time; None: 512.
        n_gpu_layers: see Loading; on how many devices buffers lie changes their size.
        scores: head scores file; None: those in the file, or ones like the published.
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


def fit(wish: Wish) -> dict[str, Any]:
    """What the wish takes, with full caches and evicted.

    Returns:
        `machine`: memory_bytes and memory_available_bytes; `model`; `image_tokens`: places of each image;
        `n_prompt`, `n_ctx`; `rows`: for each setting `name`, `budget`, and in bytes `weights`, `vision`
        (weights and compute buffer of the image encoder), `compute`, `kv` (after the reply), `kv_peak`,
        `program` (this program without a model) and `total` (at the peak), and whether it `fits`;
        `largest_budget` that fits, None if none does; `largest_budget_bytes`: its total;
        `scores`: where the head scores come from.

    Raises:
        SparseMMError: a file that cannot be used, a missing image encoder, or a prompt that is too long.
    """
    header = read_header(wish.model)
    shape = model_shape(header)
    check_supported(header, shape)
    if wish.image_sizes and wish.mmproj is None:
        raise SparseMMError("an image needs the model's image encoder: give its file with --mmproj")
    program = psutil.Process().memory_info().rss
    total, available = machine_memory()
    memory = wish.memory or available
    weights = weight_bytes(wish.model)
    metadata = sparsemm_metadata(header)
    with (
        Estimate(header, wish.mmproj, wish.n_gpu_layers) as estimate,
        shapes.scores_file(shape, metadata, wish.scores) as (scores, source),
    ):
        images = estimate.image_tokens(wish.image_sizes) if wish.image_sizes else []
        n_images = sum(images)
        n_prompt = wish.n_text + n_images
        n_ctx = wish.n_ctx or n_prompt + wish.n_predict
        if n_prompt >= n_ctx:
            raise SparseMMError(
                f"the prompt takes {n_prompt} positions ({n_images} of images), --n-ctx allows {n_ctx}"
            )
        n_reply = min(wish.n_predict, n_ctx - n_prompt)
        vision = 0
        if wish.mmproj is not None:
            vision = weight_bytes(wish.mmproj) + estimate.vision_compute_bytes

        def row(name: str, kv: int, kv_peak: int, compute: int, budget: int | None = None) -> dict[str, Any]:
            peak = program + weights + vision + compute + kv_peak
            return {
                "name": name,
                "budget": budget,
                "weights": weights,
                "vision": vision,
                "compute": compute,
                "kv": kv,
                "kv_peak": kv_peak,
                "program": program,
                "total": peak,
                "fits": peak <= memory,
            }

        rows = []
        n_ubatch = min(wish.n_ubatch or N_UBATCH, n_ctx)
        for kind in ("f16", "q8_0", "q4_0"):
            kv = full_cache(shape, n_ctx, kind, kind)
            compute = estimate.compute_bytes(n_ctx=n_ctx, n_ubatch=n_ubatch, type_k=kind, type_v=kind)
            rows.append(row("full" if kind == "f16" else f"full, {kind}", kv.now, kv.peak, compute))

        def evicted(budget: int) -> dict[str, Any]:
            wanted = Eviction(True, None, budget, wish.window, scores, wish.max_tail)
            found = plan(wanted, metadata, shape, n_prompt, wish.model)
            assert found is not None
            kv = evicting_cache(
                shape,
                found.head_budgets,
                n_prompt=n_prompt,
                n_reply=n_reply,
                n_ctx=n_ctx,
                max_tail=wish.max_tail,
                type_k=wish.cache_type_k,
                type_v=wish.cache_type_v,
            )
            compute = estimate.compute_bytes(
                n_ctx=n_ctx,
                n_ubatch=n_ubatch,
                type_k=wish.cache_type_k,
                type_v=wish.cache_type_v,
                table=found,
            )
            kinds = dict.fromkeys((wish.cache_type_k, wish.cache_type_v))
            kind = "" if list(kinds) == ["f16"] else f", {' and '.join(kinds)}"
            return row(f"evicted, budget {budget}{kind}", kv.now, kv.peak, compute, budget)

        budget = wish.budget or Eviction().spec(metadata).budget
        rows.append(evicted(budget))
        least = (wish.window or 1) + 1  # a window that nobody asked for shrinks with the budget
        largest = _largest(evicted, least, n_prompt)
    return {
        "machine": {"memory_bytes": total, "memory_available_bytes": available},
        "memory": memory,
        "model": {"name": shape.name, "n_layer": shape.n_layer, "n_head_kv": shape.n_head_kv},
        "image_tokens": images,
        "n_prompt": n_prompt,
        "n_ctx": n_ctx,
        "rows": rows,
        "largest_budget": None if largest is None else largest["budget"],
        "largest_budget_bytes": None if largest is None else largest["total"],
        "scores": source,
    }


def _largest(evicted: Callable[[int], dict[str, Any]], least: int, most: int) -> dict[str, Any] | None:
    """The row of the largest budget from least to most that fits; None if not even the least does."""
    if least > most or not (best := evicted(least))["fits"]:
        return None
    low, high = least, most + 1  # low fits, high is not known to
    while high - low > 1:
        middle = (low + high) // 2
        row = evicted(middle)
        if row["fits"]:
            best, low = row, middle
        else:
            high = middle
    return best
