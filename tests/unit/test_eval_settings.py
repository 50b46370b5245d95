"""What is compared with what: settings, and the figures that come of their records."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sparsemm_edge.budgets import BudgetSpec
from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.evaluation.report import make_report, print_report
from sparsemm_edge.evaluation.run import Record
from sparsemm_edge.evaluation.settings import Setting, labels, settings_of
from sparsemm_edge.gguf_metadata import ModelShape
from sparsemm_edge.reports.evaluation import save_plot

SHAPE = ModelShape("llama", "x", n_layer=2, n_head=4, n_head_kv=4, n_embd_head_k=32, n_embd_head_v=32)
OPTIONS: dict[str, Any] = {"windows": [8], "floor_ratios": [0.1], "water_fills": [True]}


# --- settings


def test_only_what_goes_by_score_is_swept() -> None:
    settings = settings_of(
        policies=["sparsemm", "uniform", "pyramid", "random", "full"],
        retentions=[5, 10],
        windows=[8],
        floor_ratios=[0.1, 0.5],
        water_fills=[True, False],
        n_random=3,
    )
    count = Counter(each.policy for each in settings)
    assert (count["sparsemm"], count["uniform"]) == (2 * 2 * 2, 2)
    assert sum(each.policy == "random" for each in settings) == 3 * 2
    assert {(each.floor_ratio, each.water_fill) for each in settings if each.policy == "pyramid"} == {
        (0.1, True)
    }
    assert settings[0] == Setting("full")
    assert len({each.key for each in settings}) == len(settings) == 3 + 8 + 2 + 2 + 6


def test_the_full_f16_cache_is_always_there() -> None:
    settings = settings_of(policies=["uniform"], budgets=[64], cache_types=["q8_0"], **OPTIONS)
    assert settings[:2] == [Setting("full"), Setting("full", cache_type="q8_0")]


def test_policy_full_is_what_people_shrink_the_full_cache_to() -> None:
    settings = settings_of(policies=["full", "uniform"], budgets=[64], **OPTIONS)
    assert [each.cache_type for each in settings if each.policy == "full"] == ["f16", "q8_0", "q4_0"]
    assert {each.cache_type for each in settings if each.policy == "uniform"} == {"f16"}


def test_votes_slots_and_what_later_questions_evict_are_swept_for_all_policies() -> None:
    settings = settings_of(
        policies=["sparsemm", "uniform", "paper"],
        retentions=[5.0],
        votes=["mixkv", "snapkv"],
        residuals=[True, False],
        laters=["again", "keep"],
        **OPTIONS,
    )
    swept = {(each.vote, each.residual, each.later) for each in settings if each.policy == "uniform"}
    assert len(swept) == 8
    # the paper's own is among those of sparsemm
    assert sum(each.policy == "sparsemm" for each in settings) == 8
    assert set(labels(settings).values()) == {
        "full",
        *(
            f"{method}, later {later}"
            for method in (
                "sparsemm",
                "sparsemm, no residual",
                "sparsemm, snapkv",
                "paper",
                "uniform",
                "uniform, no residual",
                "uniform, snapkv",
                "snapkv",
            )
            for later in ("again", "keep")
        ),
    }


@pytest.mark.parametrize(
    ("method", "policy", "floor_ratio"),
    [("paper", "sparsemm", 0.1), ("snapkv", "uniform", 0.0), ("pyramidkv", "pyramid", 0.1)],
)
def test_methods_are_as_they_were_published(method: str, policy: str, floor_ratio: float) -> None:
    options = {**OPTIONS, "floor_ratios": [0.3], "water_fills": [False]}
    (_, setting) = settings_of(policies=[method], budgets=[64], **options)
    assert setting == Setting(
        policy, budget=64, window=8, floor_ratio=floor_ratio, vote="snapkv", residual=False
    )
    assert labels([setting])[setting] == method


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"policies": ["best"]}, "unknown policy 'best'"),
        ({"votes": ["none"]}, "unknown vote 'none'"),
        ({"laters": ["never"]}, "unknown rule for later questions 'never'"),
        ({"budgets": [64]}, "give either budgets in positions or retentions"),
        ({"retentions": []}, "give either budgets in positions or retentions"),
        ({"retentions": [0]}, "the retention is 0"),
        ({"retentions": [101]}, "the retention is 101"),
        ({"windows": [0]}, "the window is 0"),
        ({"floor_ratios": [1.5]}, "the floor ratio is 1.5"),
        ({"n_random": 0}, "the number of random seeds is 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(SparseMMError, match=said):
        settings_of(**({"policies": ["uniform"], "retentions": [5.0], **OPTIONS} | wrong))


def test_a_retention_is_a_share_of_the_prompt_and_the_window_at_most_a_quarter_of_it() -> None:
    setting = Setting("uniform", retention=5.0, window=32)
    assert (setting.budget_of(585), setting.window_of(585)) == (29, 7)
    assert (setting.budget_of(2944), setting.window_of(2944)) == (147, 32)
    assert (setting.budget_of(3), setting.window_of(3)) == (2, 1)
    assert Setting("uniform", budget=64, window=8).window_of(585) == 8
    for n_prompt in (3, 585):
        assert setting.spec(n_prompt, BudgetSpec()).table(
            None, SHAPE.kv_heads, n_prompt
        ).mean() == setting.budget_of(n_prompt)


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
        "full, q8_0",
        "sparsemm, floor 0.1",
        "sparsemm, floor 0.1, no water-filling",
        "sparsemm, floor 0.5",
        "sparsemm, floor 0.5, no water-filling",
        "uniform",
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
    fields: dict[str, Any] = {
        "question": question,
        "page": question.split("/")[0],
        "task": "lookup",
        "setting": setting.key,
        "first_task": "lookup",
        "score": score,
        "n_prompt": 100,
        "budget": int(kept),
        "window": 8,
        "kept": kept,
        "kv_bytes": kept * 1000,
        "kv_full_bytes": 100_000,
        "kv_allocated": int(kept) * 1100,
        "agreement": score,
        "first_divergence": None if score == 1 else 3,
        "kl": 1 - score,
    }
    return Record(**fields | changes)


def report_of(scores: dict[Setting, tuple[list[float], float]], seed: int = 0) -> dict[Setting, Any]:
    """scores[setting] = (score of each question, positions kept) -> rows by setting."""
    n = len(next(iter(scores.values()))[0])
    records = {
        (f"p{i}", setting.key): record(f"p{i}", setting, values[i], kept)
        for setting, (values, kept) in scores.items()
        for i in range(n)
    }
    report = make_report(records, list(scores), [f"p{i}" for i in range(n)], seed=seed)
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
    many = make_report(records, [FULL], names).rows[0].score
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
    found = rows[OURS].against["uniform"]
    assert found.mean == pytest.approx(expected)
    assert found.low < expected < found.high
    assert rows[OURS].against_full.mean == pytest.approx(-0.25)
    assert rows[LOW].against == rows[FULL].against == {}
    # at the same bytes it is the plain difference; outside of uniform's there is none
    rows = report_of({LOW: ([0.0, 1.0], 10.0), OURS: ([1.0, 1.0], 10.0)})
    assert rows[OURS].against["uniform"].mean == 0.5
    assert report_of({LOW: ([0.0, 1.0], 10.0), OURS: ([1.0, 1.0], 9.0)})[OURS].against == {}


def test_a_quantised_full_cache_is_compared_with_what_takes_at_most_its_bytes() -> None:
    q4_0 = Setting("full", cache_type="q4_0")
    rows = report_of(
        {
            FULL: ([1.0, 1.0, 1.0, 1.0], 100.0),
            q4_0: ([1.0, 1.0, 0.0, 0.0], 28.0),
            LOW: ([1.0, 1.0, 1.0, 0.0], 28.0),
            HIGH: ([1.0, 1.0, 1.0, 1.0], 30.0),
        }
    )
    assert rows[LOW].against["full, q4_0"].mean == 0.25
    assert rows[HIGH].against == rows[q4_0].against == {}
    assert rows[q4_0].against_full.mean == -0.5


def test_lines_are_compared_where_all_but_their_budgets_is_alike() -> None:
    others = {
        "window": replace(OURS, window=16),
        "cache_type": replace(OURS, cache_type="q8_0"),
        "later and vote": replace(OURS, later="keep", vote="snapkv"),
        "vote": replace(OURS, vote="snapkv"),
        "later": replace(OURS, later="keep"),
    }
    rows = report_of({OURS: ([1.0, 1.0], 15.0), **{each: ([0.0, 1.0], 15.0) for each in others.values()}})
    assert list(rows[OURS].against) == [rows[others[name]].label for name in ("vote", "later")]


def test_differences_are_of_the_same_pages() -> None:
    # always better by the same amount, although pages differ widely
    values = np.random.default_rng(1).random(50) * 0.9
    rows = report_of({LOW: (values.tolist(), 10.0), OURS: ((values + 0.1).tolist(), 10.0)})
    found = rows[OURS].against["uniform"]
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
    report = make_report(records, [FULL, LOW], ["p0", "p1"])
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
    report = make_report(records, [FULL, LOW], ["p0"])
    assert report.rows[1].score is None and report.rows[1].against_full is None
    assert report.rows[1].agreement.mean == 0.5 and report.rows[1].first_divergence == 3
    save_plot(report, tmp_path / "plot.png", title="fidelity")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    print_report(report)
    assert "score" not in capsys.readouterr().out


def asked_alike() -> dict[tuple[str, str], Record]:
    """Two pages: a look-up, a second one after it, one in its place; under a full cache and two budgets."""
    found = {}
    for page in ("p0", "p1"):
        for setting, kept in ((FULL, 100.0), (LOW, 10.0), (HIGH, 30.0)):
            second: dict[str, Any] = {"place": 2, "task": "value"}
            for name, changes in (("a", {}), ("b", second), ("c", {"task": "value", "instead": True})):
                each = record(f"{page}/{name}", setting, kept / 100, kept, **changes)
                if name == "c" and setting == LOW:
                    each = replace(each, skipped="too long", score=None)
                found[each.question, setting.key] = each
    return found


def test_questions_that_were_asked_alike_are_reported_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = asked_alike()
    report = make_report(records, [FULL, LOW, HIGH], list(dict.fromkeys(name for name, _ in records)))
    assert [[way.words for way in ways] for ways in report.threads] == [
        ["lookup", "value as question 2, after lookup", "value in the place of lookup"]
    ]
    by_way = {way.words: [row.setting for row in report.rows_of(way)] for way in report.threads[0]}
    assert list(by_way.values()) == [[FULL, LOW, HIGH], [FULL, LOW, HIGH], [FULL, HIGH]]
    assert [row.n_questions for row in report.rows] == [2] * 8
    assert [(each.way.instead, each.settings, each.reason) for each in report.skipped] == [
        (True, ("uniform at 10 %",), "too long")
    ]
    print_report(report)
    printed = capsys.readouterr().out
    assert "value in the place of lookup: not under uniform at 10 %: too long" in printed
    assert "lookup, and what is asked after it" in printed
    figures = report.to_dict()["rows"][-1]
    assert (figures["first_task"], figures["task"], figures["place"]) == ("lookup", "value", 1)
    save_plot(report, tmp_path / "plot.png", title="turns")
    with Image.open(tmp_path / "plot.png") as drawn:
        assert drawn.width > 2 * drawn.height  # three panels side by side
