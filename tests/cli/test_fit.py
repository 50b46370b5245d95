"""Claims about `fit` and the KV layout behind it, against what llama.cpp really allocates."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from PIL import Image

from helpers.command_line import CommandLine
from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.gguf_header import weight_bytes
from sparsemm_edge.profiling.fit import Fit, FitRow, fit
from sparsemm_edge.profiling.shapes import SHAPES, header_of_shape, model_of_shape, scores_file
from sparsemm_edge.runtime import Eviction, Prompt, VisionModel
from sparsemm_edge.runtime.context import context_for
from sparsemm_edge.runtime.encode import encode
from sparsemm_edge.runtime.estimate import Estimate
from sparsemm_edge.runtime.eviction import plan
from sparsemm_edge.runtime.prompt import ImagePart, TextPart, image_marker

# few layers, small heads, but as many heads as real models have: that is what groups are made of
SMALL = replace(SHAPES["llava-1.5-7b"], n_layer=3, n_embd=1024, n_ff=64)
GQA = replace(
    SHAPES["qwen2-vl-7b"],
    n_layer=2,
    n_embd=896,
    n_ff=64,
    n_vocab=32000,
    vocab="llama-spm",
    rope_sections=(4, 6, 6, 0),
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VisionModel]:
    path = model_of_shape("small", SMALL, tmp_path_factory.mktemp("models"))
    with VisionModel.load(path, n_threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def mha(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VisionModel]:
    """With a feed-forward network as wide as real ones are."""
    shape = replace(SMALL, n_ff=2752)
    path = model_of_shape("mha", shape, tmp_path_factory.mktemp("models"))
    with VisionModel.load(path) as model:
        yield model


@pytest.fixture(scope="module")
def gqa(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VisionModel]:
    path = model_of_shape("gqa", GQA, tmp_path_factory.mktemp("models"))
    with VisionModel.load(path, n_threads=1) as model:
        yield model


def random_tokens(n: int) -> Prompt:
    return Prompt([TextPart(np.random.default_rng(0).integers(300, 20000, n).astype(np.int32))])


@pytest.mark.parametrize(
    ("model_name", "n_prompt", "budget", "n_reply", "n_ubatch", "cache_type"),
    [
        ("small", 150, 48, 1, None, "f16"),
        ("small", 150, 100, 2, None, "q8_0"),
        ("small", 90, 40, 48, None, "f16"),  # exactly the room
        ("small", 90, 40, 49, None, "f16"),  # one more
        ("small", 90, 40, 99, None, "f32"),
        ("small", 300, 64, 1, 128, "f16"),  # the layers cannot share
        ("small", 100, 128, 1, None, "f16"),  # nothing to evict
        ("small", 100, 100, 180, None, "bf16"),  # the same, and it grows
        ("gqa", 200, 64, 1, None, "f16"),
        ("gqa", 200, 150, 60, None, "q8_0"),
    ],
)
def test_bytes_of_an_evicting_cache_are_those_that_are_allocated(
    request: pytest.FixtureRequest,
    model_name: str,
    n_prompt: int,
    budget: int,
    n_reply: int,
    n_ubatch: int | None,
    cache_type: str,
) -> None:
    model: VisionModel = request.getfixturevalue(model_name)
    said, allocated = said_and_allocated(model, n_prompt, budget, n_reply, n_ubatch, cache_type)

    assert said == allocated


@pytest.mark.parametrize(
    ("n_prompt", "budget", "n_reply", "max_tail", "n_ubatch", "cache_type"),
    [
        (90, 40, 20, 40, None, "f16"),  # within the bound, and less room than without
        (90, 40, 41, 40, None, "f16"),  # the first position is replaced by the next token, and is still there
        (90, 40, 200, 40, None, "q8_0"),  # five times the bound
        (90, 40, 48, 60, None, "f16"),  # exactly the room
        (90, 40, 200, 60, None, "f16"),  # grows to the bound, and stays there
        (90, 40, 98, 120, None, "f32"),  # grows twice, the second time to the bound
        (90, 40, 400, 120, None, "f16"),
        (300, 64, 100, 40, 128, "f16"),  # the layers cannot share
        (100, 128, 150, 40, None, "f16"),  # nothing to evict but of the answer
    ],
)
def test_bytes_of_an_answer_beyond_the_bound_are_those_that_are_allocated(
    small: VisionModel,
    n_prompt: int,
    budget: int,
    n_reply: int,
    max_tail: int,
    n_ubatch: int | None,
    cache_type: str,
) -> None:
    said, allocated = said_and_allocated(small, n_prompt, budget, n_reply, n_ubatch, cache_type, max_tail)

    assert said == allocated


def said_and_allocated(
    model: VisionModel,
    n_prompt: int,
    budget: int,
    n_reply: int,
    n_ubatch: int | None,
    cache_type: str,
    max_tail: int | None = None,
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Bytes of K and V after a prompt and a reply, and their peak.

    As llama_get_context_sizes says before, and as llama_memory_heads_stats tells afterwards. A context of a
    model without data says the same.
    """
    n_ctx = n_prompt + n_reply
    with scores_file(model.shape, None, None) as (scores, _):
        wanted = Eviction(budget=budget, scores=scores, max_tail=max_tail)
        table = plan(wanted, None, model.shape, n_prompt, model.path)
        assert table is not None
        with context_for(
            model,
            random_tokens(n_prompt),
            n_predict=n_reply,
            n_ctx=n_ctx,
            n_ubatch=n_ubatch,
            cache_type_k=cache_type,
            cache_type_v=cache_type,
            eviction=wanted,
        ) as context:
            said = context.sizes(n_prompt, n_reply)
            context.prefill(encode(model, random_tokens(n_prompt)))
            for _ in range(n_reply):
                context.decode(300)
            allocated = context.kv_stats()
    with Estimate(model.path) as estimate:
        without_data = estimate.context_sizes(
            n_prompt=n_prompt,
            n_predict=n_reply,
            n_ctx=n_ctx,
            n_ubatch=n_ubatch or 512,
            type_k=cache_type,
            type_v=cache_type,
            table=table,
        )
    assert bytes(without_data) == bytes(said)
    return (said.kv, said.kv_peak), (allocated.bytes_now, allocated.bytes_peak)


