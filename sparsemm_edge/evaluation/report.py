"""Summarise records: means with confidence intervals, tables, a plot, eval.json."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sparsemm_edge.evaluation.run import Record
from sparsemm_edge.evaluation.settings import Setting, labels

if TYPE_CHECKING:
    from rich.table import Table

BASELINE = "uniform"
"""The policy that the others are compared with at equal bytes: what everybody does without head scores."""

_N_RESAMPLES = 2000
_TABLE_WIDTH = 200  # where there is no terminal to ask, as in a file


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval: percentiles of means over resampled pages."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Way:
    """How a question was asked, as in Record. Questions asked in the same way are reported together."""

    first_task: str
    task: str
    place: int
    instead: bool

    @property
    def words(self) -> str:
        same = self.task == self.first_task
        if self.instead:
            return f"{self.task} in the place of {'another' if same else self.first_task}"
        if self.place == 1:
            return self.task
        return f"{self.task} as question {self.place}" + ("" if same else f", after {self.first_task}")


@dataclass(frozen=True)
class EvaluationRow:
    """One setting and one way of asking; the seeds of `random` are one row.

    Attributes:
        way: which questions, and how they were asked.
        setting: the setting, of the first seed.
        label: the setting without its budget, in words.
        n_questions: answered questions.
        n_seeds: how often each was answered.
        score, agreement, kl: means of Record's; score is None without accepted answers.
        against_full: score - the full f16 cache's, on the same pages.
        against: score - those of other labels at the same bytes, interpolated between their budgets (see
            _comparable); and those of full caches of other types with at least these bytes.
        budget, window, kept, kv_bytes, kv_allocated: means of Record's.
        kept_share: positions kept of the sequence, 0 to 1.
        kv_share: kv_bytes of those of the whole sequence in a full f16 cache, 0 to 1.
        identical: share of the answers that equal the full cache's.
        first_divergence: median of Record's, over the answers that differ.
    """

    way: Way
    setting: Setting
    label: str
    n_questions: int
    n_seeds: int
    score: Interval | None
    against_full: Interval | None
    against: dict[str, Interval]
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

    @property
    def height(self) -> Interval:
        """What is drawn: the score, or without accepted answers the share of the full cache's tokens."""
        return self.score or self.agreement


@dataclass(frozen=True)
class Skipped:
    """Settings, by label and budget, that questions of one way cannot be asked under, and why."""

    way: Way
    settings: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Report:
    """The results of a run.

    Attributes:
        rows: by way of asking, the full cache first, then in the settings' order.
        n_questions: number of questions asked.
        failures: for each question without an answer one of its records.
        skipped: combinations that cannot be run.
    """

    rows: tuple[EvaluationRow, ...]
    n_questions: int
    failures: tuple[Record, ...]
    skipped: tuple[Skipped, ...] = ()

    @cached_property
    def threads(self) -> list[list[Way]]:
        """The ways by the first question's task, in the order in which they were asked."""
        found: dict[str, list[Way]] = {}
        for way in dict.fromkeys(row.way for row in self.rows):
            found.setdefault(way.first_task, []).append(way)
        return [sorted(ways, key=lambda way: (way.instead, way.place)) for ways in found.values()]

    def to_dict(self, **about: Any) -> dict[str, Any]:
        """What eval.json holds: `about` the run, the rows, the failures."""
        return {
            "format": "sparsemm-edge/eval",
            "version": 2,
            **about,
            "n_questions": self.n_questions,
            "rows": [_flat(row) for row in self.rows],
            "failures": [
                {"question": each.question, "page": each.page, "error": each.error} for each in self.failures
            ],
            "skipped": [_flat(each) for each in self.skipped],
        }

    def rows_of(self, way: Way) -> list[EvaluationRow]:
        return [row for row in self.rows if row.way == way]


def _flat(found: EvaluationRow | Skipped) -> dict[str, Any]:
    figures = asdict(found)
    return {**figures.pop("way"), **figures}


