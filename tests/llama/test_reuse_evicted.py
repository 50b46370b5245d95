"""An evicted image is kept in a file: a new question about it reads nothing but itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.command_line import CommandLine
from helpers.models import sample_image, test_model
from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.runtime import Conversation, Eviction, GenerationStats, Loading, VisionModel, generate
from sparsemm_edge.runtime.context import Context
from sparsemm_edge.runtime.encode import encode
from sparsemm_edge.runtime.library import llama

QUESTION, OTHER = "What is written here?", "And who wrote it, on which day?"
EVICTION = Eviction(policy="uniform", budget=24)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """`read()`: how many tokens llama.cpp was given since the last call."""
    plain, count = llama.llama_decode, [0]

    def counting(context: Any, batch: Any) -> Any:
        count[0] += batch.n_tokens
        return plain(context, batch)

    monkeypatch.setattr(llama, "llama_decode", counting)

    def since() -> int:
        found, count[0] = count[0], 0
        return found

    return since


@pytest.fixture
def ask(tmp_path: Path, read: Callable[[], int]) -> Callable[..., tuple[GenerationStats, int]]:
    """`ask(question)` loads the model anew and asks about a picture: the figures, and the tokens read."""

    def ask(question: str, name: str = "llava", seed: int = 1, reuse: bool = True, **options: Any) -> Any:
        files, loading = test_model(name), Loading(image_cache=str(tmp_path / "kept"))
        read()
        with VisionModel.load(files.gguf(), files.mmproj(), n_threads=1, loading=loading) as model:
            options = {"eviction": EVICTION, "n_predict": 6, "reuse_evicted": reuse, **options}
            answer = generate(model, question, [sample_image(files.image_size, seed)], **options)
            list(answer)
            n_read = read() - max(answer.stats().n_generated - 1 + answer.stats().ended, 0)
        return answer.stats(), n_read

    return ask


def kept_files(folder: Path) -> list[Path]:
    return sorted((folder / "kept").glob("*.sequence"))


@pytest.mark.parametrize("name", ["llava", "llava-gqa", "qwen2vl"])
def test_a_new_question_about_a_kept_image_reads_itself_alone(
    name: str, ask: Callable[..., Any], tmp_path: Path
) -> None:
    first, n_first = ask(QUESTION, name)
    assert n_first == first.n_prompt and first.kv.n_evictions == 1
    (kept,) = kept_files(tmp_path)

    again, n_again = ask(QUESTION, name)
    other, n_other = ask(OTHER, name)

    n_images = first.n_prompt - n_again
    assert n_images >= 16 and 0 < n_again < n_other == other.n_prompt - n_images
    assert (again.tokens, again.kv) == (first.tokens, replace(first.kv, bytes_peak=again.kv.bytes_peak))
    assert again.first_token.vision.weight_bytes == 0  # nor is it encoded
    assert kept_files(tmp_path) == [kept]
    # and as if the other question had been the first about it
    kept.unlink()
    assert ask(OTHER, name)[0].tokens == other.tokens


@pytest.mark.parametrize("name", ["llava", "qwen2vl"])
def test_a_full_cache_answers_from_a_kept_image_as_ever(name: str, ask: Callable[..., Any]) -> None:
    options = {"eviction": Eviction(False)}
    plain, n_plain = ask(QUESTION, name, reuse=False, **options)
    for _ in range(2):
        found, n_read = ask(QUESTION, name, **options)
        assert found.tokens == plain.tokens
    assert n_read < n_plain == plain.n_prompt


def test_its_last_positions_vote_and_the_question_evicts_nothing(tmp_path: Path) -> None:
    files, loading = test_model("llava"), Loading(image_cache=str(tmp_path))
    image = sample_image(files.image_size, 1)
    with VisionModel.load(files.gguf(), files.mmproj(), n_threads=1, loading=loading) as model:
        with model.tokenize(model.chat_prompt(QUESTION, 1), [image]) as prompt:
            images, after = prompt.at_last_image()
            table = model.plan(replace(EVICTION, window=6), images.n_tokens)  # a quarter of the budget
            assert table is not None
            with Context(model, table, n_ctx=prompt.n_tokens + 8) as context:
                context.prefill(encode(model, images))
                alone = context.kept()
        held = np.arange(images.n_tokens, images.n_tokens + len(after))
        for _ in range(2):  # read, and from the file
            with Conversation(model, eviction=EVICTION, multi_turn=False, reuse_evicted=True) as conversation:
                list(conversation.ask(QUESTION, [image], n_predict=1))
                assert conversation.context is not None
                for heads, others in zip(conversation.context.kept(), alone, strict=True):
                    for kept, expected in zip(heads, others, strict=True):
                        assert np.array_equal(kept, [*expected, *held])


@pytest.mark.parametrize(
    "differs",
    [
        {"seed": 2},
        {"system": "You are brief."},
        {"eviction": replace(EVICTION, budget=32)},
        {"eviction": replace(EVICTION, window=4)},
        {"eviction": replace(EVICTION, residual=False)},
        {"eviction": replace(EVICTION, vote="snapkv")},
        {"eviction": replace(EVICTION, max_tail=64)},
        {"eviction": Eviction(False)},
        {"cache_type_k": "q8_0"},
        {"n_ubatch": 32},
    ],
    ids=str,
)
def test_what_was_evicted_otherwise_is_not_taken(
    differs: dict[str, Any], ask: Callable[..., Any], tmp_path: Path
) -> None:
    stats, n_read = ask(QUESTION)
    for options, files in (({}, 1), (differs, 2)):
        found, n_found = ask(QUESTION, **options)
        assert len(kept_files(tmp_path)) == files
        assert n_found == found.n_prompt if files == 2 else n_found < n_read
    assert ask(QUESTION)[0].tokens == stats.tokens


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"not one", lambda data: b""])
def test_a_damaged_file_is_one_line_and_written_again(
    damage: Callable[[bytes], bytes],
    ask: Callable[..., Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, n_first = ask(QUESTION)
    (path,) = kept_files(tmp_path)
    data = path.read_bytes()
    path.write_bytes(damage(data))

    again, n_again = ask(QUESTION)

    assert (again.tokens, n_again) == (first.tokens, n_first)
    (line,) = caplog.messages
    assert line == f"warning: {path}: not a kept sequence, or a damaged one; it is made anew"
    assert path.read_bytes() == data and ask(QUESTION)[1] < n_first


def test_a_state_that_llama_cpp_refuses_is_read_anew(
    ask: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, n_first = ask(QUESTION)
    plain = llama.llama_state_seq_set_data

    def cut(context: Any, data: Any, size: int, sequence: int) -> Any:
        return plain(context, data, size - 8, sequence)

    monkeypatch.setattr(llama, "llama_state_seq_set_data", cut)
    again, n_again = ask(QUESTION)
    assert (again.tokens, n_again) == (first.tokens, n_first)
    assert len(caplog.messages) == 1 and "cannot restore the KV cache" in caplog.messages[0]


def test_a_conversation_goes_on_from_a_kept_image(
    tmp_path: Path, read: Callable[[], int], sparsemm: CommandLine
) -> None:
    files, loading = test_model("llava"), Loading(image_cache=str(tmp_path / "kept"))
    image, saved = sample_image(files.image_size, 1), tmp_path / "saved"
    talks: list[list[str]] = []
    with VisionModel.load(files.gguf(), files.mmproj(), n_threads=1, loading=loading) as model:
        for _ in range(2):
            options: dict[str, Any] = {"n_ctx": 1024, "eviction": EVICTION}
            with Conversation(model, **options, reuse_evicted=True) as conversation:
                said = ["".join(conversation.ask(QUESTION, [image], n_predict=6))]
                said.append("".join(conversation.retry(n_predict=6)))
                said.append("".join(conversation.ask(OTHER, n_predict=6)))
                conversation.save(saved)
                said.append("".join(conversation.ask(QUESTION, n_predict=6)))
            with Conversation(model, n_ctx=1024, resume=saved) as conversation:
                said.append("".join(conversation.ask(QUESTION, n_predict=6)))
            talks.append(said)
        # without an image there is nothing to keep
        with Conversation(model, **options, reuse_evicted=True) as conversation:
            list(conversation.ask(QUESTION, n_predict=2))
    assert talks[0] == talks[1]
    assert talks[0][0] == talks[0][1] and talks[0][3] == talks[0][4]
    assert len(kept_files(tmp_path)) == 1


def test_it_needs_a_folder(tmp_path: Path, sparsemm: CommandLine) -> None:
    files, page = test_model("llava"), tmp_path / "page.png"
    sample_image(files.image_size, 1).save(page)
    command = ("generate", "-m", files.gguf(), "--mmproj", files.mmproj(), "--image", page, "-p", QUESTION)
    evicted = ("--policy", "uniform", "--budget", 24, "-n", 4, "--json", "--reuse-evicted")
    assert "give one with --image-cache" in sparsemm(*command, *evicted).refusal

    kept = ("--image-cache", tmp_path / "kept")
    first, second = sparsemm(*command, *evicted, *kept).report, sparsemm(*command, *evicted, *kept).report
    assert first["tokens"] == second["tokens"] and len(kept_files(tmp_path)) == 1

    with (
        VisionModel.load(files.gguf(), files.mmproj()) as model,
        pytest.raises(SparseMMError, match="--image-cache"),
    ):
        Conversation(model, reuse_evicted=True)
