"""What is compared with what: settings, and the figures that come of their records."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.evaluation.datasets import DataSet, Question
from sparsemm_edge.evaluation.report import make_report, print_report, save_plot
from sparsemm_edge.evaluation.run import Record
from sparsemm_edge.evaluation.settings import Setting, labels, settings_of
from sparsemm_edge.gguf_metadata import ModelShape

SHAPE = ModelShape("llama", "x", n_layer=2, n_head=4, n_head_kv=4, n_embd_head_k=32, n_embd_head_v=32)
OPTIONS: dict[str, Any] = {"windows": [8], "floor_ratios": [0.1], "water_fills": [True]}


# --- settings


def test_only_what_goes_by_score_is_swept() -> None:
    settings = settings_of(
        policies=["sparsemm", "top", "uniform", "pyramid", "random", "full"],
        retentions=[5, 10],
        windows=[8],
        floor_ratios=[0.1, 0.5],
        water_fills=[True, False],
        n_random=3,
    )
    count = Counter(each.policy for each in settings)
    assert (count["sparsemm"], count["top"], count["uniform"]) == (2 * 2 * 2, 2 * 2, 2)
    assert sum(each.policy == "random" for each in settings) == 3 * 2
    assert {(each.floor_ratio, each.water_fill) for each in settings if each.policy == "pyramid"} == {
        (0.1, True)
    }
    assert settings[0] == Setting("full")
    assert len({each.key for each in settings}) == len(settings) == 1 + 8 + 4 + 2 + 2 + 6


def test_the_full_f16_cache_is_always_there() -> None:
    settings = settings_of(policies=["uniform"], budgets=[64], cache_types=["q8_0"], **OPTIONS)
    assert settings[:2] == [Setting("full"), Setting("full", cache_type="q8_0")]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"policies": ["best"]}, "unknown policy 'best'"),
        ({"budgets": [64]}, "one of the two"),
        ({"retentions": []}, "one of the two"),
        ({"retentions": [0]}, "retention of 0"),
        ({"retentions": [101]}, "retention of 101"),
        ({"windows": [0]}, "window of 0"),
        ({"floor_ratios": [1.5]}, "floor ratio of 1.5"),
        ({"n_random": 0}, "random seeds of 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(SparseMMError, match=said):
        settings_of(**({"policies": ["uniform"], "retentions": [5.0], **OPTIONS} | wrong))


def test_a_retention_is_a_share_of_the_prompt_and_the_window_at_most_half_of_it() -> None:
    setting = Setting("uniform", retention=5.0, window=32)
    assert (setting.budget_of(585), setting.window_of(585)) == (29, 14)
    assert (setting.budget_of(2944), setting.window_of(2944)) == (147, 32)
    assert (setting.budget_of(3), setting.window_of(3)) == (2, 1)
    assert Setting("uniform", budget=64, window=8).window_of(585) == 8
    for n_prompt in (3, 585):
        assert setting.table(None, SHAPE, n_prompt).mean() == setting.budget_of(n_prompt)


def test_labels_say_what_differs_within_a_policy() -> None:
    settings = settings_of(
        policies=["sparsemm", "uniform"],
        retentions=[5.0, 10.0],
        windows=[8],
        floor_ratios=[0.1, 0.5],
        water_fills=[True, False],
        cache_types=["f16", "q8_0"],
    )
    assert list(dict.fromkeys(labels(settings).values())) == [
        "full",
        "sparsemm, floor 0.1",
        "sparsemm, floor 0.1, no water-filling",
        "sparsemm, floor 0.5",
        "sparsemm, floor 0.5, no water-filling",
        "uniform",
        "full, q8_0",
        "sparsemm, floor 0.1, q8_0",
        "sparsemm, floor 0.1, no water-filling, q8_0",
        "sparsemm, floor 0.5, q8_0",
        "sparsemm, floor 0.5, no water-filling, q8_0",
        "uniform, q8_0",
    ]


# --- report

FULL = Setting("full")
LOW, HIGH = Setting("uniform", retention=10.0, window=8), Setting("uniform", retention=30.0, window=8)
OURS = Setting("sparsemm", retention=20.0, window=8, floor_ratio=0.1, water_fill=False)


def record(question: str, setting: Setting, score: float, kept: float, **changes: Any) -> Record:
    return Record(
        question=question,
        page=question.split("/")[0],
        task="lookup",
        setting=setting.key,
        score=score,
        n_prompt=100,
        budget=int(kept),
        window=8,
        kept=kept,
        kv_bytes=kept * 1000,
        kv_full_bytes=100_000,
        kv_allocated=int(kept) * 1100,
        agreement=score,
        first_divergence=None if score == 1 else 3,
        kl=1 - score,
        **changes,
    )


def data_of(questions: list[str]) -> DataSet:
    found = [Question(name, name.split("/")[0], Path(), "?", "lookup", "anls", ("x",)) for name in questions]
    return DataSet("by hand", tuple(found), 8)


def report_of(scores: dict[Setting, tuple[list[float], float]], seed: int = 0) -> dict[Setting, Any]:
    """scores[setting] = (score of each question, positions kept) -> rows by setting."""
    n = len(next(iter(scores.values()))[0])
    records = {
        (f"p{i}", setting.key): record(f"p{i}", setting, values[i], kept)
        for setting, (values, kept) in scores.items()
        for i in range(n)
    }
    report = make_report(records, list(scores), data_of([f"p{i}" for i in range(n)]), seed=seed)
    return {row.setting: row for row in report.rows}


def test_confidence_intervals_are_those_of_a_mean_over_pages() -> None:
    values = np.random.default_rng(0).random(400)
    row = report_of({FULL: (values.tolist(), 100.0)})[FULL]
    error = values.std() / np.sqrt(400)
    assert row.score.mean == pytest.approx(values.mean())
    assert row.score.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert row.score.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)
    assert (row.kept, row.kept_share, row.kv_share, row.n_questions) == (100, 1.0, 1.0, 400)


def test_questions_about_one_page_are_drawn_together() -> None:
    # 20 pages of 20 equal questions say no more than 20 questions
    values = np.random.default_rng(0).random(20)
    names = [f"p{i}/q{j}" for i in range(20) for j in range(20)]
    records = {(name, FULL.key): record(name, FULL, values[k // 20], 100.0) for k, name in enumerate(names)}
    many = make_report(records, [FULL], data_of(names)).rows[0].score
    few = report_of({FULL: (values.tolist(), 100.0)})[FULL].score
    assert many is not None
    assert (many.mean, many.low, many.high) == pytest.approx((few.mean, few.low, few.high))


def test_policies_are_compared_at_equal_bytes() -> None:
    # ours keeps 15 positions although 20 were its budget: between uniform's 10 and 30, a quarter of the way
    rows = report_of(
        {
            FULL: ([1.0, 1.0, 1.0, 1.0], 100.0),
            LOW: ([0.0, 0.0, 1.0, 0.0], 10.0),
            HIGH: ([1.0, 0.0, 1.0, 1.0], 30.0),
            OURS: ([1.0, 1.0, 1.0, 0.0], 15.0),
        }
    )
    expected = 0.75 - (0.75 * 0.25 + 0.25 * 0.75)
    assert rows[OURS].against_uniform.mean == pytest.approx(expected)
    assert rows[OURS].against_uniform.low < expected < rows[OURS].against_uniform.high
    assert rows[OURS].against_full.mean == pytest.approx(-0.25)
    assert rows[LOW].against_uniform is None and rows[FULL].against_uniform is None
    # at the same bytes it is the plain difference; outside of uniform's there is none
    rows = report_of({LOW: ([0.0, 1.0], 10.0), OURS: ([1.0, 1.0], 10.0)})
    assert rows[OURS].against_uniform.mean == 0.5
    assert report_of({LOW: ([0.0, 1.0], 10.0), OURS: ([1.0, 1.0], 9.0)})[OURS].against_uniform is None


def test_differences_are_of_the_same_pages() -> None:
    # always better by the same amount, although pages differ widely
    values = np.random.default_rng(1).random(50) * 0.9
    rows = report_of({LOW: (values.tolist(), 10.0), OURS: ((values + 0.1).tolist(), 10.0)})
    found = rows[OURS].against_uniform
    assert (found.mean, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))


def test_the_seeds_of_random_are_one_row() -> None:
    seeds = [Setting("random", retention=10.0, window=8, floor_ratio=0.1, seed=seed) for seed in range(3)]
    rows = report_of({each: ([float(each.seed == 0), 1.0], 10.0) for each in seeds})
    assert list(rows) == [seeds[0]]
    assert rows[seeds[0]].score.mean == pytest.approx((1 / 3 + 1) / 2)
    assert (rows[seeds[0]].n_questions, rows[seeds[0]].n_seeds) == (2, 3)


def test_the_same_seed_gives_the_same_intervals() -> None:
    scores = {FULL: (np.random.default_rng(0).random(30).tolist(), 100.0)}
    assert report_of(scores, seed=1) == report_of(scores, seed=1) != report_of(scores, seed=2)


def test_what_failed_is_named_and_in_no_row(capsys: pytest.CaptureFixture[str]) -> None:
    records = {
        (name, setting.key): record(name, setting, 1.0, 10.0)
        for name in ("p0", "p1")
        for setting in (FULL, LOW)
    }
    broken = Record("p1", "p1", "lookup", LOW.key, error="page.png: not an image")
    records["p1", LOW.key] = broken
    report = make_report(records, [FULL, LOW], data_of(["p0", "p1"]))
    assert [row.n_questions for row in report.rows] == [1, 1]
    assert [(each.question, each.error) for each in report.failures] == [("p1", "page.png: not an image")]
    print_report(report)
    assert (
        "1 of 2 questions failed" in (out := capsys.readouterr().out) and "p1: page.png: not an image" in out
    )


def test_without_answers_there_is_fidelity_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = {
        ("p0", setting.key): replace(record("p0", setting, 0.5, 10.0), score=None) for setting in (FULL, LOW)
    }
    report = make_report(records, [FULL, LOW], data_of(["p0"]))
    assert report.rows[1].score is None and report.rows[1].against_full is None
    assert report.rows[1].agreement.mean == 0.5 and report.rows[1].first_divergence == 3
    save_plot(report, tmp_path / "plot.png", title="fidelity")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    print_report(report)
    assert "score" not in capsys.readouterr().out
