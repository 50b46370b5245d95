"""What the records say: means with confidence intervals, a table, a plot, eval.json."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsemm_edge.budgets import BY_SCORE
from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.evaluation.datasets import DataSet
from sparsemm_edge.evaluation.run import Record
from sparsemm_edge.evaluation.settings import Setting
from sparsemm_edge.files import atomic_path

BASELINE = "uniform"
"""The policy that the others are compared with at equal bytes: what everybody does without head scores."""

_N_RESAMPLES = 2000
_TABLE_WIDTH = 180  # where there is no terminal to ask, as in a file
_COLOURS = {"sparsemm": "C3", "top": "C1", "uniform": "C0", "pyramid": "C2", "random": "C7"}
_OTHER_COLOURS = ("C4", "C5", "C6", "C8", "C9")  # of further lines of a policy
_MARKERS = "osD^vPX*<>hp"


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval: percentiles of means over resampled pages."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One setting on one task; the seeds of `random` are one row.

    Attributes:
        task: the task.
        setting: the setting, of the first seed.
        label: the setting but for its budget, in words.
        n_questions: answered questions.
        n_seeds: how often each was answered.
        score: 0 to 1; None without accepted answers.
        against_full: score - the full f16 cache's, on the same pages.
        against_uniform: score - that of policy `uniform` at the same bytes, read off between its budgets;
            None where it has none on both sides.
        budget, window: in positions, means over the prompts; None for the full cache.
        kept, kept_share: positions held after the prompt, mean over KV heads; of the prompt, 0 to 1.
        kv_bytes, kv_share: K and V of these positions; of the whole prompt in a full f16 cache, 0 to 1.
        kv_allocated: allocated for K and V then, room for the answer and padding included.
        agreement: share of the tokens that equal the full cache's, 0 to 1.
        identical: share of the answers that equal the full cache's.
        first_divergence: place of the first token that differs, median over the answers that differ.
        kl: KL divergence of next-token distributions, nats.
    """

    task: str
    setting: Setting
    label: str
    n_questions: int
    n_seeds: int
    score: Interval | None
    against_full: Interval | None
    against_uniform: Interval | None
    budget: float | None
    window: float | None
    kept: float
    kept_share: float
    kv_bytes: float
    kv_share: float
    kv_allocated: float
    agreement: Interval
    identical: float
    first_divergence: float | None
    kl: Interval

    def figures(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Failure:
    """A question that could not be answered, and why."""

    question: str
    page: str
    error: str


@dataclass(frozen=True)
class Report:
    """What a run found.

    Attributes:
        rows: by task, the full cache first, then in the settings' order.
        n_questions: those that were asked, of all tasks.
        failures: those of them that are in none of the rows.
    """

    rows: tuple[Row, ...]
    n_questions: int
    failures: tuple[Failure, ...]


def make_report(
    records: dict[tuple[str, str], Record], settings: Sequence[Setting], data: DataSet, *, seed: int = 0
) -> Report:
    """Sum up the records of these settings.

    Args:
        records: by question and setting key.
        settings: those to report.
        data: whose questions are reported, in its order.
        seed: of the bootstrap.
    """
    # in the data set's order, which a run in several processes does not keep
    chosen = [
        records[question.name, setting.key]
        for question in data.questions
        for setting in settings
        if (question.name, setting.key) in records
    ]
    failures = {
        record.question: Failure(record.question, record.page, record.error)
        for record in chosen
        if record.error is not None
    }
    answered = [record for record in chosen if record.question not in failures]
    rows: list[Row] = []
    for task in dict.fromkeys(record.task for record in answered):
        rows += _rows_of_task(task, [each for each in answered if each.task == task], settings, seed)
    n_questions = len({record.question for record in chosen})
    return Report(tuple(rows), n_questions, tuple(failures.values()))


def labels(settings: Sequence[Setting]) -> dict[Setting, str]:
    """The settings but for their budgets, in words: the policy, and what differs among settings of it."""

    def words(setting: Setting) -> str:
        like = [each for each in settings if each.policy == setting.policy]
        parts = [setting.policy]
        if len({each.floor_ratio for each in like}) > 1:
            parts.append(f"floor {setting.floor_ratio:g}")
        if not setting.water_fill:
            parts.append("no water-filling")
        if len({each.window for each in like}) > 1:
            parts.append(f"window {setting.window}")
        if setting.cache_type != "f16":
            parts.append(setting.cache_type)
        return ", ".join(parts)

    return {setting: words(setting) for setting in settings}


# --- rows


class _Pages:
    """Means of questions, and of questions of resampled pages."""

    def __init__(self, records: Sequence[Record], seed: int) -> None:
        self._index = {page: i for i, page in enumerate(dict.fromkeys(record.page for record in records))}
        n = len(self._index)
        # how often each page is drawn; the same for all settings, so that differences are of the same pages
        self._drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=_N_RESAMPLES)

    def means(self, records: Sequence[Record], values: Sequence[float]) -> npt.NDArray[np.float64]:
        """The mean of a value of each record, and then of every resample: [1 + resamples]."""
        pages = [self._index[record.page] for record in records]
        sums = np.bincount(pages, weights=values, minlength=len(self._index))
        counts = np.bincount(pages, minlength=len(self._index))
        with np.errstate(invalid="ignore"):  # no page of this setting drawn
            resampled = (self._drawn @ sums) / (self._drawn @ counts)
        return np.concatenate([[sums.sum() / counts.sum()], resampled])


