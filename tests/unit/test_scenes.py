"""Scenes to score heads on: every thing is drawn where its box says, and its words are its alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.command_line import CommandLine
from sparsemm_edge.pages.readers import open_pages
from sparsemm_edge.pages.scenes import COLOURS, NUMBERS, PLACES, SHAPES, SIZE, Scene, named, scene
from sparsemm_edge.scores import HeadScores
from sparsemm_edge.scoring.target_response import reading_accuracy, unique_chunk

SEEDS = range(120)
KINDS = ("Which shapes", "Which shape is", "How many", "Which bars")


def kind(page: Scene) -> str:
    return next(kind for kind in KINDS if page.question.startswith(kind))


def ink(page: Scene, colour: str | None = None) -> np.ndarray:
    """Where a scene is not paper, or where it has one of COLOURS: bool [height, width]."""
    pixels = np.asarray(page.image).astype(int)
    paper = pixels[-1, -1]
    return (pixels != paper).any(axis=2) if colour is None else (pixels == COLOURS[colour]).all(axis=2)


def test_a_seed_makes_a_scene_and_all_kinds_come() -> None:
    first, again, other = scene(3), scene(3), scene(4)
    assert (first.question, first.text, first.chunks) == (again.question, again.text, again.chunks)
    assert first.image.tobytes() == again.image.tobytes() != other.image.tobytes()
    assert {kind(scene(seed)) for seed in SEEDS} == set(KINDS)


def test_every_word_of_a_thing_is_its_alone_and_the_answer_names_what_is_asked() -> None:
    for seed in SEEDS:
        page = scene(seed)
        for index in page.asked:
            for word in page.chunks[index].text.split():
                assert unique_chunk(word, page.chunks) == page.chunks[index], (seed, word)
        assert named(page.text, page) == named(page.text.upper(), page) == 1, seed
        assert reading_accuracy(page.text, page) == 1
        assert named("There is nothing.", page) == 0, seed


def test_things_are_drawn_where_their_boxes_are() -> None:
    for seed in SEEDS:
        page = scene(seed)
        covered = np.zeros((SIZE, SIZE), bool)
        for chunk in page.chunks:
            left, top, right, bottom = (round(edge) for edge in chunk.box)
            assert 0 <= left < right <= SIZE and 0 <= top < bottom <= SIZE
            covered[top:bottom, left:right] = True
            assert ink(page)[top:bottom, left:right].any()
        if kind(page) == "Which bars":
            continue  # whose axis is nobody's
        assert not ink(page)[~covered].any(), seed
        for chunk in page.chunks:
            colour = chunk.text.split()[0]
            if colour not in COLOURS:
                continue
            rows, columns = np.nonzero(ink(page, colour))
            found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            np.testing.assert_allclose(found, chunk.box, atol=2.5)


def test_questions_of_places_and_numbers_have_the_answers_that_are_drawn() -> None:
    n_places = n_counts = 0
    for seed in SEEDS:
        page = scene(seed)
        asked = page.chunks[page.asked[0]]
        if kind(page) == "Which shape is":
            row, column = (int((asked.box[i] + asked.box[i + 2]) / 2 // (SIZE / 3)) for i in (1, 0))
            assert f"Which shape is {PLACES[row][column]} of this picture" in page.question
            n_places += 1
        elif kind(page) == "How many":
            others = {chunk.text.split()[0] for chunk in page.chunks[1:]}
            drawn = {colour for colour in COLOURS if ink(page, colour).sum() > 50} - others
            assert page.text == str(len(drawn))  # every one has its colour
            assert asked.text.split()[1] == NUMBERS[len(drawn)]
            assert any(page.question.startswith(f"How many {shape}") for shape in SHAPES)
            n_counts += 1
    assert n_places > 10 and n_counts > 10


def test_half_of_an_answer_is_half_right() -> None:
    page = next(scene(seed) for seed in SEEDS if kind(scene(seed)) == "Which shapes")
    things = page.text.split(", ")
    assert named(f"I see a {things[0]}.", page) == pytest.approx(1 / len(things))
    colour, shape = things[0].split()
    assert named(f"a {shape}", page) == named(f"something {colour}", page) == 0
    count = next(scene(seed) for seed in SEEDS if kind(scene(seed)) == "How many")
    assert named(f"There are {NUMBERS[int(count.text)]} of them.", count) == 1


def test_scores_say_which_kind_they_come_from_and_compare_shows_how_kinds_differ(
    models: Callable[[str], Any], tmp_path: Path, sparsemm: CommandLine
) -> None:
    files = models("llava-gqa")
    source = ("score", files.gguf(), "--mmproj", files.mmproj(), "--threads", 1)
    made = {}
    for data in ("documents", "scenes"):
        made[data] = tmp_path / f"{data}.json"
        options = ("--pages", 4, "--max-new-tokens", 40, "--page-size", "168x168")
        done = sparsemm(*source, "--data", data, "--out", made[data], *options)
        assert done.status == 0, done.err
    scenes = HeadScores.load(made["scenes"]).provenance
    assert scenes["kind"] == "scenes" and 0 <= scenes["things_named"] <= 1
    assert "character_accuracy" not in scenes
    assert HeadScores.load(made["documents"]).provenance["kind"] == "reading"
    assert "of the things asked for named" in sparsemm("scores", "show", made["scenes"]).out

    report = sparsemm("scores", "compare", made["documents"], made["scenes"], "--json").report
    assert report["kinds"] == ["reading", "scenes"]
    tables = [HeadScores.load(path).normalised() for path in made.values()]
    first = report["differences"][0]
    assert first["shares"] == pytest.approx([table[first["layer"], first["head"]] for table in tables])
    largest = np.abs(tables[0] - tables[1]).max()
    assert abs(first["shares"][0] - first["shares"][1]) == pytest.approx(largest)
    shown = sparsemm("scores", "compare", *made.values()).out
    assert "kind reading" in shown and "kind scenes" in shown and "heads that differ most" in shown


def test_scenes_are_pages_of_every_source_and_seed() -> None:
    pages = open_pages("scenes", 3, seed=1)
    assert (pages.kind, pages.n_pages) == ("scenes", 3)
    assert pages.page(0).image.tobytes() != open_pages("scenes", 3).page(0).image.tobytes()
