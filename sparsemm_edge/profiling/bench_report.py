"""What `bench` shows: the table and the limits on the screen, and the report folder."""

from pathlib import Path
from typing import Any

from sparsemm_edge.profiling import plots, profile_report, report
from sparsemm_edge.profiling.machine import in_words

_SCREEN = ("prompt", "budget", "decode", "full", "ratio", "limit", "K+V", "at peak", "prompt speed")
_COLUMNS = (
    "setting",
    "prompt, positions",
    "decode, tokens/s",
    "full, better setting",
    "ratio (quartiles)",
    "limit: empty cache",
    "K+V of full",
    "K+V at peak",
    "peak memory, MiB",
    "full, MiB",
    "prompt, of full's tokens/s",
)


def screen_table(content: dict[str, Any]) -> report.Table:
    """A row for each prompt length and budget, as wide as a terminal."""
    rows = [
        [
            str(row["n_prompt"]),
            str(row["budget"]),
            _number(row["decode_tps"], ".1f") if row["status"] == "ok" else row["status"],
            _number(row["decode_tps_full"], ".1f"),
            _number(row["decode_ratio"], ".2f"),
            _number(row["decode_limit_ratio"], ".2f"),
            _share(row["kv_bytes"], row["kv_bytes_full"]),
            _share(row["kv_bytes_peak"], row["kv_bytes_full"]),
            _share(row["prompt_tps"], row["prompt_tps_full"]),
        ]
        for row in content["rows"]
    ]
    return report.Table("", _SCREEN, rows)


def sentences(content: dict[str, Any]) -> list[str]:
    """What limits decoding, and how far eviction gets, in words: some lines for each prompt length."""
    said = []
    bandwidth = content["machine"]["memory_bandwidth"] / 1e9
    for length in content["lengths"]:
        where = f"{length['n_prompt']} positions"
        said += [f"{where}, {line}." for line in profile_report.first_tokens(length["settings"])]
        limits = length["limits"]
        if "bandwidth_share" not in limits:
            said.append(f"{where}: not measured by turns ({length['by_turns']['reason']})")
            continue
        said.append(
            f"{where}: decoding reads {limits['weight_bytes'] / 1e9:.2f} GB of weights a token, at an empty"
            f" cache {limits['weight_bytes_per_s'] / 1e9:.1f} GB/s,"
            f" {limits['bandwidth_share']:.0%} of the {bandwidth:.1f} GB/s that plain reading gave."
        )
        shares = ", ".join(f"{share:.0%} {name}" for name, share in limits["attention_share"].items())
        said.append(f"{where}: share of a token's time that goes to attention: {shares}.")
        for row in content["rows"]:
            if row["n_prompt"] == length["n_prompt"] and row["decode_limit_share"] is not None:
                said.append(
                    f"{where}, budget {row['budget']}: decodes {row['decode_ratio']:.2f}x as fast as"
                    f" {row['full_setting']} (quartiles {row['decode_ratio_low']:.2f} to"
                    f" {row['decode_ratio_high']:.2f}); an empty cache would give"
                    f" {row['decode_limit_ratio']:.2f}x: {row['decode_limit_share']:.0%} of the limit."
                )
            if row["n_prompt"] == length["n_prompt"] and row["memory_difference"] is not None:
                said.append(
                    f"{where}, budget {row['budget']}: {_signed(row['memory_difference'])} MiB at the peak"
                    f" against {row['memory_setting']}; K, V and buffers explain"
                    f" {_signed(row['memory_difference_allocated'])} MiB."
                )
    return said


def write(folder: Path, content: dict[str, Any]) -> None:
    """Write bench.json, bench.html and the pictures into the folder."""
    lengths, model = content["lengths"], content["model"]
    pictures = []
    measured = [length for length in lengths if length["depth_0_tps"] is not None]
    if measured:
        pictures.append(
            report.Picture(
                "decode",
                "Decoding",
                "Medians of tokens decoded by turns. The distance from a full cache to the empty cache is"
                " what attention costs: eviction cannot win back more.",
                plots.decode_over_length(measured)
                if len(measured) > 1
                else plots.decode_bars(measured[0]["decode_tps"], measured[0]["depth_0_tps"]),
            )
        )
    for length in lengths:
        title = f", {length['n_prompt']} positions"
        for picture in profile_report.pictures(length["settings"], f"{length['n_prompt']}-")[:2]:
            pictures.append(report.Picture(picture.name, picture.title + title, picture.note, picture.figure))
    tables = [report.Table("Against the full cache", _COLUMNS, [_row(row) for row in content["rows"]])]
    for length in lengths:
        one = profile_report.table(length["settings"])
        title = f"Every setting in a process of its own, {length['n_prompt']} positions"
        tables.append(report.Table(title, one.columns, one.rows))
    report.write(
        folder,
        "bench",
        content,
        title=f"{model['name']}: what eviction gives on this machine",
        lead=f"{in_words(content['machine'])}, {content['machine']['n_threads']} threads;"
        f" head scores: {content['scores']}.",
        cards=_cards(content["rows"]),
        tables=tables,
        pictures=pictures,
        notes=[
            *sentences(content),
            "Prompts are random tokens. Speeds are of contexts that decode by turns in one process, a few"
            " tokens each, so that what else the machine does slows all alike. Memory is of processes of"
            " their own.",
            profile_report.READING_FIRST_TOKEN,
            profile_report.READING_MEMORY,
        ],
    )


def _row(row: dict[str, Any]) -> list[str]:
    name = f"evicted, budget {row['budget']}"
    quartiles = ""
    if row["decode_ratio"] is not None:
        quartiles = (
            f"{row['decode_ratio']:.2f} ({row['decode_ratio_low']:.2f} to {row['decode_ratio_high']:.2f})"
        )
    return [
        name if row["status"] == "ok" else f"{name}: {row['status']}",
        str(row["n_prompt"]),
        _number(row["decode_tps"], ".1f"),
        _number(row["decode_tps_full"], ".1f"),
        quartiles,
        _number(row["decode_limit_ratio"], ".2f"),
        _share(row["kv_bytes"], row["kv_bytes_full"]),
        _share(row["kv_bytes_peak"], row["kv_bytes_full"]),
        _number(row["rss_peak"] and row["rss_peak"] / 2**20, ",.0f"),
        _number(row["rss_peak_full"] and row["rss_peak_full"] / 2**20, ",.0f"),
        _share(row["prompt_tps"], row["prompt_tps_full"]),
    ]


def _cards(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The longest prompt with the largest budget."""
    row = max(rows, key=lambda row: (row["n_prompt"], row["budget"]))
    where = f"{row['n_prompt']} positions, budget {row['budget']}"
    cards = []
    if row["decode_ratio"] is not None:
        cards += [
            (f"{row['decode_ratio']:.2f}x", f"as fast at decoding as the full cache: {where}"),
            (f"{row['decode_limit_ratio']:.2f}x", "is the limit: decoding with an empty cache"),
        ]
    if row["kv_bytes"] is not None:
        cards += [
            (_share(row["kv_bytes"], row["kv_bytes_full"]), "of the K and V of a full cache remain"),
            (_share(row["kv_bytes_peak"], row["kv_bytes_full"]), "of them at the peak, at the prompt's end"),
        ]
    return cards


def _signed(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:+,.1f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _share(part: float | None, whole: float | None) -> str:
    return "-" if part is None or not whole else f"{part / whole:.1%}"