def _interval(means: npt.NDArray[np.float64]) -> Interval:
    low, high = np.nanpercentile(means[1:], [2.5, 97.5])
    return Interval(float(means[0]), float(low), float(high))


def _rows_of_task(task: str, records: list[Record], settings: Sequence[Setting], seed: int) -> list[Row]:
    pages = _Pages(records, seed)
    by_key: dict[str, list[Record]] = {}
    for record in records:
        by_key.setdefault(record.setting, []).append(record)
    groups: dict[Setting, list[Record]] = {}
    seeds: dict[Setting, int] = {}
    for setting in settings:
        group = replace(setting, seed=0)
        groups.setdefault(group, []).extend(by_key.get(setting.key, []))
        seeds[group] = seeds.get(group, 0) + 1
    groups = {setting: found for setting, found in groups.items() if found}

    scored = all(record.score is not None for record in records)
    scores = {
        setting: pages.means(found, [record.score or 0.0 for record in found])
        for setting, found in groups.items()
    }
    names = labels(list(groups))
    rows = []
    for setting, found in groups.items():
        full = Setting("full")

        def mean(values: list[float]) -> float:
            return float(np.mean(values))

        evicts = setting.policy != "full"
        differs = [record.first_divergence for record in found if record.first_divergence is not None]
        rows.append(
            Row(
                task=task,
                setting=setting,
                label=names[setting],
                n_questions=len({record.question for record in found}),
                n_seeds=seeds[setting],
                score=_interval(scores[setting]) if scored else None,
                against_full=_interval(scores[setting] - scores[full])
                if scored and full in scores and setting != full
                else None,
                against_uniform=_against_baseline(setting, groups, scores) if scored else None,
                budget=mean([record.budget or 0 for record in found]) if evicts else None,
                window=mean([record.window or 0 for record in found]) if evicts else None,
                kept=mean([record.kept for record in found]),
                kept_share=mean([record.kept / record.n_prompt for record in found]),
                kv_bytes=_kv_bytes(found),
                kv_share=_kv_bytes(found) / mean([record.kv_full_bytes for record in found]),
                kv_allocated=mean([record.kv_allocated for record in found]),
                agreement=_interval(pages.means(found, [record.agreement for record in found])),
                identical=mean([record.first_divergence is None for record in found]),
                first_divergence=float(np.median(differs)) if differs else None,
                kl=_interval(pages.means(found, [record.kl for record in found])),
            )
        )
    return rows


def _kv_bytes(records: Sequence[Record]) -> float:
    return float(np.mean([record.kv_bytes for record in records]))


def _against_baseline(
    setting: Setting,
    groups: dict[Setting, list[Record]],
    scores: dict[Setting, npt.NDArray[np.float64]],
) -> Interval | None:
    """Score - the baseline's at the same bytes, between whose budgets the score is taken to be linear."""
    if setting.policy in ("full", BASELINE):
        return None
    like = (setting.window, setting.cache_type)
    line = [
        (_kv_bytes(groups[other]), other)
        for other in groups
        if other.policy == BASELINE and (other.window, other.cache_type) == like
    ]
    line.sort(key=lambda place: place[0])
    n_bytes = _kv_bytes(groups[setting])
    for (low, left), (high, right) in pairwise(line):
        # half a byte of tolerance: the same positions may be the same bytes but for rounding
        if low - 0.5 <= n_bytes <= high + 0.5:
            at = min(max((n_bytes - low) / (high - low), 0.0), 1.0) if high > low else 0.0
            return _interval(scores[setting] - ((1 - at) * scores[left] + at * scores[right]))
    if len(line) == 1 and abs(line[0][0] - n_bytes) <= 0.5:
        return _interval(scores[setting] - scores[line[0][1]])
    return None


# --- out