def make_report(
    records: dict[tuple[str, str], Record],
    settings: Sequence[Setting],
    asked: Sequence[str],
    *,
    seed: int = 0,
) -> Report:
    """Summarise the records of these settings.

    Args:
        records: by name of what was asked and setting key.
        settings: those to report.
        asked: names of what is reported, in order.
        seed: of the bootstrap.
    """
    # in the data set's order, which a run in several processes does not keep
    chosen = [
        records[name, setting.key] for name in asked for setting in settings if (name, setting.key) in records
    ]
    failures = {record.question: record for record in chosen if record.error is not None}
    by_way: dict[Way, list[Record]] = {}
    for record in chosen:
        if record.question not in failures:
            way = Way(record.first_task, record.task, record.place, record.instead)
            by_way.setdefault(way, []).append(record)
    rows: list[EvaluationRow] = []
    skipped: list[Skipped] = []
    for way, found in by_way.items():
        skipped += _skipped(way, found, settings)
        without = {record.setting for record in found if record.skipped is not None}
        answered = [record for record in found if record.setting not in without]
        rows += _rows(way, answered, [each for each in settings if each.key not in without], seed)
    n_questions = len({record.question for record in chosen})
    return Report(tuple(rows), n_questions, tuple(failures.values()), tuple(skipped))


def _skipped(way: Way, records: Sequence[Record], settings: Sequence[Setting]) -> list[Skipped]:
    names = {setting.key: f"{label} at {setting.size}" for setting, label in labels(settings).items()}
    found: dict[str, dict[str, None]] = {}
    for record in records:
        if record.skipped is not None:
            found.setdefault(record.skipped, {})[names[record.setting]] = None
    return [Skipped(way, tuple(under), reason) for reason, under in found.items()]


# --- rows


_Means = npt.NDArray[np.float64]  # of a field of the records, then of every resample: [1 + resamples]
_Scores = dict[Setting, _Means]


class _Pages:
    """Means over questions, and over questions of resampled pages."""

    def __init__(self, records: Sequence[Record], seed: int) -> None:
        self._index = {page: i for i, page in enumerate(dict.fromkeys(record.page for record in records))}
        n = len(self._index)
        # how often each page is drawn; the same for all settings, so that differences are of the same pages
        self._drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=_N_RESAMPLES)

    def means(self, records: Sequence[Record], field: str) -> _Means:
        pages = [self._index[record.page] for record in records]
        values = [getattr(record, field) for record in records]
        sums = np.bincount(pages, weights=values, minlength=len(self._index))
        counts = np.bincount(pages, minlength=len(self._index))
        with np.errstate(invalid="ignore"):  # no page of this setting drawn
            resampled = (self._drawn @ sums) / (self._drawn @ counts)
        return np.concatenate([[sums.sum() / counts.sum()], resampled])


def _interval(means: _Means) -> Interval:
    low, high = np.nanpercentile(means[1:], [2.5, 97.5])
    return Interval(float(means[0]), float(low), float(high))


def _mean(records: Sequence[Record], field: str) -> float:
    return float(np.mean([getattr(record, field) for record in records]))


def _rows(way: Way, records: list[Record], settings: Sequence[Setting], seed: int) -> list[EvaluationRow]:
    pages = _Pages(records, seed)
    by_key: dict[str, list[Record]] = {}
    for record in records:
        by_key.setdefault(record.setting, []).append(record)
    groups: dict[Setting, list[Record]] = {}
    for setting in settings:
        if setting.key in by_key:
            groups.setdefault(replace(setting, seed=0), []).extend(by_key[setting.key])
    n_seeds = Counter(replace(setting, seed=0) for setting in settings)

    scored = all(record.score is not None for record in records)
    scores = {setting: pages.means(found, "score") for setting, found in groups.items()} if scored else {}
    full = Setting("full")
    names = labels(list(groups))
    rows = []
    for setting, found in groups.items():
        evicts = setting.policy != "full"
        differs = [record.first_divergence for record in found if record.first_divergence is not None]
        rows.append(
            EvaluationRow(
                way=way,
                setting=setting,
                label=names[setting],
                n_questions=len({record.question for record in found}),
                n_seeds=n_seeds[setting],
                score=_interval(scores[setting]) if scored else None,
                against_full=_interval(scores[setting] - scores[full])
                if full in scores and setting != full
                else None,
                against=_against(setting, groups, scores, names) if scored else {},
                budget=_mean(found, "budget") if evicts else None,
                window=_mean(found, "window") if evicts else None,
                kept=_mean(found, "kept"),
                kept_share=float(np.mean([record.kept / record.n_prompt for record in found])),
                kv_bytes=_mean(found, "kv_bytes"),
                kv_share=_mean(found, "kv_bytes") / _mean(found, "kv_full_bytes"),
                kv_allocated=_mean(found, "kv_allocated"),
                agreement=_interval(pages.means(found, "agreement")),
                identical=(len(found) - len(differs)) / len(found),
                first_divergence=float(np.median(differs)) if differs else None,
                kl=_interval(pages.means(found, "kl")),
            )
        )
    return rows


