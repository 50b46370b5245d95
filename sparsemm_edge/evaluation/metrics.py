"""Accuracy metrics of the data sets that `eval` reads, and fidelity to the full cache, without labels.

Every accuracy metric takes the answer and the accepted answers and returns a score from 0 (wrong) to 1.
"""

import math
import re
from collections.abc import Callable, Sequence
from itertools import zip_longest

import numpy as np
import numpy.typing as npt

from sparsemm_edge.errors import SparseMMError

_ANLS_THRESHOLD = 0.5
_RELATIVE_TOLERANCE = 0.05

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBER_WORDS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),(?=\d)")
_COMMA_OF_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_FULL_STOP = re.compile(r"\.(?!\d)")


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """1 if the answer is one of the accepted, but for white space at its ends."""
    return float(answer.strip() in {each.strip() for each in accepted})


def anls(answer: str, accepted: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity, of one question.

    1 - d where d is the edit distance over the longer length, and 0 where d is not below 0.5; the best of the
    accepted answers; case and runs of white space do not matter. DocVQA's metric. Source: Biten et al. 2019
    (arXiv 1907.00490), equation 1.
    """
    given, *known = (" ".join(text.lower().split()) for text in (answer, *accepted))
    return max((_anls_of_one(given, each) for each in known), default=0.0)


def vqa_accuracy(answer: str, accepted: Sequence[str]) -> float:
    """VQA accuracy: an answer that at least three of ten people gave is right.

    min(1, people who gave it / 3), averaged over leaving each person out in turn. Answers are compared
    without case, articles and punctuation, with numbers up to ten as digits. TextVQA's metric. Source: Antol
    et al. 2015 (arXiv 1505.00468), section 4, and the normalisation of the VQA challenge's evaluation; it
    restores missing apostrophes, here all are dropped, which finds the same answers equal.

    Args:
        answer: the model's answer.
        accepted: one for each person, so that answers repeat; at least four.
    """
    given = vqa_normalised(answer)
    same = [vqa_normalised(each) == given for each in accepted]
    total = sum(same)
    return sum(min(1.0, (total - mine) / 3) for mine in same) / len(same)


def relaxed_accuracy(answer: str, accepted: Sequence[str]) -> float:
    """1 if a number is within 5 % of an accepted one, or another answer equals it but for case.

    A full stop at the end does not matter, nor do commas between thousands. A per cent sign may be left out,
    and 2 % is 0.02 too. ChartQA's metric. Source: Masry et al. 2022 (arXiv 2203.10244), section 5.1, after
    Methani et al. 2020; signs and full stops as in the authors' later scorer (vis-nlp/ChartQAPro,
    evaluate_predictions.py), hundredths as in the one that is used most (google-research/pix2struct).
    """
    return float(any(_relaxed(answer, each) for each in accepted))


def ocrbench(answer: str, accepted: Sequence[str]) -> float:
    """1 if an accepted answer is contained in the answer, but for case and line breaks.

    Source: Liu et al. 2023 (arXiv 2305.07895), section 3. For its handwritten formulas see ocrbench_formula.
    """
    found = _one_line(answer).lower()
    return float(any(_one_line(each).lower() in found for each in accepted))


def ocrbench_formula(answer: str, accepted: Sequence[str]) -> float:
    """OCRBench's rule for handwritten formulas (HME100k): case matters, white space does not."""
    found = _one_line(answer).replace(" ", "")
    return float(any(_one_line(each).replace(" ", "") in found for each in accepted))


def character_accuracy(answer: str, accepted: Sequence[str]) -> float:
    """1 - character error rate, at least 0: the best of the accepted answers."""
    return max(max(0.0, 1 - character_error_rate(answer, each)) for each in accepted)


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "anls": anls,
    "vqa_accuracy": vqa_accuracy,
    "relaxed_accuracy": relaxed_accuracy,
    "ocrbench": ocrbench,
    "ocrbench_formula": ocrbench_formula,
    "cer": character_accuracy,
}
"""By the name that a data set gives; `cer` is scored as 1 - character error rate, as all are better above."""


def check_question(metric: str, accepted: Sequence[str], where: str) -> None:
    """Raise SparseMMError, naming `where`, unless these answers can be scored by this metric."""
    if metric not in METRICS:
        raise SparseMMError(f"{where}: unknown metric {metric!r}: expected one of {', '.join(METRICS)}")
    if not accepted:
        raise SparseMMError(f"{where}: there are no answers")
    if metric == "vqa_accuracy" and len(accepted) < 4:
        raise SparseMMError(f"{where}: vqa_accuracy needs the answers of at least 4 people (10 as published)")
    if metric == "cer" and not all(accepted):
        raise SparseMMError(f"{where}: an empty answer has no character error rate")