def print_report(report: Report) -> None:
    """A table for each task, and the failures, on stdout."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console.width = _TABLE_WIDTH
    for task in dict.fromkeys(row.task for row in report.rows):
        rows = [row for row in report.rows if row.task == task]
        table = Table(title=f"{task}: {rows[0].n_questions} questions", title_justify="left")
        table.add_column("policy")
        for column in ("budget", "window", "kept", "K+V", "allocated"):
            table.add_column(column, justify="right", no_wrap=True)
        if rows[0].score:
            table.add_column("score", justify="right")
            table.add_column(f"- {BASELINE}", justify="right")
        for column in ("tokens as full", "differs at", "KL"):
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(*_cells(row))
        console.print(table)
    if report.rows:
        console.print(
            "budget, kept: positions of a KV head, mean, and per cent of the prompt; K+V: of these positions"
            f" and per cent of a full f16 cache; - {BASELINE}: difference to it at the same bytes; differs"
            " at: median place of the first other token; [95 % confidence intervals over pages]",
            style="dim",
            highlight=False,
        )
    if report.failures:
        n_failed = len(report.failures)
        print(f"{n_failed} of {report.n_questions} questions failed and are in no figure above:")
        for failure in report.failures:
            print(f"  {failure.question}: {failure.error}")


def _cells(row: Row) -> list[str]:
    cells = [
        row.label,
        "-" if row.budget is None else f"{row.budget:.0f}",
        "-" if row.window is None else f"{row.window:.0f}",
        f"{row.kept:.0f} {row.kept_share:6.1%}",
        f"{_kib(row.kv_bytes)} {row.kv_share:6.1%}",
        _kib(row.kv_allocated),
    ]
    if row.score:
        cells.append(_with_interval(row.score))
        cells.append(_with_interval(row.against_uniform, sign="+") if row.against_uniform else "")
    differs = "-" if row.first_divergence is None else f"{row.first_divergence:.0f}"
    return [*cells, f"{row.agreement.mean:.1%}", differs, f"{row.kl.mean:.3g}"]


def _kib(n_bytes: float) -> str:
    return f"{n_bytes / 2**10:.0f} KiB" if n_bytes < 10 * 2**20 else f"{n_bytes / 2**20:.0f} MiB"


def _with_interval(interval: Interval, sign: str = "") -> str:
    mean, low, high = (f"{100 * value:{sign}.1f}" for value in (interval.mean, interval.low, interval.high))
    return f"{mean} \\[{low}, {high}]"


def save_json(report: Report, path: Path, *, about: dict[str, Any]) -> None:
    """Write eval.json: `about` the run, the rows, the failures."""
    with atomic_path(path) as part:
        part.write_text(json.dumps(as_json(report, about), indent=1) + "\n", encoding="utf-8")


def as_json(report: Report, about: dict[str, Any]) -> dict[str, Any]:
    """What eval.json holds."""
    return {
        "format": "sparsemm-edge/eval",
        "version": 1,
        **about,
        "n_questions": report.n_questions,
        "rows": [row.figures() for row in report.rows],
        "failures": [asdict(failure) for failure in report.failures],
    }


def save_plot(report: Report, path: Path, *, title: str) -> None:
    """Draw accuracy, or without accepted answers token agreement, over KV bytes: a panel for each task.

    A line for each policy and way of sharing, with 95 % confidence intervals over pages; the full f16 cache
    is the dashed line.

    Raises:
        SparseMMError: the name does not end in .png, or the file cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise SparseMMError(f"the plot is a PNG picture: {path} must end in .png")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    tasks = list(dict.fromkeys(row.task for row in report.rows))
    figure = Figure(figsize=(1 + 5.2 * max(1, len(tasks)), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, task in zip(figure.subplots(1, max(1, len(tasks)), squeeze=False)[0], tasks, strict=False):
        rows = [row for row in report.rows if row.task == task]
        ticks = set()
        for number, label in enumerate(dict.fromkeys(row.label for row in rows)):
            line = sorted((row for row in rows if row.label == label), key=lambda row: row.kv_share)
            heights = [row.score or row.agreement for row in line]
            means = np.array([height.mean for height in heights]) * 100
            if line[0].setting == Setting("full"):
                axes.axhline(means[0], color="black", linestyle="--", linewidth=1, label="full cache")
                continue
            below = means - np.array([height.low for height in heights]) * 100
            above = np.array([height.high for height in heights]) * 100 - means
            policy = line[0].setting.policy
            shares = [row.kv_share * 100 for row in line]
            ticks |= {round(share, 1) for share in shares if policy == BASELINE}
            axes.errorbar(
                shares,
                means,
                yerr=np.maximum([below, above], 0),
                label=label,
                marker=_MARKERS[number % len(_MARKERS)],
                markersize=5,
                capsize=2,
                linewidth=2.2 if policy in BY_SCORE else 1.4,
                color=_COLOURS[policy]
                if _is_plain(line[0].setting, rows)
                else _OTHER_COLOURS[number % len(_OTHER_COLOURS)],
            )
        axes.set_xscale("log")
        if ticks:
            axes.set_xticks(sorted(ticks))
            axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_title(task, fontsize=10)
        axes.set_xlabel("K and V, % of the full f16 cache")
        axes.set_ylabel("score, %" if rows[0].score else "tokens as with the full cache, %")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    with atomic_path(path) as part:
        figure.savefig(part, format="png", dpi=120)


def _is_plain(setting: Setting, rows: Sequence[Row]) -> bool:
    """Whether this is the first line of its policy, which has the policy's colour."""
    return next(row.label for row in rows if row.setting.policy == setting.policy) == next(
        row.label for row in rows if row.setting == setting
    )
