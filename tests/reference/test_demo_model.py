"""The shipped model: it reads pages that it has not seen; llama.cpp and transformers ask it the same."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from helpers.command_line import CommandLine
from helpers.paths import ROOT
from sparsemm_edge.demo import DemoModel, marked
from sparsemm_edge.evaluation.metrics import character_accuracy
from sparsemm_edge.pages import grid
from sparsemm_edge.pages.grid import (
    CELL,
    DIGITS,
    GRIDS,
    LETTERS,
    LOOKUP_PROMPTS,
    READ_PROMPT,
    READ_PROMPTS,
    Grid,
    grid_page,
    lookup_prompt,
)
from sparsemm_edge.ranking import held_by_top
from sparsemm_edge.runtime import Conversation, VisionModel, generate
from sparsemm_edge.runtime.prompt import ImagePart, TextPart
from sparsemm_edge.scores import HeadScores

CHECKPOINT = ROOT / "models" / "demo"
SEEDS = range(500, 505)
N_PATCHES = 576


@pytest.fixture(scope="module")
def model() -> Iterator[VisionModel]:
    files = DemoModel()
    with VisionModel.load(files.model, files.mmproj, n_threads=1) as loaded:
        yield loaded


def test_it_reads_five_pages(model: VisionModel) -> None:
    right = []
    for seed in SEEDS:
        page = grid_page(seed)
        said = "".join(generate(model, READ_PROMPT, [page.image], n_predict=96))
        right.append(character_accuracy(said, [page.text]))
    assert np.mean(right) >= 0.97


def test_it_looks_up_a_key_on_five_pages(model: VisionModel) -> None:
    right = 0
    for seed in SEEDS:
        page = grid_page(seed)
        key, answer = page.lookups[seed % len(page.lookups)]
        right += "".join(generate(model, lookup_prompt(key), [page.image], n_predict=16)) == answer
    assert right >= 4


def test_four_look_ups_in_turn_are_answered(model: VisionModel) -> None:
    right = [0, 0, 0, 0]
    for seed in SEEDS:
        page = grid_page(seed)
        with Conversation(model, n_ctx=800) as conversation:
            for turn in range(4):
                key, answer = page.lookups[(seed + turn) % len(page.lookups)]
                image = [page.image] if turn == 0 else []
                right[turn] += "".join(conversation.ask(lookup_prompt(key), image, n_predict=16)) == answer
    assert min(right) >= 4, right


def test_it_reads_and_looks_up_in_either_order(model: VisionModel) -> None:
    read, found = [], 0
    for seed in SEEDS:
        page = grid_page(seed)
        key, answer = page.lookups[seed % len(page.lookups)]
        for questions in ((READ_PROMPT, lookup_prompt(key)), (lookup_prompt(key), READ_PROMPT)):
            with Conversation(model, n_ctx=800) as conversation:
                "".join(conversation.ask(questions[0], [page.image], n_predict=96))
                said = "".join(conversation.ask(questions[1], n_predict=96))
            if questions[1] == READ_PROMPT:
                read.append(character_accuracy(said, [page.text]))
            else:
                found += said == answer
    assert np.mean(read) >= 0.97
    assert found >= 4


@pytest.mark.parametrize("question", [*READ_PROMPTS, *(form.format("KQ") for form in LOOKUP_PROMPTS), "Hé!"])
def test_llama_cpp_and_transformers_see_the_same_tokens(model: VisionModel, question: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    expected = tokenizer(text).input_ids
    image = tokenizer.convert_tokens_to_ids("<image>")
    tokens: list[int] = []
    with model.tokenize(model.chat_prompt(question, 1), [grid_page(0).image]) as prompt:
        for part in prompt.parts:
            tokens += part.tokens.tolist() if isinstance(part, TextPart) else [image]
            assert not isinstance(part, ImagePart) or part.n_tokens == N_PATCHES
    assert tokens == expected
    after = tokens[tokens.index(image) + 1 :]
    if question in (READ_PROMPT, lookup_prompt("KQ")):
        assert len(after) <= 8, "the question must fit into a window of 8 positions"


def test_a_conversation_has_the_tokens_that_the_model_was_trained_on(model: VisionModel) -> None:
    """As the runtime feeds it turn by turn, as the template writes it in one, and as training does."""
    from transformers import AutoTokenizer

    from demo_tokenizer import EOS, encode
    from train_demo_model import PREFIX, make_tail

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    image = tokenizer.convert_tokens_to_ids("<image>")
    page = grid_page(3)
    conversation = [
        (lookup_prompt(page.lookups[0][0]), page.lookups[0][1]),
        (READ_PROMPTS[1], page.text),
        (LOOKUP_PROMPTS[1].format(page.lookups[1][0]), page.lookups[1][1]),
    ]
    fed: list[int] = []
    messages: list[dict[str, object]] = []
    for turn, (question, answer) in enumerate(conversation):
        images = [page.image] if turn == 0 else []
        text = model.chat_prompt(question, len(images), first=turn == 0)
        with model.tokenize(text, images, first=turn == 0) as prompt:
            for part in prompt.parts:
                fed += part.tokens.tolist() if isinstance(part, TextPart) else [image]
        fed += encode(answer)  # as sampled: the end token is not fed, the next turn begins with it
        shown = [{"type": "image"}] * len(images)
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    tail = make_tail([[conversation]], N_PATCHES)
    assert [*PREFIX, image, *tail.tokens[0].tolist()] == fed
    assert tokenizer(tokenizer.apply_chat_template(messages, tokenize=False)).input_ids == [*fed, EOS]
    n = len(PREFIX) + N_PATCHES
    assert tail.positions[0].tolist() == list(range(n, n + tail.tokens.shape[1]))
    answers = "".join(f"{answer}</s>" for _, answer in conversation)
    assert tokenizer.decode(tail.targets[0][tail.targets[0] >= 0].tolist()) == answers


def test_training_asks_what_the_page_answers_and_no_more_in_a_row_than_it_may() -> None:
    from train_demo_model import draw_conversations

    rng = np.random.default_rng(0)
    n_turns, repeated = set(), 0
    for seed in range(200):
        page = grid_page(seed)
        conversations = draw_conversations(page, 8, 6, rng)
        known = dict(page.lookups)
        for conversation in conversations:
            n_turns.add(len(conversation))
            repeated += len({answer for _, answer in conversation}) < len(conversation)
            for question, answer in conversation:
                assert answer == (page.text if question in READ_PROMPTS else known[question[-3:-1]])
    assert n_turns == {1, 2, 3, 4, 5, 6}
    assert repeated > 20, "someone asks the same again"


def test_the_training_script_writes_the_tokens_that_the_model_reads() -> None:
    from transformers import AutoTokenizer

    from demo_tokenizer import decode, encode

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    page = grid_page(7)
    for text in (page.text, f"\n{READ_PROMPT} ASSISTANT:", f"USER: {lookup_prompt('KQ')} ASSISTANT:"):
        assert encode(text) == tokenizer(text, add_special_tokens=False).input_ids
        assert decode(encode(text)) == text == tokenizer.decode(encode(text))


def test_a_tenth_of_its_heads_hold_half_of_the_score() -> None:
    scores = HeadScores.load(DemoModel().scores)
    assert scores.scores.size >= 96
    assert held_by_top(scores.scores, 0.1) >= 0.5


def test_checkpoint_and_card_are_small_enough_to_ship() -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 20 * 2**20
    assert (CHECKPOINT / "README.md").is_file()


# --- the pages it reads -------------------------------------------------------------------------------


def test_the_demo_pages_are_those_that_the_model_was_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, but for the outlines of the glyphs, which come from Pillow."""

    def mask(font: str, size: int, char: str) -> npt.NDArray[np.float32]:
        seed = zlib.crc32(f"{font} {size} {char}".encode())
        return np.random.default_rng(seed).random((20, 20, 1), np.float32)

    monkeypatch.setattr(grid, "_glyph_mask", mask)
    digest = hashlib.sha256()
    for page in [*map(grid_page, range(8)), grid_page(9, 3)]:
        digest.update(page.image.tobytes())
        digest.update(repr((page.name, page.text, page.lookups, page.chunks)).encode())
    assert digest.hexdigest()[:16] == "a47f719ec0ce1752"


