"""Turns over one cache: what the oracle says of them, what a saved session goes on with, and `chat`."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helpers.agreement import answers_alike, oracle_of
from helpers.chat_templates import render
from helpers.command_line import CommandLine
from helpers.contexts import context_of, decode, evict_by, random_table, raw_context, saved
from helpers.conversations import EVICTION, OPTIONS, QUESTIONS, said
from helpers.models import NAMES, sample_image, test_model
from sparsemm_edge.budgets import BudgetSpec
from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.runtime import Cancelled, Conversation, Eviction, VisionModel
from sparsemm_edge.runtime.encode import encode
from sparsemm_edge.runtime.library import llama
from sparsemm_edge.runtime.prompt import TextPart

CLI = (sys.executable, "-m", "sparsemm_edge.cli")


# --- the oracle


@pytest.mark.parametrize("name", NAMES)
def test_three_turns_about_two_images_are_those_of_the_oracle(name: str) -> None:
    """An image in the first turn, another in the second, a question about both; each turn evicts."""
    files, oracle, window = test_model(name), oracle_of(name), 16
    images = [[sample_image(files.image_size, 1)], [sample_image(files.image_size, 2)], []]
    with VisionModel.load(files.gguf("f16"), files.mmproj("f16"), n_threads=1) as model:
        talk = oracle.conversation(window)
        context, table = None, None
        for turn, question in enumerate(QUESTIONS):
            text = model.chat_prompt(question, len(images[turn]), first=turn == 0)
            with model.tokenize(text, images[turn], first=turn == 0) as prompt:
                wanted = oracle.prompt(text, images[turn], first=turn == 0)
                ids = np.concatenate([part.tokens for part in prompt.parts if isinstance(part, TextPart)])
                assert np.array_equal(ids, wanted.ids[~wanted.is_image])
                if context is None:
                    table = random_table(model, 48, window, prompt.n_tokens)
                    evict_by(model, table, window)
                    context = context_of(model, n_ctx=2048)
                context.prefill(encode(model, prompt, context.n_past))
            answers_alike(context, talk, talk.read(wanted, table), 12)
        assert context.kv_stats().n_evictions == 3
        context.close()


# --- templates


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (  # ChatML
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
            "{% else %}{% for part in m.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|>"
            "<|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            "<|im_end|>\n<|im_start|>user\n<M>what?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (  # plain text only, as Vicuna
            "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content + '' }}"
            " ASSISTANT:{% else %} {{ m.content.strip() }}{{ eos_token }}{% endif %}{% endfor %}",
            "</s>USER: <M>\nwhat? ASSISTANT:",
        ),
    ],
)
def test_a_later_message_begins_with_the_end_of_the_reply(template: str, expected: str) -> None:
    text = render(template, "what?", 1, marker="<M>", bos="<s>", eos="</s>", first=False)
    assert text == expected


# --- conversations


def test_a_turn_reads_only_what_is_new(llava: VisionModel, pages: list[Path]) -> None:
    with Conversation(llava, n_ctx=2048, eviction=EVICTION) as conversation:
        said(conversation, QUESTIONS[0], pages[:1])
        first = conversation.stats()
        said(conversation, QUESTIONS[2])
        second = conversation.stats()
    assert second.n_prompt < first.n_prompt - 50, "the image is not read again"
    assert second.kv.n_positions == first.kv.n_positions + second.n_prompt + second.n_generated - 1
    assert (first.kv.n_evictions, second.kv.n_evictions) == (1, 2)


def test_a_question_that_fails_or_is_given_up_leaves_the_conversation_as_it_was(
    llava: VisionModel, pages: list[Path]
) -> None:
    with (
        Conversation(llava, n_ctx=400, eviction=EVICTION) as plain,
        Conversation(llava, n_ctx=400, eviction=EVICTION) as troubled,
    ):
        calls = 0

        def cancelled() -> bool:
            nonlocal calls
            calls += 1
            return calls > 20

        with pytest.raises(Cancelled):
            said(troubled, QUESTIONS[0], pages[:1], cancelled=cancelled)
        assert said(plain, QUESTIONS[0], pages[:1]) == said(troubled, QUESTIONS[0], pages[:1])
        calls = 0
        with pytest.raises(Cancelled):
            said(troubled, QUESTIONS[1], pages[1:], cancelled=cancelled)
        with pytest.raises(SparseMMError, match="the context of 400 positions is full"):
            said(troubled, "No, no, no. " * 100)
        with pytest.raises(SparseMMError, match="no such file"):
            said(troubled, QUESTIONS[1], ["nowhere.png"])
        assert said(plain, QUESTIONS[2]) == said(troubled, QUESTIONS[2])


def test_an_answer_that_is_cut_short_is_part_of_the_conversation(llava: VisionModel) -> None:
    with Conversation(llava, n_ctx=1024, eviction=EVICTION) as conversation:
        pieces = conversation.ask("Hello", n_predict=50)
        next(pieces)
        pieces.close()
        stats = conversation.stats()
        assert stats.n_generated >= 1
        said(conversation, "And now?")
        assert conversation.context is not None
        later = conversation.stats()
    # the token that was said last was not in the cache yet: it goes with the next question
    assert later.kv.n_positions == stats.kv.n_positions + later.n_prompt + later.n_generated - 1


def test_a_short_first_question_does_not_make_all_heads_alike(llava: VisionModel) -> None:
    """It fits into the budget, which is then distributed for the length that the chat can reach."""
    budget = Eviction(policy="random", budget=64, window=8)
    with Conversation(llava, n_ctx=1024, eviction=budget) as conversation:
        said(conversation, "Hello")
        said(conversation, "Tell me more of it, please, and slowly. " * 8)
        assert conversation.context is not None
        lengths = {len(head) for heads in conversation.context.kept() for head in heads}
    assert len(lengths) > 5


# --- saved sessions


def generate(*arguments: object) -> tuple[list[int], str]:
    """`generate` in a process of its own: the tokens, and what it wrote on stderr."""
    done = subprocess.run(
        [*CLI, "generate", *map(str, arguments), "-n", "12", "--json", *OPTIONS[-2:]],
        capture_output=True,
        text=True,
    )
    return (json.loads(done.stdout)["tokens"] if done.returncode == 0 else []), done.stderr


@pytest.fixture(scope="module")
def session_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A question about an image and its answer, saved by `generate`."""
    files, folder = test_model("llava"), tmp_path_factory.mktemp("context")
    sample_image(files.image_size, 0).save(folder / "page.png")
    model = ("-m", files.gguf("f16"), "--mmproj", files.mmproj("f16"), "--image", folder / "page.png")
    path = folder / "page.session"
    tokens, error = generate(*model, *OPTIONS[:-2], "-p", QUESTIONS[0], "--save-session", path)
    assert tokens, error
    return path