@pytest.mark.parametrize("cache_type", ["f16", "q8_0", "q4_0"])
def test_bytes_of_a_full_cache_are_those_of_its_context(small: VisionModel, cache_type: str) -> None:
    """llama.cpp rounds a context up to 256 cells; K and V of a cell are known from the shape."""
    with (
        context_for(
            small,
            random_tokens(10),
            n_predict=1,
            n_ctx=700,
            cache_type_k=cache_type,
            cache_type_v=cache_type,
            eviction=Eviction(enabled=False),
        ) as context,
        Estimate(small.path) as estimate,
    ):
        real = context.sizes(10, 1)
        without_data = estimate.context_sizes(
            n_prompt=10, n_predict=1, n_ctx=700, n_ubatch=512, type_k=cache_type, type_v=cache_type
        )
        stats = context.kv_stats()
    block, n_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[cache_type.upper()]]
    shape = small.shape

    assert bytes(real) == bytes(without_data)
    assert real.kv == real.kv_peak == stats.bytes_now == stats.bytes_peak
    assert real.kv == 768 * shape.n_layer * shape.n_head_kv * 2 * shape.n_embd_head_k // block * n_bytes
    assert real.peak == real.kv + real.compute + real.output
    assert real.hidden == real.idxs == 0


@pytest.mark.parametrize("n_prompt", [300, 640, 1500])
@pytest.mark.parametrize("budget", [16, 256])
def test_the_reserved_buffers_are_enough_for_a_prompt(mha: VisionModel, n_prompt: int, budget: int) -> None:
    with (
        scores_file(mha.shape, None, None) as (scores, _),
        context_for(
            mha,
            random_tokens(n_prompt),
            n_predict=1,
            n_ctx=n_prompt + 1,
            eviction=Eviction(budget=budget, scores=scores),
        ) as context,
    ):
        reserved = context.sizes(n_prompt, 1).compute
        context.prefill(encode(mha, random_tokens(n_prompt)))

        assert context.sizes(n_prompt, 1).compute == reserved