def test_a_seed_makes_the_same_page_again_and_another_seed_another() -> None:
    one, same, other = grid_page(3), grid_page(3), grid_page(4)
    assert one.image.tobytes() == same.image.tobytes() and one.text == same.text
    assert one.text != other.text


@pytest.mark.parametrize("kind", GRIDS.values(), ids=lambda kind: kind.name)
@pytest.mark.parametrize("seed", range(20))
def test_a_page_says_what_its_glyphs_say(seed: int, kind: Grid) -> None:
    page = grid_page(seed, grid=kind)
    lines = page.text.split("\n")
    assert kind.n_lines[0] <= len(lines) <= kind.n_lines[1]
    assert "".join(chunk.text for chunk in page.chunks) == page.text.replace(" ", "").replace("\n", "")
    assert set("".join(chunk.text for chunk in page.chunks)) <= set(LETTERS + DIGITS)
    cells = [(chunk.box[1], chunk.box[0]) for chunk in page.chunks]
    assert cells == sorted(set(cells)), "reading order is the order of the cells, one glyph each"
    # letters of keys are nowhere else, so a key can be looked up
    keys = "".join(key for key, _ in page.lookups)
    everything = "".join(chunk.text for chunk in page.chunks)
    assert all(everything.count(letter) == 1 for letter in keys)
    assert [answer for _, answer in page.lookups] == lines