def _against(
    setting: Setting, groups: dict[Setting, list[Record]], scores: _Scores, names: dict[Setting, str]
) -> dict[str, Interval]:
    """Score - that of every other label at the same bytes, see EvaluationRow.against."""
    if setting.policy == "full":
        return {}
    lines: dict[str, list[tuple[float, Setting]]] = {}
    for other in groups:
        if names[other] != names[setting] and _comparable(setting, other):
            lines.setdefault(names[other], []).append((_mean(groups[other], "kv_bytes"), other))
    n_bytes = _mean(groups[setting], "kv_bytes")
    found = {}
    for label, line in lines.items():
        theirs = _at_bytes(n_bytes, sorted(line, key=lambda place: place[0]), scores)
        if theirs is not None:
            found[label] = _interval(scores[setting] - theirs)
    for other in groups:
        quantised = other.policy == "full" and other != Setting("full")
        if quantised and n_bytes <= _mean(groups[other], "kv_bytes"):
            found[names[other]] = _interval(scores[setting] - scores[other])
    return found


def _comparable(setting: Setting, other: Setting) -> bool:
    """Whether the window, cache type and rule for later questions are the same, or only that rule is not."""
    if (setting.window, setting.cache_type) != (other.window, other.cache_type):
        return False
    plain: dict[str, Any] = {"budget": None, "retention": None, "later": ""}
    return setting.later == other.later or replace(setting, **plain) == replace(other, **plain)


def _at_bytes(n_bytes: float, line: list[tuple[float, Setting]], scores: _Scores) -> _Means | None:
    """Scores at these bytes, interpolated linearly between budgets; None outside them."""
    # half a byte of tolerance: the same positions may be the same bytes but for rounding
    for (low, left), (high, right) in pairwise([*line, line[-1]]):  # a line may be one budget
        if low - 0.5 <= n_bytes <= high + 0.5:
            at = min(max((n_bytes - low) / (high - low), 0.0), 1.0) if high > low else 0.0
            return (1 - at) * scores[left] + at * scores[right]
    return None


# --- out


def print_report(report: Report) -> None:
    """Print tables, and what is missing from them.

    For each task of first questions a table of all figures, and one of the scores of what was asked after
    them; then what the first line of settings gains on the others.
    """
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = _TABLE_WIDTH
    for ways in report.threads:
        if ways[0].place == 1 and not ways[0].instead:
            console.print(_first_table(report.rows_of(ways[0])))
        if len(ways) > 1:
            console.print(_later_table(report, ways))
    if (gains := _gains_table(report)) is not None:
        console.print(gains)
    if report.rows:
        console.print(
            "budget, kept: positions of a KV head, mean, and per cent of the sequence; K+V: of these"
            " and of residual slots, and per cent of a full f16 cache; - a policy: difference to it at the"
            " same bytes, to a full cache of another type at no more than its bytes; differs at: median"
            " place of the first other token; [95 % confidence intervals over pages]",
            style="dim",
            highlight=False,
        )
    for each in report.skipped:
        print(f"{each.way.words}: not under {', '.join(each.settings)}: {each.reason}")
    if report.failures:
        n_failed = len(report.failures)
        print(f"{n_failed} of {report.n_questions} questions failed and are in no figure above:")
        for failure in report.failures:
            print(f"  {failure.question}: {failure.error}")