@pytest.mark.parametrize("n_prompt", [600, 2000])
@pytest.mark.parametrize("budget", [64, 256])
def test_prompts_take_what_is_computed_and_later_ones_what_is_held_more(
    mha: VisionModel, n_prompt: int, budget: int
) -> None:
    with (
        scores_file(mha.shape, None, None) as (scores, _),
        Estimate(mha.path) as estimate,
        context_for(
            mha,
            random_tokens(n_prompt),
            n_predict=50,
            n_ctx=3 * n_prompt,
            n_ubatch=512,
            eviction=(eviction := Eviction(budget=budget, scores=scores)),
        ) as context,
    ):
        table = plan(eviction, None, mha.shape, n_prompt, mha.path)
        said = estimate.context_sizes(
            n_prompt=n_prompt, n_predict=0, n_ctx=n_prompt, n_ubatch=512, table=table
        )
        reserved = context.sizes(n_prompt, 0).compute
        context.prefill(encode(mha, random_tokens(n_prompt)))
        first, compute_first = context.kv_stats(), context.sizes(n_prompt, 0).compute
        context.decode(300)  # gives back what only a prompt needs
        context.prefill(encode(mha, random_tokens(n_prompt), context.n_past))
        later, compute_later = context.kv_stats(), context.sizes(n_prompt, 0).compute

    assert compute_first == reserved  # enough, for all layers of the prompt
    assert later.n_evictions == first.n_evictions + 1 == 2
    # what is held is there until the prompt has ended, and one layer of it in the layer that is read
    held = 2 * first.bytes_now
    assert later.bytes_peak <= first.bytes_peak + held
    assert compute_later + later.bytes_peak <= said.compute + said.kv_peak + held


@pytest.mark.parametrize(
    "wanted",
    [Eviction(enabled=False), Eviction(budget=64), Eviction(budget=64, max_tail=40)],
    ids=["full", "evicted", "bounded"],
)
def test_compute_bytes_are_those_of_a_real_context(small: VisionModel, wanted: Eviction) -> None:
    n_prompt, n_ctx = 400, 500
    with scores_file(small.shape, None, None) as (scores, _):
        wanted = replace(wanted, scores=scores)
        table = plan(wanted, None, small.shape, n_prompt, small.path)
        with context_for(
            small, random_tokens(n_prompt), n_predict=100, n_ctx=n_ctx, eviction=wanted
        ) as context:
            real = context.sizes(n_prompt, 100)
            context.prefill(encode(small, random_tokens(n_prompt)))
            context.decode(300)
            after = context.sizes(n_prompt, 100)

    with Estimate(small.path) as estimate:
        said, few = (
            estimate.context_sizes(n_prompt=n_prompt, n_predict=n, n_ctx=n_ctx, n_ubatch=n_ctx, table=table)
            for n in (100, 1)
        )

    assert bytes(said) == bytes(real)
    assert said.compute > 2**20
    if table is not None:  # what only a prompt needs is given back
        assert after.compute == said.compute_token < said.compute / 10
        assert said.hidden > 4 * n_prompt * SMALL.n_embd
        assert few.peak == few.kv_peak + few.hidden + few.idxs + few.compute + few.output


@pytest.mark.parametrize(
    ("name", "size", "n_tokens"),
    [
        ("llava", (112, 112), 64),  # 8 x 8 patches, whatever the image
        ("llava", (300, 50), 64),
        ("qwen2vl", (224, 224), 8 * 8 + 2),  # 28 pixels a token, and the markers around
        ("qwen2vl", (500, 300), 18 * 11 + 2),
    ],
)
def test_images_take_the_tokens_that_mtmd_gives_them(
    models: Callable[[str], Any], name: str, size: tuple[int, int], n_tokens: int
) -> None:
    files = models(name)

    found = fit(files.gguf(), files.mmproj(), (size,), n_text=10)

    assert found.image_tokens == [n_tokens]
    assert found.n_prompt == n_tokens + 10
    with (
        VisionModel.load(files.gguf(), files.mmproj(), n_threads=1) as model,
        model.tokenize(image_marker(), [Image.new("RGB", size)]) as prompt,
    ):
        of_images = sum(part.n_tokens for part in prompt.parts if isinstance(part, ImagePart))
    assert of_images == n_tokens - (2 if name == "qwen2vl" else 0)


def test_the_total_is_the_sum_of_what_is_at_the_peak(models: Callable[[str], Any]) -> None:
    files = models("llava")

    found = fit(files.gguf(), files.mmproj(), ((112, 112),), n_text=300, budget=64)

    assert [row.name for row in found.rows] == [
        "full",
        "full, q8_0",
        "full, q4_0",
        "evicted, budget 64",
    ]
    for row in found.rows:
        assert row.total == row.weights + row.vision + row.compute + row.kv_peak + row.program
        assert row.weights == weight_bytes(files.gguf())
        assert row.vision > weight_bytes(files.mmproj())
        assert row.fits
    assert json.loads(json.dumps(found.to_dict()))["rows"][-1]["fits"] is True


