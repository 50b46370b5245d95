"""The metrics are those of their papers: values computed by hand from the definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.evaluation.metrics import (
    METRICS,
    character_error_rate,
    check_question,
    compare,
    edit_distance,
    kl_divergence,
    vqa_normalised,
)


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)],
)
def test_edit_distance_counts_insertions_deletions_and_substitutions(
    one: str, other: str, distance: int
) -> None:
    assert edit_distance(one, other) == edit_distance(other, one) == distance


def test_the_character_error_rate_is_over_the_reference() -> None:
    assert character_error_rate("kitten", "sitting") == pytest.approx(3 / 7)
    assert character_error_rate("a long answer", "a") == 12
    assert METRICS["cer"]("kitten", ["sitting"]) == pytest.approx(4 / 7)
    assert METRICS["cer"]("a long answer", ["a"]) == 0  # not below
    assert METRICS["cer"]("kitten", ["sitting", "kitte"]) == pytest.approx(4 / 5)


def test_exact_match_forgives_white_space_at_the_ends_only() -> None:
    assert METRICS["exact_match"](" KQ 7F3\n", ["AB", "KQ 7F3"]) == 1
    assert METRICS["exact_match"]("KQ 7f3", ["KQ 7F3"]) == 0
    assert METRICS["exact_match"]("KQ  7F3", ["KQ 7F3"]) == 0


@pytest.mark.parametrize(
    ("answer", "accepted", "expected"),
    [
        ("The Coca  Cola", ["the coca cola"], 1.0),
        ("Moshe Kol", ["Moshe Kohl"], 0.9),  # one letter of ten
        ("abcd", ["abxy"], 0.0),  # half of it: at the threshold
        ("abcde", ["abcxy"], 0.6),
        ("abcde", ["zzzzz", "abcdx"], 0.8),  # the best of the accepted
        ("", ["abc"], 0.0),
    ],
)
def test_anls(answer: str, accepted: list[str], expected: float) -> None:
    assert METRICS["anls"](answer, accepted) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("n_same", "expected"),
    # leaving each of ten people out in turn: of n who agree, n see n - 1 others and 10 - n see n
    [(0, 0.0), (1, 0.3), (2, (2 * 1 / 3 + 8 * 2 / 3) / 10), (3, (3 * 2 / 3 + 7) / 10), (4, 1.0), (10, 1.0)],
)
def test_vqa_accuracy_is_a_mean_over_leaving_each_person_out(n_same: int, expected: float) -> None:
    people = ["Nokia"] * n_same + ["something else"] * (10 - n_same)
    assert METRICS["vqa_accuracy"]("nokia", people) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("given", "normalised"),
    [
        ("The Two dogs.", "2 dogs"),
        ("an apple, a pear", "apple pear"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("black/white", "black white"),
        ("what ?", "what"),
        ("don't", "dont"),
        ("dont", "dont"),
        ("line\nbreak", "line break"),
    ],
)
def test_vqa_answers_are_compared_without_case_articles_and_punctuation(given: str, normalised: str) -> None:
    assert vqa_normalised(given) == normalised


@pytest.mark.parametrize(
    ("answer", "accepted", "right"),
    [
        ("105", "100", True),
        ("105.1", "100", False),
        ("95", "100", True),
        ("94.9", "100", False),
        ("-10.4", "-10", True),
        ("10", "-10", False),
        ("12%", "0.12", True),
        ("12", "12%", True),
        ("2%", "2", True),
        ("2 %", "2%", True),
        ("0.02", "2%", True),
        ("2%", "200%", False),
        ("2%", "200", False),
        ("200%", "0.02", False),
        ("1,000", "1000", True),
        ("1,234,567.5", "1234567", True),
        ("1,00", "100", False),
        ("1,5", "15", False),
        ("Yes.", "Yes", True),
        ("yes", "Yes.", True),
        ("7.", "7", True),
        ("NaN", "nan", True),
        ("inf", "7", False),
        ("", "7", False),
        ("0", "0", True),
        ("0.0", "0", True),
        ("0.01", "0", False),
        ("Blue", "blue", True),
        ("light blue", "blue", False),
        ("2019", "twenty", False),
    ],
)
def test_relaxed_accuracy_allows_numbers_five_per_cent(answer: str, accepted: str, right: bool) -> None:
    assert METRICS["relaxed_accuracy"](answer, [accepted]) == right


def test_ocrbench_looks_for_the_answer_in_the_reply() -> None:
    assert METRICS["ocrbench"]("The word is Ronaldo.", ["RONALDO"]) == 1
    assert METRICS["ocrbench"]("two\nlines", ["two lines"]) == 1
    assert METRICS["ocrbench"]("Ronald", ["Ronaldo", "Roland"]) == 0
    assert METRICS["ocrbench_formula"]("it is \\frac { a } { B }", ["\\frac{a}{B}"]) == 1
    assert METRICS["ocrbench_formula"]("\\frac{a}{b}", ["\\frac{a}{B}"]) == 0


def test_every_metric_is_between_wrong_and_right() -> None:
    for metric in METRICS:
        accepted = ["12 dogs"] * 10
        assert METRICS[metric]("12 dogs", accepted) == 1
        assert METRICS[metric]("QQQQQQQQQQQQQQQQQ", accepted) == 0


def test_a_question_that_its_metric_cannot_score_is_named() -> None:
    for metric, answers, said in (
        ("bleu", ["x"], "unknown metric 'bleu'"),
        ("anls", [], "no answers"),
        ("vqa_accuracy", ["x"], "at least 4 people"),
        ("cer", [""], "empty answer"),
    ):
        with pytest.raises(SparseMMError, match=f"line 3: .*{said}"):
            check_question(metric, answers, "line 3")


# --- fidelity


def test_kl_divergence_of_two_coins() -> None:
    fair, biased = np.log(np.float32([[0.5, 0.5]])), np.log(np.float32([[0.25, 0.75]]))
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert kl_divergence(fair, biased)[0] == pytest.approx(expected, rel=1e-5)
    # logits, not probabilities: a constant added to them changes nothing
    assert kl_divergence(fair + 7, biased - 900)[0] == pytest.approx(expected, rel=1e-4)
    assert kl_divergence(fair, fair)[0] == 0


def test_agreement_counts_equal_tokens_at_equal_places() -> None:
    logits = np.zeros((4, 3), np.float32)
    found = compare([5, 6, 7, 2], [5, 9, 7, 2], logits, logits)
    assert found == {"agreement": 0.75, "first_divergence": 1, "kl": 0}
    assert compare([5, 6, 7, 2], [5, 6, 7, 2], logits, logits)["first_divergence"] is None
    # shorter or longer answers differ where one of them ends, and in all that follows
    for one, other in (([5, 6, 7, 2], [5, 6]), ([5, 6], [5, 6, 7, 2])):
        found = compare(one, other, logits, logits)
        assert (found["agreement"], found["first_divergence"]) == (0.5, 2)
