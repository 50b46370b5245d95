"""The test models are what they claim: the same model in PyTorch and in llama.cpp, and worth testing on."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import gguf
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from helpers.models import NAMES, TestModel, sample_image, test_model
from helpers.native import Native
from helpers.oracle import Oracle, Prompt, attention_of_the_last, leads

TEXT = "The quick brown fox jumps over the lazy dog; 3 apples and 14 pears cost $7.50 → déjà vu, no? " * 2
QUESTION = "What is written here? Answer briefly."


@cache
def oracle_of(name: str) -> Oracle:
    return Oracle(test_model(name).hf)


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest) -> TestModel:
    return test_model(request.param)


@pytest.fixture(scope="module")
def oracle(model: TestModel) -> Oracle:
    return oracle_of(model.name)


@pytest.fixture(scope="module")
def native(model: TestModel) -> Iterator[Native]:
    with Native(model.gguf("f32"), model.mmproj("f32")) as opened:
        yield opened


@pytest.fixture(params=["image", "text"])
def asked(request: pytest.FixtureRequest, model: TestModel, oracle: Oracle) -> tuple[str, list[Image.Image]]:
    """A prompt in the model's chat template: a question about an image, or a longer text."""
    if request.param == "text":
        return oracle.chat(TEXT), []
    return oracle.chat(QUESTION, 1), [sample_image(model.image_size, 7)]


def test_llama_cpp_sees_the_same_tokens(
    native: Native, oracle: Oracle, asked: tuple[str, list[Image.Image]]
) -> None:
    prompt = oracle.prompt(*asked)
    found: list[int] = []
    for chunk in native.chunks(*asked):
        found += [-1] * chunk.n_tokens if chunk.is_image else chunk.tokens
    assert found == np.where(prompt.is_image, -1, prompt.ids).tolist()
    assert sum(chunk.n_pos for chunk in native.chunks(*asked)) == prompt.next_pos


def test_two_images_in_one_prompt_are_two_runs_of_image_tokens(
    native: Native, oracle: Oracle, model: TestModel
) -> None:
    images = [sample_image(model.image_size, seed) for seed in (1, 2)]
    text = oracle.chat(QUESTION, 2)
    prompt = oracle.prompt(text, images)
    chunks = native.chunks(text, images)
    assert [c.n_tokens for c in chunks if c.is_image] == [prompt.is_image.sum() // 2] * 2
    assert sum(c.n_tokens for c in chunks) == len(prompt)


def test_the_processor_and_the_chat_template_agree_with_the_oracle(model: TestModel, oracle: Oracle) -> None:
    if oracle.is_qwen:
        pytest.skip("Qwen2VLProcessor needs torchvision, for videos")
    processor = AutoProcessor.from_pretrained(model.hf)
    image = sample_image(model.image_size, 7)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    expected = np.asarray(processor(images=[image], text=text)["input_ids"])[0]
    assert np.array_equal(oracle.prompt(oracle.chat(QUESTION, 1), [image]).ids, expected)


def test_the_gguf_carries_the_chat_template(model: TestModel, oracle: Oracle) -> None:
    field = gguf.GGUFReader(model.gguf("f16")).fields["tokenizer.chat_template"]
    assert field.contents() == oracle.tokenizer.chat_template


@pytest.mark.parametrize("outtype", ["f16", "f32"])
def test_image_embeddings_are_the_same(model: TestModel, oracle: Oracle, outtype: str) -> None:
    image = sample_image(model.image_size, 7)
    prompt = oracle.prompt(oracle.chat(QUESTION, 1), [image])
    expected = prompt.embeds[0].numpy()[prompt.is_image]
    with Native(model.gguf(outtype), model.mmproj(outtype)) as native:
        found = native.image_embeddings(image)
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-2


def test_the_full_cache_gives_the_same_32_tokens_and_logits(
    native: Native, oracle: Oracle, asked: tuple[str, list[Image.Image]]
) -> None:
    """Without flash attention, which rounds K and V to f16, llama.cpp computes what PyTorch computes."""
    tokens, logits = native.greedy(*asked, flash_attn=False, type_kv=0)
    forced = oracle.run(oracle.prompt(*asked), force=tokens)
    error = np.linalg.norm(logits - forced.logits, axis=1) / np.linalg.norm(forced.logits, axis=1)
    if asked[1]:  # an image: mtmd reads GELU from a table of f16 values
        assert error.max() < 5e-3
        assert leads(forced, tokens).max() < 1e-2
    else:
        assert error.max() < 1e-4
        assert tokens == forced.tokens


@pytest.mark.parametrize("n_ubatch", [None, 64])
@pytest.mark.parametrize("outtype", ["f16", "f32"])
def test_flash_attention_and_f16_agree_up_to_ties(
    model: TestModel,
    oracle: Oracle,
    asked: tuple[str, list[Image.Image]],
    outtype: str,
    n_ubatch: int | None,
) -> None:
    with Native(model.gguf(outtype), model.mmproj(outtype)) as native:
        tokens, logits = native.greedy(*asked, n_ubatch=n_ubatch, type_kv=1)
    forced = oracle.run(oracle.prompt(*asked), force=tokens)
    error = np.linalg.norm(logits - forced.logits, axis=1) / np.linalg.norm(forced.logits, axis=1)
    assert error.max() < 5e-3
    assert leads(forced, tokens).max() < 2e-2


def test_attention_is_peaky_and_heads_differ(oracle: Oracle, model: TestModel) -> None:
    """Else the votes of an eviction would be ties, and tests of it coin tosses."""
    prompt = oracle.prompt(oracle.chat(QUESTION, 1), [sample_image(model.image_size, 7)])
    oracle.run(prompt, n_predict=1)
    rows = [attention_of_the_last(tap.query, tap.key, 32) for tap in oracle.taps]
    entropy = torch.stack([-(a * a.clamp_min(1e-30).log()).sum(-1).mean(1) for a in rows])
    entropy /= np.log(len(prompt))
    assert entropy.mean() < 0.7, "in units of the uniform distribution's"
    assert entropy.max() > 1.3 * entropy.min()
    on_image = torch.stack([a[..., torch.from_numpy(prompt.is_image)].sum(-1).mean() for a in rows])
    assert on_image.min() > 0.25


def test_answers_depend_on_the_image_and_on_what_is_evicted(oracle: Oracle, model: TestModel) -> None:
    def prompt(seed: int) -> Prompt:
        return oracle.prompt(oracle.chat(QUESTION, 1), [sample_image(model.image_size, seed)])

    answers = {tuple(oracle.run(prompt(seed)).tokens) for seed in range(4)}
    assert len(answers) == 4
    assert all(len(set(answer)) >= 4 for answer in answers)
    table = np.full((oracle.n_layer, oracle.n_head_kv), 48)
    assert oracle.run(prompt(0), table).tokens != oracle.run(prompt(0)).tokens