def test_the_largest_budget_fits_and_the_next_does_not(small: VisionModel) -> None:
    n_text = 600

    def evicted(budget: int, memory: int | None = None) -> Fit:
        return fit(small.path, n_text=n_text, n_predict=1, budget=budget, memory=memory)

    # between two budgets, both far from the ends
    low, high = (evicted(budget).rows[-1].total for budget in (150, 400))
    memory = (low + high) // 2
    largest = evicted(64, memory).to_dict()["largest_budget"]

    assert 150 < largest < 400
    # another call has another size of the program itself: compare without it
    program = evicted(64).rows[-1].program
    for budget, fits in ((largest - 10, True), (largest + 30, False)):
        row = evicted(budget).rows[-1]
        assert (row.total - row.program <= memory - program) == fits


def test_no_budget_fits_into_nothing(small: VisionModel) -> None:
    found = fit(small.path, n_text=200, memory=2**20)

    assert found.largest is None
    assert not any(row.fits for row in found.rows)


def test_a_prompt_that_does_not_fit_the_context_is_one_clear_line(small: VisionModel) -> None:
    with pytest.raises(SparseMMError, match=r"the prompt takes 500 positions .* --n-ctx allows 300"):
        fit(small.path, n_text=500, n_ctx=300)
    with pytest.raises(SparseMMError, match="give its file with --mmproj"):
        fit(small.path, image_sizes=((10, 10),))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image", "nothing.png"], "expected an image file, or a size in pixels"),
        (["--image", "0x5"], "a side must be 1 to"),
        (["--memory", "much"], "expected a number and a unit"),
        (["--n-text", "0"], "--n-text is 0"),
    ],
)
def test_mistakes_are_named_in_one_line(
    small: VisionModel,
    options: list[str],
    message: str,
    sparsemm: CommandLine,
) -> None:
    assert message in sparsemm("fit", small.path, *options).refusal


def test_a_shape_without_weights_takes_what_the_model_takes(
    small: VisionModel, sparsemm: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no room on the disk."""
    monkeypatch.setitem(SHAPES, "small", SMALL)
    room = ("--n-text", 300, "--memory", "8G", "--json")
    found, expected = (
        sparsemm("fit", *which, *room).report for which in (("--shape", "small"), (small.path,))
    )
    for row, of_file in zip(found["rows"], expected["rows"], strict=True):
        assert {**row, "program": 0, "total": 0} == {**of_file, "program": 0, "total": 0}
    with header_of_shape("small", SMALL) as path:
        assert path.stat().st_blocks * 512 < path.stat().st_size / 2


@pytest.mark.parametrize("arguments", [(), ("x.gguf", "--shape", "qwen3-vl-8b")])
def test_a_model_or_a_shape_must_be_given(arguments: tuple[str, ...], sparsemm: CommandLine) -> None:
    assert "give one of MODEL.gguf and --shape NAME" in sparsemm("fit", *arguments).refusal


def test_the_command_prints_one_json_object(small: VisionModel, sparsemm: CommandLine) -> None:
    report = sparsemm("fit", small.path, "--n-text", 100, "--memory", "8G", "--json").report

    assert report["memory"] == 8 * 2**30


def test_the_table_names_the_machine_and_the_largest_budget(
    small: VisionModel, sparsemm: CommandLine
) -> None:
    printed = sparsemm("fit", small.path, "--n-text", 100).out

    assert "evicted, budget 256" in printed
    assert "every budget fits" in printed


def test_a_bounded_tail_bounds_what_fit_says(small: VisionModel) -> None:
    def evicted(n_predict: int, max_tail: int | None) -> FitRow:
        found = fit(small.path, n_text=200, n_predict=n_predict, budget=64, max_tail=max_tail)
        return found.rows[-1]

    assert evicted(300, 40).kv == evicted(3000, 40).kv < evicted(300, None).kv
    with pytest.raises(SparseMMError, match=r"must be at least the observation window, 32"):
        evicted(300, 31)


@pytest.fixture(autouse=True)
def _no_output_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_k_and_v_may_have_different_numbers(small: VisionModel) -> None:
    def row(**types: str) -> FitRow:
        return fit(small.path, n_text=200, budget=64, **types).rows[-1]  # type: ignore[arg-type]

    both, neither = row(cache_type_k="q8_0", cache_type_v="q8_0"), row()
    k, v = row(cache_type_k="q8_0"), row(cache_type_v="q8_0")
    assert k.kv == v.kv == (both.kv + neither.kv) / 2
    assert [each.name.removeprefix("evicted, budget 64") for each in (both, neither, k, v)] == [
        ", q8_0",
        "",
        ", q8_0 and f16",
        ", f16 and q8_0",
    ]