def character_error_rate(answer: str, reference: str) -> float:
    """Insertions, deletions and substitutions over the length of the reference; may be above 1."""
    return edit_distance(answer, reference) / len(reference)


def edit_distance(one: str, other: str) -> int:
    """Levenshtein's distance: the fewest insertions, deletions and substitutions of a character."""
    above = list(range(len(other) + 1))
    for i, left in enumerate(one):
        row = [i + 1]
        for j, right in enumerate(other):
            row.append(min(above[j] + (left != right), above[j + 1] + 1, row[j] + 1))
        above = row
    return above[-1]


def vqa_normalised(answer: str) -> str:
    """An answer as the VQA challenge compares it: case, articles, punctuation, number words."""
    text = given = answer.replace("\n", " ").replace("\t", " ").strip()
    has_number = _COMMA_IN_NUMBER.search(given) is not None
    for mark in _PUNCTUATION:
        # a mark beside a space vanishes, wherever it stands, any other becomes a space
        beside_space = f"{mark} " in given or f" {mark}" in given
        text = text.replace(mark, "" if beside_space or has_number else " ")
    text = _FULL_STOP.sub("", text).replace("'", "").lower()
    words = (_NUMBER_WORDS.get(word, word) for word in text.split())
    return " ".join(word for word in words if word not in _ARTICLES)


def _anls_of_one(answer: str, accepted: str) -> float:
    longer = max(len(answer), len(accepted))
    distance = edit_distance(answer, accepted) / longer if longer else 0.0
    return 1 - distance if distance < _ANLS_THRESHOLD else 0.0


def _relaxed(answer: str, accepted: str) -> bool:
    answer, accepted = (text.strip().rstrip(".").strip() for text in (answer, accepted))
    found, wanted = _number(answer), _number(accepted)
    if found is None or wanted is None:
        return answer.lower() == accepted.lower()
    scales = {1.0}
    if answer.endswith("%") != accepted.endswith("%"):  # a number with the sign may also be in hundredths
        scales.add(100.0 if accepted.endswith("%") else 0.01)
    return any(abs(found * scale - wanted) <= _RELATIVE_TOLERANCE * abs(wanted) for scale in scales)


def _number(text: str) -> float | None:
    """The number that a text is, without its per cent sign; None for other texts."""
    try:
        number = float(_COMMA_OF_THOUSANDS.sub("", text.removesuffix("%")))
    except ValueError:
        return None
    return number if math.isfinite(number) else None  # nan and inf are words


def _one_line(text: str) -> str:
    return text.strip().replace("\n", " ")


# --- fidelity


Logits = npt.NDArray[np.float32]
"""[n, n_vocab]"""


def compare(
    full: Sequence[int], tokens: Sequence[int], full_logits: Logits, logits: Logits
) -> dict[str, float | None]:
    """Compare an answer with the full cache's.

    Args:
        full: the full cache's greedy answer, its end token included.
        tokens: this cache's greedy answer, likewise.
        full_logits: [n, n_vocab], the full cache's before each token of its own answer.
        logits: [n, n_vocab], this cache's before each token of the full cache's answer.

    Returns:
        agreement: fraction of equal tokens at the same place, of the longer answer, 0 to 1; end tokens count.
        first_divergence: index of the first different token; None if there is none.
        kl: KL divergence of next-token distributions, full cache || this one, in nats: mean over the full
            cache's answer.
    """
    same = [mine == theirs for mine, theirs in zip_longest(tokens, full)]
    return {
        "agreement": sum(same) / len(same),
        "first_divergence": None if all(same) else same.index(False),
        "kl": float(kl_divergence(full_logits, logits).mean()),
    }


def kl_divergence(logits: Logits, other: Logits) -> npt.NDArray[np.float64]:
    """KL(p || q) in nats from logits: [n, n_vocab] twice -> [n]."""
    log_p, log_q = log_softmax(logits), log_softmax(other)
    divergence: npt.NDArray[np.float64] = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    return np.maximum(divergence, 0.0)  # rounding


def log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    """Logarithms of probabilities, row by row."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    logs: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return logs
