"""Head scores: both formats are read, and whatever is wrong with a file is said in one line."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from helpers.paths import PUBLISHED_SCORES
from sparsemm_edge import SparseMMError
from sparsemm_edge.scores import HeadScores, group_scores

OWN = {
    "format": "sparsemm-edge/head-scores",
    "version": 1,
    "model": "tiny",
    "n_layer": 2,
    "n_head": 4,
    "n_head_kv": 2,
    "dataset": "pages",
    "scores": [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]],
}


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def without(key: str) -> dict[str, object]:
    return {name: value for name, value in OWN.items() if name != key}


def test_published_scores_are_concentrated_in_few_heads() -> None:
    scores = HeadScores.load(PUBLISHED_SCORES)
    assert (scores.n_layer, scores.n_head, scores.provenance) == (32, 32, {"n_pages": 2})
    ranked = np.sort(scores.normalised().ravel())[::-1]
    assert ranked.sum() == pytest.approx(1)
    assert ranked[: 1024 * 5 // 100].sum() == pytest.approx(0.55, abs=0.005)
    assert ranked[: 1024 * 10 // 100].sum() == pytest.approx(0.77, abs=0.005)


def test_reference_format_is_the_mean_over_pages(tmp_path: Path) -> None:
    pages = {"0-0": [0.0, 1.0], "0-1": [2.0, 4.0], "1-1": [6, 6], "1-0": [1.0, 0.0]}
    path = write(tmp_path / "tiny.head-scores.json", pages)
    scores = HeadScores.load(path)
    np.testing.assert_array_equal(scores.scores, [[0.5, 3.0], [0.5, 6.0]])
    assert scores.model == "tiny"
    assert scores.n_head_kv is None
    assert scores.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert scores.sha256 in scores.label()


def test_saved_scores_read_back_unchanged(tmp_path: Path) -> None:
    table = np.random.default_rng(0).random((3, 4))
    provenance = {"dataset": "pages", "n_pages": 5, "n_tokens_scored": 70, "created_by": "test"}
    HeadScores(model="tiny", scores=table, n_head_kv=2, provenance=provenance).save(tmp_path / "s.json")
    loaded = HeadScores.load(tmp_path / "s.json")
    np.testing.assert_array_equal(loaded.scores, table)
    assert (loaded.model, loaded.n_head_kv, loaded.provenance) == ("tiny", 2, provenance)
    assert loaded.label() == f"tiny; data set pages; sha256 {loaded.sha256}"


def test_grouping_sums_neighbouring_query_heads() -> None:
    grouped = group_scores(np.array([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 5.0, 5.0]]), n_head_kv=2)
    np.testing.assert_allclose(grouped, np.array([[3, 7], [0, 10]]) / 20)
    with pytest.raises(SparseMMError, match="4 query heads cannot be divided among 3 KV heads"):
        group_scores(np.ones((2, 4)), n_head_kv=3)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("no json", "not a JSON file"),
        ("[" * 100_000, "not a JSON file"),
        ([1, 2], "expected a JSON object, found list"),
        ({}, "no head scores"),
        ({"weights": 1}, "no head scores"),
        (OWN | {"format": "other"}, "format is 'other'"),
        (OWN | {"version": 2}, "format version 2"),
        (without("version"), "format version None"),
        (without("n_head"), "n_head is missing"),
        (without("scores"), "scores is missing"),
        (OWN | {"model": None}, "model is None"),
        (OWN | {"n_layer": "2"}, "n_layer is '2'"),
        (OWN | {"n_head_kv": 3}, "n_head_kv is 3, no divisor of n_head 4"),
        (OWN | {"n_layer": 3}, "n_layer x n_head is 3 x 4, but scores are 2 x 4"),
        (OWN | {"scores": 1}, "list of n_layer lists"),
        (OWN | {"scores": [[1, 2, 3, 4], 5]}, "list of n_layer lists"),
        (OWN | {"scores": [[1, 2, 3, 4], [1, 2, 3]]}, "rows of 4 and 3 scores"),
        (OWN | {"scores": [[1, 2, 3, 4], [1, 2, 3, "x"]]}, "'x' where a score was expected"),
        (OWN | {"scores": [[1, 2, 3, 4], [1, 2, 3, True]]}, "True where a score was expected"),
        (OWN | {"scores": [[1, 2, 3, 4], [1, 2, 3, 10**400]]}, "too large"),
        (OWN | {"scores": [[1, 2, 3, 4], [1, float("nan"), 3, 4]]}, "layer 1, head 1 is not finite"),
        (OWN | {"scores": [[1, 2, 3, 4], [1, 2, float("inf"), 4]]}, "layer 1, head 2 is not finite"),
        (OWN | {"scores": [[-0.5, 2, 3, 4], [1, 2, 3, 4]]}, r"layer 0, head 0 is negative \(-0.5\)"),
        (OWN | {"scores": [[0] * 4] * 2}, "all scores are zero"),
        (OWN | {"scores": [], "n_layer": 0}, "scores are 0 x 0"),
        (OWN | {"scores": [[], []], "n_head": 0}, "expected a table"),
        (OWN | {"character_accuracy": {}}, "character_accuracy is {}, expected a number"),
        (OWN | {"convergence": [{"n_pages": 3, "spearman": 0.5}]}, "convergence holds"),
        (OWN | {"convergence": "x"}, "convergence holds 'x'"),
        ({"0-0": [1.0], "0-1": [1.0], "1-0": [1.0]}, "head 1-1 of 2 x 2 is missing"),
        ({"0-0": [1.0], "0-1": 1.0}, "every head needs a list"),
        ({"0-0": [1.0], "0-1": []}, "every head needs a list"),
        ({"0-0": [1.0], "0-1": [1.0, 2.0]}, "rows of 1 and 2 scores"),
        ({"0-0": [1.0], "model": "x"}, "key 'model' is not of the form"),
        ({"0-0": [float("nan")]}, "layer 0, head 0 is not finite"),
        ({"0-0": [0.0], "0-1": [0.0]}, "all scores are zero"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path: Path, content: object, reason: str) -> None:
    path = write(tmp_path / "bad.json", content)
    with pytest.raises(SparseMMError, match=reason) as caught:
        HeadScores.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_scores_may_have_a_byte_order_mark(encoding: str, tmp_path: Path) -> None:
    plain = write(tmp_path / "scores.json", OWN)
    marked = tmp_path / "marked.json"
    marked.write_text(plain.read_text(), encoding=encoding)
    assert np.array_equal(HeadScores.load(marked).scores, HeadScores.load(plain).scores)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SparseMMError, match=r"cannot read .*missing\.json: No such file"):
        HeadScores.load(tmp_path / "missing.json")


def test_fitting_compares_layers_heads_and_known_kv_heads(tmp_path: Path) -> None:
    scores = HeadScores.load(write(tmp_path / "s.json", OWN))
    scores.check_fits(2, 4)
    scores.check_fits(2, 4, 2)
    for shape in ((3, 4, 2), (2, 8, 2), (2, 4, 4)):
        with pytest.raises(SparseMMError) as caught:
            scores.check_fits(*shape)
        n_layer, n_head, n_head_kv = shape
        assert "2 layers x 4 heads (2 KV heads)" in str(caught.value)
        assert f"{n_layer} layers x {n_head} heads ({n_head_kv} KV heads)" in str(caught.value)
