"""The output of `bench`: table and sentences on the screen, and the report folder."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sparsemm_edge.profiling.bench import Bench, BenchRow
from sparsemm_edge.profiling.machine import in_words
from sparsemm_edge.reports import html, profile, profiling_plots

_SCREEN = ("prompt", "budget", "decode", "full", "ratio", "limit", "K+V", "peak", "after", "prompt speed")
_COLUMNS = (
    "setting",
    "prompt, positions",
    "decode, tokens/s",
    "full, better setting",
    "ratio (quartiles)",
    "limit: empty cache",
    "K+V of full",
    "K+V at peak",
    "over the weights, MiB",
    "full, MiB",
    "after the prompt, MiB",
    "full, MiB",
    "prompt, of full's tokens/s",
)


def screen_table(found: Bench) -> html.Table:
    """One row per prompt length and budget, for a terminal."""
    rows = [
        [
            str(row.n_prompt),
            str(row.budget),
            _number(row.decode_tps, ".1f") if row.status == "ok" else row.status,
            _number(row.decode_tps_full, ".1f"),
            _number(row.decode_ratio, ".2f"),
            _number(row.decode_limit_ratio, ".2f"),
            _share(row.kv_bytes, row.kv_bytes_full),
            _share(row.peak_over_weights, row.peak_over_weights_full),
            _share(row.after_over_weights, row.after_over_weights_full),
            _share(row.prompt_tps, row.prompt_tps_full),
        ]
        for row in found.rows
    ]
    return html.Table("", _SCREEN, rows)


def sentences(found: Bench) -> list[str]:
    """Sentences about what limits decoding and what eviction gains, for each prompt length."""
    said = []
    bandwidth = found.machine["memory_bandwidth"] / 1e9
    for length in found.lengths:
        where = f"{length.n_prompt} positions"
        said += [f"{where}, {line}." for line in profile.first_tokens(length.settings)]
        limits = length.limits
        if limits.weight_bytes_per_s is not None and limits.attention_share is not None:
            said.append(
                f"{where}: decoding reads {limits.weight_bytes / 1e9:.2f} GB of weights a token, at an empty"
                f" cache {limits.weight_bytes_per_s / 1e9:.1f} GB/s, {limits.bandwidth_share:.0%} of the"
                f" {bandwidth:.1f} GB/s that plain reading gave."
            )
            shares = ", ".join(f"{share:.0%} {name}" for name, share in limits.attention_share.items())
            said.append(f"{where}: share of a token's time that goes to attention: {shares}.")
        elif length.n_rounds:
            said.append(f"{where}: not measured interleaved ({length.interleaved_reason})")
        for row in found.rows:
            if row.n_prompt == length.n_prompt:
                said += _of_row(row)
    return said


def _of_row(row: BenchRow) -> list[str]:
    where, said = f"{row.n_prompt} positions, budget {row.budget}", []
    if row.decode_limit_share is not None:
        said.append(
            f"{where}: decodes {row.decode_ratio:.2f}x as fast as"
            f" {row.full_setting} (quartiles {row.decode_ratio_low:.2f} to"
            f" {row.decode_ratio_high:.2f}); an empty cache would give"
            f" {row.decode_limit_ratio:.2f}x: {row.decode_limit_share:.0%} of the limit."
        )
    if row.peak_over_weights is not None and row.after_over_weights is not None:
        said.append(
            f"{where}: {_mib(row.peak_over_weights)} MiB over the weights at the peak (full cache"
            f" {_mib(row.peak_over_weights_full)}), {_mib(row.after_over_weights)} MiB after the prompt (full"
            f" cache {_mib(row.after_over_weights_full)})."
        )
    if row.memory_difference is not None and row.memory_difference_allocated is not None:
        said.append(
            f"{where}: {_signed(row.memory_difference)} MiB at the peak"
            f" against {row.memory_setting}; K, V and buffers explain"
            f" {_signed(row.memory_difference_allocated)} MiB."
        )
    return said


def write(folder: Path, found: Bench) -> None:
    """Write bench.json, bench.html and the pictures into the folder."""
    pictures = []
    timed = [length for length in found.lengths if length.depth_0_tps is not None]
    if timed:
        pictures.append(
            html.Picture(
                "decode",
                "Decoding",
                "Medians over interleaved decoding. The distance between a full and the empty cache is the"
                " cost of attention, the most that eviction can save.",
                profiling_plots.decode_over_length(timed)
                if len(timed) > 1
                else profiling_plots.decode_bars(timed[0]),
            )
        )
    if any(figures.peak_over_weights for length in found.lengths for figures in length.settings):
        pictures.append(
            html.Picture(
                "memory",
                "Memory over the weights",
                "Anonymous memory beyond that of the loaded model. Dark: at the peak, while the prompt is"
                " computed. Light: afterwards, while decoding.",
                profiling_plots.over_weights_bars(found.lengths),
            )
        )
    for length in found.lengths:
        title = f", {length.n_prompt} positions"
        for picture in profile.pictures(length.settings, f"{length.n_prompt}-")[:2]:
            pictures.append(replace(picture, title=picture.title + title))
    rows = [_row(row) for row in found.rows]
    tables = [html.Table("Against the full cache", _COLUMNS, rows, [True] * len(rows))]
    for length in found.lengths:
        title = f"Each setting in its own process, {length.n_prompt} positions"
        tables.append(replace(profile.table(length.settings), title=title))
    html.write(
        folder,
        "bench",
        found.to_dict(),
        title=f"{found.model.name}: what eviction gives on this machine",
        lead=f"{in_words(found.machine)}, {found.machine['n_threads']} threads; head scores: {found.scores}.",
        cards=_cards(found.rows),
        tables=tables,
        pictures=pictures,
        notes=[
            *sentences(found),
            "Prompts are random tokens. Speeds are of contexts that decode interleaved in one process, a few"
            " tokens each, so that other load slows all of them alike. Memory is of separate processes.",
            profile.READING_FIRST_TOKEN,
            profile.READING_MEMORY,
        ],
    )


def _row(row: BenchRow) -> list[str]:
    name = f"evicted, budget {row.budget}"
    quartiles = ""
    if row.decode_ratio is not None:
        quartiles = f"{row.decode_ratio:.2f} ({row.decode_ratio_low:.2f} to {row.decode_ratio_high:.2f})"
    return [
        name if row.status == "ok" else f"{name}: {row.status}",
        str(row.n_prompt),
        _number(row.decode_tps, ".1f"),
        _number(row.decode_tps_full, ".1f"),
        quartiles,
        _number(row.decode_limit_ratio, ".2f"),
        _share(row.kv_bytes, row.kv_bytes_full),
        _share(row.kv_bytes_peak, row.kv_bytes_full),
        _mib(row.peak_over_weights),
        _mib(row.peak_over_weights_full),
        _mib(row.after_over_weights),
        _mib(row.after_over_weights_full),
        _share(row.prompt_tps, row.prompt_tps_full),
    ]


def _cards(rows: Sequence[BenchRow]) -> list[tuple[str, str]]:
    """The longest prompt with the largest budget."""
    row = max(rows, key=lambda row: (row.n_prompt, row.budget))
    where = f"{row.n_prompt} positions, budget {row.budget}"
    cards = []
    if row.decode_ratio is not None:
        cards += [
            (f"{row.decode_ratio:.2f}x", f"as fast at decoding as the full cache: {where}"),
            (f"{row.decode_limit_ratio:.2f}x", "is the limit: decoding with an empty cache"),
        ]
    if row.kv_bytes is not None:
        cards += [
            (_share(row.kv_bytes, row.kv_bytes_full), "of the K and V of a full cache remain"),
            (_share(row.kv_bytes_peak, row.kv_bytes_full), "of them at the peak, at the prompt's end"),
        ]
    if row.peak_over_weights is not None and row.peak_over_weights_full:
        share = _share(row.peak_over_weights, row.peak_over_weights_full)
        cards.append((share, "of the full cache's peak memory over the weights"))
    return cards


def _mib(n_bytes: int | None) -> str:
    return _number(None if n_bytes is None else n_bytes / 2**20, ",.0f")


def _signed(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:+,.1f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _share(part: float | None, whole: float | None) -> str:
    return "-" if part is None or not whole else f"{part / whole:.1%}"