def test_a_new_process_goes_on_as_if_there_had_been_no_break(
    llava: VisionModel, session_file: Path, pages: list[Path]
) -> None:
    with Conversation(llava, n_ctx=2048, eviction=EVICTION, multi_turn=False) as conversation:
        said(conversation, QUESTIONS[0], pages[:1])
        expected = [said(conversation, QUESTIONS[2]), said(conversation, QUESTIONS[1], pages[1:])]
    again = session_file.with_name("again.session")
    model = ("-m", llava.path, "--load-session")
    tokens, _ = generate(*model, session_file, "-p", QUESTIONS[2], "--save-session", again)
    assert tuple(tokens) == expected[0]
    # and once more, with another image and the options of the first time
    image = ("--mmproj", test_model("llava").mmproj("f16"), "--image", pages[1])
    tokens, _ = generate(*model, again, *image, *OPTIONS[:-2], "-p", QUESTIONS[1])
    assert tuple(tokens) == expected[1]


def test_a_session_that_does_not_fit_is_refused_in_one_line(
    llava: VisionModel, session_file: Path, tmp_path: Path, sparsemm: CommandLine
) -> None:
    def refusal(path: object, *options: object, model: object = llava.path) -> str:
        arguments = ("generate", "-m", model, "--load-session", path, "-p", "x", "-n", 2, *options)
        return sparsemm(*arguments).refusal

    assert "saved with another model, model-f16.gguf" in refusal(
        session_file, model=test_model("llava-gqa").gguf("f16")
    )
    assert "saved with cache types f16/f16, not q8_0/f16" in refusal(session_file, "--cache-type-k", "q8_0")
    assert "other head budgets" in refusal(session_file, *OPTIONS, "--budget", 32)
    assert "other head budgets" in refusal(session_file, "--no-evict")
    without = "saved without --kv-max-tail, and cannot go on otherwise: leave the options of eviction out"
    assert without in refusal(session_file, *OPTIONS, "--kv-max-tail", 64)
    assert without in refusal(session_file, "--kv-max-tail", 64)  # of a model that was never converted
    assert "nowhere.session" in refusal(tmp_path / "nowhere.session")
    assert "not a saved conversation" in refusal(llava.path)

    content = session_file.read_bytes()
    header = json.loads(content.split(b"\n")[0])
    n_bytes = header["n_bytes"]
    half, flipped = tmp_path / "half.session", tmp_path / "flipped.session"
    half.write_bytes(content[: len(content) // 2])
    flipped.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    assert f" bytes, expected {n_bytes}: save it again" in refusal(half)
    assert "damaged, it has changed since it was saved: save it again" in refusal(flipped)
    for key, value, message in (
        ("version", 1, "a saved conversation of version 1, this reads 2"),
        ("n_past", "x", "damaged, 'n_past' in its first line is missing or has a wrong value"),
        ("planned", [1], "damaged, 'planned' in its first line is missing or has a wrong value"),
        ("eviction", {}, "damaged, 'eviction' in its first line is missing or has a wrong value"),
    ):
        (tmp_path / "odd.session").write_bytes(
            json.dumps({**header, key: value}).encode() + content[content.index(b"\n") :]
        )
        assert message in refusal(tmp_path / "odd.session")


def test_a_bounded_answer_stays_bounded_when_it_is_gone_on_with(
    llava: VisionModel, tmp_path: Path, sparsemm: CommandLine
) -> None:
    """The bound may be given again, the same one; the model was never converted."""
    path, bounded = tmp_path / "bounded.session", replace(EVICTION, max_tail=9)
    with Conversation(llava, n_ctx=1024, eviction=bounded, multi_turn=False) as conversation:
        said(conversation, "Tell me of it, please. " * 8)
        conversation.save(path)
        expected = said(conversation, QUESTIONS[2])
    arguments = ("generate", "-m", llava.path, "--load-session", path, "-p", QUESTIONS[2], "-n", 12, "--json")
    for bound in ((), ("--kv-max-tail", 9), (*OPTIONS, "--kv-max-tail", 9)):
        assert tuple(sparsemm(*arguments, "--threads", 1, *bound).report["tokens"]) == expected
    for other in (("--kv-max-tail", 10), OPTIONS):
        assert "saved with --kv-max-tail 9, and" in sparsemm(*arguments, *other).refusal


def test_a_state_is_a_tenth_of_the_full_caches(llava: VisionModel) -> None:
    """2944 positions, as an image takes in LLaVA-NeXT, and a mean budget of 256."""
    n, tokens = 2944, np.random.default_rng(0).integers(10, 290, 2944).tolist()
    table = BudgetSpec("random", 256, 32, residual=False).table(None, (5, 4), n)
    sizes = []
    for budgets in (table, None):
        evict_by(llava, budgets, 32)
        ctx = raw_context(llava, n_ctx=3072, n_batch=3072, flash_attn_type=1)
        assert ctx
        decode(ctx, tokens, 0)
        sizes.append(len(saved(ctx, True)))
        llama.llama_free(ctx)
    assert sizes[0] < 0.1 * sizes[1]