def _table(title: str, columns: Sequence[str], n_unwrapped: int = 1) -> "Table":
    """A table without rows: names in the first column, then figures, the first n_unwrapped on one line."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=1 <= index <= n_unwrapped)
    return table


def _first_table(rows: list[EvaluationRow]) -> "Table":
    columns = ["policy", "budget", "window", "kept", "K+V", "allocated"]
    scores = ["score", "- full", f"- {BASELINE}"] if rows[0].score else []
    title = f"{rows[0].way.words}: {rows[0].n_questions} questions"
    table = _table(title, [*columns, *scores, "tokens as full", "differs at", "KL"], n_unwrapped=5)
    for row in rows:
        cells = [
            row.label,
            "-" if row.budget is None else f"{row.budget:.0f}",
            "-" if row.window is None else f"{row.window:.0f}",
            f"{row.kept:.0f} {row.kept_share:6.1%}",
            f"{_kib(row.kv_bytes)} {row.kv_share:6.1%}",
            _kib(row.kv_allocated),
        ]
        if row.score:
            against = (row.against_full, _against_baseline(row, rows))
            cells += [_with_interval(row.score), *(_with_interval(each, sign="+") for each in against)]
        differs = "-" if row.first_divergence is None else f"{row.first_divergence:.0f}"
        table.add_row(*cells, f"{row.agreement.mean:.1%}", differs, f"{row.kl.mean:.3g}")
    return table


def _later_table(report: Report, ways: list[Way]) -> "Table":
    """Scores by place in the conversation: a row for each setting."""
    rows = {(row.way, row.setting): row for way in ways for row in report.rows_of(way)}
    what = "score" if report.rows_of(ways[0])[0].score else "tokens as with the full cache"
    columns = ["policy", "budget"]
    for way in ways:
        columns.append(f"{way.words} ({max(row.n_questions for row in report.rows_of(way))})")
    table = _table(f"{ways[0].first_task}, and what is asked after it: {what}, %", columns)
    for setting in dict.fromkeys(setting for _, setting in rows):
        found = [rows.get((way, setting)) for way in ways]
        label = next(row.label for row in found if row is not None)
        table.add_row(
            label, setting.size, *("" if row is None else _with_interval(row.height) for row in found)
        )
    return table


def _gains_table(report: Report) -> "Table | None":
    """Differences of the first line of settings to all others at the same bytes; None if there is none."""
    subject = next((row.label for row in report.rows if row.setting.policy != "full"), None)
    rows = [row for row in report.rows if row.label == subject and row.score]
    others = list(dict.fromkeys(label for row in rows for label in row.against))
    if not others:
        return None
    columns = ["questions", "budget", "K+V", "score", "- full", *(f"- {label}" for label in others)]
    table = _table(f"{subject}, less the others at the same bytes", columns)
    for row in rows:
        against = [row.against_full, *(row.against.get(label) for label in others)]
        table.add_row(
            row.way.words,
            row.setting.size,
            f"{row.kv_share:.1%}",
            f"{100 * row.height.mean:.1f}",
            *(_with_interval(each, sign="+") for each in against),
        )
    return table


def _against_baseline(row: EvaluationRow, rows: Sequence[EvaluationRow]) -> Interval | None:
    """The difference to the baseline with the same vote and slot, or else to any."""
    baselines = [each for each in rows if each.setting.policy == BASELINE and each.label in row.against]
    votes = (row.setting.vote, row.setting.residual)
    baselines.sort(key=lambda each: (each.setting.vote, each.setting.residual) != votes)
    return row.against[baselines[0].label] if baselines and row.setting.policy != BASELINE else None


def _kib(n_bytes: float) -> str:
    return f"{n_bytes / 2**10:.0f} KiB" if n_bytes < 10 * 2**20 else f"{n_bytes / 2**20:.0f} MiB"


def _with_interval(interval: Interval | None, sign: str = "") -> str:
    if interval is None:
        return ""
    mean, low, high = (f"{100 * value:{sign}.1f}" for value in (interval.mean, interval.low, interval.high))
    return f"{mean} \\[{low}, {high}]"