@pytest.mark.parametrize(("kind", "side"), [("grid", 24), ("grid-16", 16)])
def test_ink_is_where_the_glyphs_are(kind: str, side: int) -> None:
    page = grid_page(11, grid=GRIDS[kind])
    pixels = np.asarray(page.image).astype(float)
    paper = np.median(pixels.reshape(-1, 3), axis=0)
    distance = np.abs(pixels - paper).max(axis=2)
    spread = [
        distance[int(c.box[1]) : int(c.box[3]), int(c.box[0]) : int(c.box[2])].max() for c in page.chunks
    ]
    assert min(spread) > 60
    for chunk in page.chunks:  # and only there, but for the pixels by which glyphs reach over their cells
        left, top, right, bottom = (int(edge) for edge in chunk.box)
        distance[max(top - 3, 0) : bottom + 3, max(left - 3, 0) : right + 3] = 0
    assert distance.max() < 60
    assert page.image.size == (CELL * side, CELL * side)


# --- the command --------------------------------------------------------------------------------------


def test_the_demo_reads_a_page_with_every_cache(tmp_path: Path, sparsemm: CommandLine) -> None:
    report = sparsemm("demo", "--seed", 5, "--budgets", 96, "--out", tmp_path, "--json").report
    page = grid_page(5)
    assert report["seed"] == 5
    reading, look_up = report["questions"]
    assert reading["answer"] == page.text and look_up["answer"] in page.text.split("\n")
    for question in report["questions"]:
        full, evicted, evenly = question["runs"]
        assert [(run["policy"], run["budget"]) for run in question["runs"]] == [
            ("full", None),
            ("sparsemm", 96),
            ("uniform", 96),
        ]
        assert evenly["kv"]["positions_kept_mean"] == pytest.approx(
            evicted["kv"]["positions_kept_mean"] - evicted["n_generated"] + evenly["n_generated"], abs=1
        )
        assert (full["kv"]["n_evictions"], evicted["kv"]["n_evictions"]) == (0, 1)
        assert evicted["kv"]["bytes_now"] < 0.5 * full["kv"]["bytes_now"]
        assert (full["errors"] == 0) == (full["text"] == question["answer"])
    for name in ("page.png", "head-map.png", "kept-map.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_demo_shows_answers_side_by_side(tmp_path: Path, sparsemm: CommandLine) -> None:
    image = tmp_path / "mine.png"
    grid_page(6).image.resize((400, 300)).save(image)
    status, out, _ = sparsemm("demo", "--image", image, "--budgets", 64, "--out", tmp_path / "out")
    assert status == 0
    assert "full cache" in out and "64 a head" in out and "64, evenly" in out and "MiB" in out
    assert "on the page" not in out, "nobody knows what the user's picture says"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seed", "1000000"], "999999"),
        (["--image", "NONE.png"], "NONE.png"),
        (["--budgets", "many"], "many"),
        (["--budgets", "4"], "4"),
    ],
)
def test_the_demo_refuses_what_it_cannot_use(
    tmp_path: Path, sparsemm: CommandLine, arguments: list[str], said: str
) -> None:
    assert said in sparsemm("demo", *arguments, "--out", tmp_path).refusal


def test_differing_characters_are_marked() -> None:
    text = marked("KQ 7F3", "KQ 783A")
    assert text.plain == "KQ 7F3·"
    assert [text.plain[span.start : span.end] for span in text.spans if span.style == "bold red"] == [
        "F",
        "·",
    ]
    assert not marked("same", "same").spans
