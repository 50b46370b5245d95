"""Claims about the runtime and `generate`, on the test models with the patched llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.chat_templates import render
from helpers.command_line import CommandLine
from helpers.model_files import random_scores
from sparsemm_edge.budgets import BudgetSpec
from sparsemm_edge.convert import convert
from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.resources import usable_cores
from sparsemm_edge.runtime import Eviction, GenerationStats, Sampling, VisionModel, generate, library
from sparsemm_edge.runtime.chat_template import read_template
from sparsemm_edge.runtime.context import context_for
from sparsemm_edge.runtime.encode import encode
from sparsemm_edge.runtime.library import llama

MODELS = ("llava", "llava-gqa", "llava-siglip", "qwen2vl")
QUESTION = "What does the page say?"
LONG = "It was the best of times, it was the worst of times. " * 4


@pytest.fixture
def loaded(models: Callable[[str], Any]) -> Any:
    """`loaded(name)` is the test model of that name in llama.cpp, f32; closed after the test."""
    opened: list[VisionModel] = []

    def load(name: str) -> VisionModel:
        files = models(name)
        opened.append(VisionModel.load(files.gguf("f32"), files.mmproj("f32"), n_threads=1))
        return opened[-1]

    yield load
    for model in opened:
        model.close()


@pytest.fixture
def page(models: Callable[[str], Any], tmp_path: Path) -> Path:
    from helpers.models import sample_image

    sample_image(models("llava").image_size, seed=1).save(tmp_path / "page.png")
    return tmp_path / "page.png"


@pytest.fixture
def llava(models: Callable[[str], Any]) -> Any:
    return models("llava")


def picture(model: str, seed: int = 1) -> Image.Image:
    from helpers.models import SPECS, sample_image

    return sample_image(SPECS[model].image_size, seed)


def decode_greedily(model: VisionModel, text: str, images: list[Any], n: int = 8, **options: Any) -> Any:
    """Greedy tokens, their logits [n, n_vocab], and the number of calls that the prompt took."""
    with (
        model.tokenize(text, images) as prompt,
        context_for(model, prompt, n_predict=n, **options) as context,
    ):
        encoded = encode(model, prompt)
        context.prefill(encoded)
        tokens: list[int] = []
        logits = []
        for _ in range(n):
            logits.append(context.logits())
            tokens.append(int(logits[-1].argmax()))
            context.decode(tokens[-1])
        return tokens, np.stack(logits), len(encoded.batches)


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def answer(model: VisionModel, prompt: str, images: Any = (), **options: Any) -> tuple[str, GenerationStats]:
    pieces = generate(model, prompt, images, **options)
    return "".join(pieces), pieces.stats()


# --- chat templates


def test_the_template_says_where_images_stand() -> None:
    template = (
        "{% for m in messages %}{{ m.role }}:{% for part in m.content %}"
        "{% if part.type == 'image' %}<image>{% else %} {{ part.text }}{% endif %}{% endfor %}{% endfor %};"
    )
    text = render(template, "two <image> words", 2, marker="<M>", bos="", eos="")
    assert text == "user:<M><M> two <image> words;"


def test_the_vision_tokens_of_qwen_become_markers() -> None:
    template = (
        "{% for part in messages[0].content %}{% if part.type == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    )
    assert render(template, "what?", 1, marker="<M>", bos="", eos="") == "<M>what?"


def test_a_template_for_plain_text_gets_images_as_lines() -> None:
    template = "{{ bos_token }}[{{ messages[0].content + '' }}]"
    assert render(template, "what?", 2, marker="<M>", bos="<s>", eos="") == "<s>[<M>\n<M>\nwhat?]"


def test_generation_blocks_of_hugging_face_are_plain_text() -> None:
    template = "{{ messages[0].content }}{% generation %}{{ 'reply' }}{% endgeneration %}"
    assert render(template, "what?", 0, marker="<M>", bos="", eos="").endswith("reply")


@pytest.mark.parametrize("template", ["nothing", "{{ raise_exception('no') }}", "{{ messages"])
def test_a_template_that_loses_the_prompt_is_refused(template: str) -> None:
    with pytest.raises(SparseMMError, match="chat template"):
        render(template, "what?", 1, marker="<M>", bos="", eos="")


def test_a_template_is_given_as_text_or_as_a_file(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ x }}")
    assert read_template(str(tmp_path / "t.jinja")) == read_template("{{ x }}") == "{{ x }}"


# --- the prompt


@pytest.mark.parametrize("name", MODELS)
def test_how_the_prompt_is_cut_changes_no_more_than_flash_attention_rounds(name: str, loaded: Any) -> None:
    model = loaded(name)
    text, images = model.chat_prompt(QUESTION, 1), [picture(name)]
    logits = decode_greedily(model, text, images, n=1)[1]
    for options in ({"n_ubatch": 16}, {"n_ubatch": 100}):
        assert relative_error(decode_greedily(model, text, images, n=1, **options)[1], logits) < 5e-3


@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_llama_cpp_without_this_runtime(
    name: str, loaded: Any, models: Callable[[str], Any]
) -> None:
    from helpers.native import Native

    model = loaded(name)
    text, images = model.chat_prompt(QUESTION, 1), [picture(name)]
    tokens = decode_greedily(model, text, images, n=16)[0]
    with Native(models(name).gguf("f32"), models(name).mmproj("f32"), n_threads=1) as native:
        assert tokens == native.greedy(text, images, n_predict=16, type_kv=1)[0]


def test_with_mrope_an_image_takes_fewer_positions_than_places_in_the_cache(loaded: Any) -> None:
    model = loaded("qwen2vl")
    with model.tokenize(model.chat_prompt(QUESTION, 1), [picture("qwen2vl")]) as prompt:
        image = prompt.parts[1]
        assert image.n_pos**2 == image.n_tokens
        assert prompt.n_tokens - prompt.n_pos == image.n_tokens - image.n_pos


# --- eviction


@pytest.mark.parametrize("name", MODELS)
def test_a_budget_over_the_prompt_changes_no_token(name: str, loaded: Any) -> None:
    model = loaded(name)
    plain = answer(model, QUESTION, [picture(name)], n_predict=16, eviction=Eviction(enabled=False))
    roomy = Eviction(policy="uniform", budget=4000, window=8)
    kept = answer(model, QUESTION, [picture(name)], n_predict=16, eviction=roomy)
    assert plain[1].tokens == kept[1].tokens
    assert plain[1].kv.n_evictions == kept[1].kv.n_evictions == 0


@pytest.mark.parametrize("name", MODELS)
def test_every_head_keeps_its_budget_of_the_prompt_and_all_that_comes_after(name: str, loaded: Any) -> None:
    model = loaded(name)
    eviction = Eviction(policy="uniform", budget=32, window=8)
    text, images = model.chat_prompt(QUESTION, 1), [picture(name)]
    with (
        model.tokenize(text, images) as prompt,
        context_for(model, prompt, n_predict=8, eviction=eviction) as context,
    ):
        context.prefill(encode(model, prompt))
        n = prompt.n_tokens
        for layer in range(model.shape.n_layer):
            for head in range(model.shape.n_head_kv):
                kept = context.kept_positions(layer, head)
                assert len(kept) == 31, "one place is the residual slot's"
                assert kept[-8:].tolist() == list(range(n - 8, n))
        context.decode(int(context.logits().argmax()))
        assert context.kept_positions(0, 0)[-1] == n
        assert context.kv_stats().positions_kept_mean == 32
        with pytest.raises(SparseMMError):
            context.kept_positions(model.shape.n_layer, 0)


def test_evicting_shrinks_the_cache_and_counts_once(loaded: Any) -> None:
    model = loaded("llava-gqa")
    eviction = Eviction(policy="uniform", budget=32, window=8)
    kv = answer(model, QUESTION, [picture("llava-gqa")], n_predict=8, eviction=eviction)[1].kv
    assert kv.n_evictions == 1
    assert kv.bytes_now < kv.bytes_full
    assert kv.bytes_now <= kv.bytes_peak


def test_a_prompt_cut_so_that_one_token_is_left_over_still_evicts(loaded: Any) -> None:
    model = loaded("llava")
    with model.tokenize(LONG) as prompt:
        eviction = Eviction(policy="uniform", budget=32, window=8)
        n_ubatch = (prompt.n_tokens - 1) // 2
        assert prompt.n_tokens % n_ubatch == 1
        with context_for(model, prompt, n_predict=1, n_ubatch=n_ubatch, eviction=eviction) as context:
            context.prefill(encode(model, prompt))
            assert context.kv_stats().n_evictions == 1


def test_scores_without_converting_evict_as_the_converted_file_does(
    llava: Any, page: Path, tmp_path: Path
) -> None:
    scores = random_scores(llava.gguf(), tmp_path)
    converted = convert(llava.gguf(), scores, tmp_path / "c.gguf", spec=BudgetSpec(budget=48, window=8)).path
    with VisionModel.load(converted, llava.mmproj(), n_threads=1) as model:
        from_file = answer(model, QUESTION, [page], n_predict=16)
    with VisionModel.load(llava.gguf(), llava.mmproj(), n_threads=1) as model:
        unconverted = answer(model, QUESTION, [page], n_predict=16)
        wanted = Eviction(scores=scores, budget=48, window=8)
        from_scores = answer(model, QUESTION, [page], n_predict=16, eviction=wanted)
    assert from_file[1].kv == from_scores[1].kv
    assert from_file[1].tokens == from_scores[1].tokens
    assert unconverted[1].kv.n_evictions == 0


def test_a_water_filled_file_is_shared_out_again_for_the_prompt(llava: Any, tmp_path: Path) -> None:
    scores = random_scores(llava.gguf(), tmp_path)
    # water-filled for a prompt so long that no head is cut: some head's budget is over the prompt
    path = convert(
        llava.gguf(), scores, tmp_path / "c.gguf", spec=BudgetSpec(budget=150, window=8), n_prompt=4000
    ).path
    with VisionModel.load(path, n_threads=1) as model, model.tokenize(LONG) as prompt:
        assert model.metadata is not None and model.metadata.head_budgets.max() > prompt.n_tokens > 150
        with context_for(model, prompt, n_predict=1) as context:
            context.prefill(encode(model, prompt))
            kept = np.array([[len(head) for head in heads] for heads in context.kept()])
            # one place of a head that evicts is its residual slot's
            assert (kept + (kept < prompt.n_tokens)).mean() == 150
    path = convert(
        llava.gguf(), scores, tmp_path / "p.gguf", spec=BudgetSpec(budget=150, window=8, water_fill=False)
    ).path
    with (
        VisionModel.load(path, n_threads=1) as model,
        model.tokenize(LONG) as prompt,
        context_for(model, prompt, n_predict=1) as context,
    ):
        context.prefill(encode(model, prompt))
        assert context.kv_stats().positions_kept_mean < 150


def test_eviction_can_be_switched_off_and_rebudgeted_at_run_time(llava: Any, tmp_path: Path) -> None:
    scores = random_scores(llava.gguf(), tmp_path)
    path = convert(llava.gguf(), scores, tmp_path / "c.gguf", spec=BudgetSpec(budget=48, window=8)).path
    with VisionModel.load(path, n_threads=1) as model:
        stats = [
            answer(model, LONG, n_predict=1, eviction=wanted)[1]
            for wanted in (None, Eviction(budget=64), Eviction(policy="uniform"), Eviction(enabled=False))
        ]
        kept = [each.kv.positions_kept_mean for each in stats]
        n_prompt = stats[-1].n_prompt
    # one place of a head that evicts is its residual slot's; a head with a budget over the prompt has none
    assert kept[0] == kept[2] == 47 and 63 <= kept[1] < 64 and kept[3] == n_prompt


def test_a_converted_file_evicts_in_plain_llama_cpp_python(llava: Any, tmp_path: Path) -> None:
    from llama_cpp import Llama

    scores = random_scores(llava.gguf(), tmp_path)
    path = convert(
        llava.gguf(), scores, tmp_path / "c.gguf", spec=BudgetSpec(budget=48, window=8, water_fill=False)
    ).path
    library.require_patched()
    model = Llama(str(path), n_ctx=1024, n_threads=1, verbose=False)
    model.create_completion(LONG, max_tokens=4)
    stats = library.heads_stats(llama.llama_get_memory(model._ctx.ctx))
    assert stats is not None and stats.n_evictions == 1
    assert stats.n_kept < stats.n_pos * stats.n_layer * stats.n_head_kv / 2
    model.close()


def test_a_converted_file_evicts_the_image_in_llama_cpp_pythons_chat_handler(
    llava: Any, page: Path, tmp_path: Path
) -> None:
    """The handler asks for logits after the text before the image too: an eviction each time."""
    import base64

    from llama_cpp import Llama
    from llama_cpp.llama_chat_format import Llava15ChatHandler

    scores = random_scores(llava.gguf(), tmp_path)
    path = convert(
        llava.gguf(), scores, tmp_path / "c.gguf", spec=BudgetSpec(budget=48, window=8, water_fill=False)
    ).path
    library.require_patched()
    handler = Llava15ChatHandler(clip_model_path=str(llava.mmproj()), verbose=False)
    model = Llama(str(path), chat_handler=handler, n_ctx=1024, n_threads=1, verbose=False)
    url = "data:image/png;base64," + base64.b64encode(page.read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    model.create_chat_completion([{"role": "user", "content": content}], max_tokens=4)  # type: ignore[list-item]
    stats = library.heads_stats(llama.llama_get_memory(model._ctx.ctx))
    assert stats is not None and stats.n_evictions == 2
    held = stats.n_kept / (stats.n_layer * stats.n_head_kv)
    assert held <= 48 + 4 < stats.n_pos / 2
    model.close()


# --- generating


def test_the_same_seed_gives_the_same_text(loaded: Any) -> None:
    model = loaded("llava")
    texts = [answer(model, "x", n_predict=24, sampling=Sampling(1.0, seed))[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_pieces_never_end_within_a_character(loaded: Any) -> None:
    model = loaded("llava")
    generation = generate(model, "x", n_predict=64, sampling=Sampling(2.0, seed=3))
    pieces = list(generation)
    data = b"".join(model.piece(token) for token in generation.stats().tokens)
    assert "".join(pieces) == data.decode("utf-8", "replace")


def test_generation_ends_with_the_context(loaded: Any) -> None:
    model = loaded("llava")
    n_prompt = answer(model, "x", n_predict=1)[1].n_prompt
    assert answer(model, "x", n_predict=100, n_ctx=n_prompt + 10)[1].n_generated == 10


def test_leaving_a_generation_early_frees_it_and_keeps_its_figures(loaded: Any) -> None:
    model = loaded("llava")
    generation = generate(model, "x", n_predict=50)
    next(generation)
    generation.close()
    assert 1 <= generation.stats().n_generated < 50


def test_closing_twice_is_harmless(llava: Any) -> None:
    model = VisionModel.load(llava.gguf(), llava.mmproj(), n_threads=1)
    model.close()
    model.close()


def test_without_the_patch_the_build_command_is_named(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.llama, "_lib", object())
    with pytest.raises(SparseMMError, match=r"python scripts/build_llama_cpp_python\.py install"):
        VisionModel.load(llava.gguf())


# --- the command


def test_json_is_one_object_of_the_documented_keys(llava: Any, page: Path, sparsemm: CommandLine) -> None:
    files = ("-m", llava.gguf(), "--mmproj", llava.mmproj(), "--image", page, "--image", page)
    done = sparsemm("generate", *files, "-p", QUESTION, "-n", 4, "--json")
    figures = done.report
    assert list(figures) == [
        "text",
        "tokens",
        "n_prompt",
        "n_generated",
        "kv",
        "timings",
        "first_token",
        "rss_peak_bytes",
    ]
    assert list(figures["kv"]) == [
        "n_positions",
        "bytes_now",
        "bytes_peak",
        "bytes_full",
        "positions_kept_mean",
        "n_evictions",
    ]
    assert list(figures["timings"]) == ["load_ms", "image_ms", "prompt_ms", "decode_ms_per_token"]
    first = figures["first_token"]
    parts = {name: first[name] for name in ("images", "vision", "prompt", "token")}
    assert list(first) == ["total_ms", *parts]
    assert all(part["ms"] > 0 and part["limit"] is not None for part in parts.values())
    assert sum(part["ms"] for part in parts.values()) < first["total_ms"]
    assert parts["vision"]["ms"] == figures["timings"]["image_ms"]
    assert parts["prompt"]["ms"] == figures["timings"]["prompt_ms"]
    assert parts["images"]["threads"] == parts["token"]["threads"] == 1
    assert parts["vision"]["threads"] == usable_cores()
    assert len(figures["tokens"]) == figures["n_generated"] <= 4
    assert figures["rss_peak_bytes"] > 2**20
    assert done.err == ""


def test_llama_cpp_is_silent_unless_asked(llava: Any, sparsemm: CommandLine) -> None:
    arguments = ("generate", "-m", llava.gguf(), "-p", "x", "-n", 2)
    silent, verbose = sparsemm(*arguments), sparsemm(*arguments, "--verbose")
    assert (silent.status, verbose.status) == (0, 0)
    assert len(silent.err.splitlines()) == 1  # the line of figures
    assert len(verbose.err.splitlines()) > 20


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-m", "nowhere.gguf"], "nowhere.gguf"),
        (["-m", "PAGE"], "not a GGUF file"),
        (["-m", "CUT"], "cut short"),
        (["-m", "MMPROJ"], "image encoder"),
        (["--image", "PAGE"], "--mmproj"),
        (["--mmproj", "MMPROJ", "--image", "nowhere.png"], "nowhere.png: no such file"),
        (["--mmproj", "MMPROJ", "--image", "MODEL"], "not an image"),
        (["--mmproj", "MODEL", "--image", "PAGE"], "not an image encoder"),
        (["--mmproj", "OTHER", "--image", "PAGE"], "n_embd"),
        (["--n-ctx", 5], "--n-ctx allows 5"),
        (["--cache-type-k", "q9"], "unknown cache type 'q9'"),
        (["--cache-type-v", "q9"], "unknown cache type 'q9'"),
        (["--policy", "best"], "unknown policy 'best'"),
        (["--budget", 64], "no head scores"),
        (["--policy", "uniform", "--budget", 8, "--window", 8], "larger than the window"),
        (["--policy", "uniform", "--budget", 0], "--budget is 0"),
        (["--scores", "nowhere.json"], "nowhere.json"),
        (["--scores", "OTHERSCORES"], "do not fit the model"),
        (["--chat-template", "nowhere.jinja"], "nowhere.jinja"),
        (["--chat-template", "{{ 1 }}"], "chat template"),
        (["-n", 0], "--n-predict is 0: it must be 1 to"),
        (["--n-ubatch", 0], "--n-ubatch is 0"),
        (["--threads", 0], "--threads is 0"),
        (["--temp", -1], "--temp is -1"),
        (["--seed", -2], "seed"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: list[Any],
    said: str,
    llava: Any,
    models: Callable[[str], Any],
    page: Path,
    tmp_path: Path,
    sparsemm: CommandLine,
) -> None:
    (tmp_path / "cut.gguf").write_bytes(llava.gguf().read_bytes()[:-5000])
    files = {
        "MODEL": llava.gguf(),
        "MMPROJ": llava.mmproj(),
        "OTHER": models("llava-gqa").mmproj(),
        "OTHERSCORES": random_scores(models("qwen2vl").gguf(), tmp_path),
        "PAGE": page,
        "CUT": tmp_path / "cut.gguf",
    }
    given = [files.get(argument, argument) for argument in arguments]
    model = [] if "-m" in arguments else ["-m", llava.gguf()]
    assert said in sparsemm("generate", *model, *given, "-p", "x").refusal
