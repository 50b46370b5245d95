"""What `profile` shows: the table on the screen and the report folder."""

from pathlib import Path
from typing import Any

from sparsemm_edge.profiling import plots, report
from sparsemm_edge.profiling.machine import in_words as machine_in_words
from sparsemm_edge.runtime.first_token import in_words

_SCREEN = ("setting", "K+V MiB", "K+V peak", "peak MiB", "prompt t/s", "decode t/s")
_COLUMNS = (
    "setting",
    "K+V, MiB",
    "K+V at peak",
    "peak memory, MiB",
    "not in files",
    "compute, MiB",
    "prompt, tokens/s",
    "decode, tokens/s",
    "ms a token",
)

READING_MEMORY = (
    "Peak memory is the largest resident size of the setting's own process. Weights that llama.cpp maps from"
    " the model file are part of it, but the system can drop and read them again; 'not in files' is what"
    " cannot be given back. Weights that llama.cpp rearranges for the processor are in memory a second time."
)


READING_FIRST_TOKEN = (
    "A part is limited by memory bandwidth if it reads weights at least half as fast as decoding reads"
    " weights, K and V in the same setting, otherwise by compute."
)


def screen_table(settings: list[dict[str, Any]]) -> report.Table:
    """The columns of table() that fit a terminal."""
    whole = table(settings)
    picked = (0, 1, 2, 3, 6, 7)
    return report.Table(whole.title, _SCREEN, [[row[index] for index in picked] for row in whole.rows])


def table(settings: list[dict[str, Any]]) -> report.Table:
    """A row for each setting; one that did not end well says so."""
    rows = []
    for setting in settings:
        memory = [_mib(setting["rss_peak"]), _mib(setting["anon_peak"])]
        if setting["status"] != "ok":
            rows.append([setting["name"], setting["status"], "", *memory, "", "", "", ""])
            continue
        kv, ms = setting["kv"], setting["decode_ms"]
        rows.append(
            [
                setting["name"],
                _mib(kv["bytes_now"]),
                _mib(kv["bytes_peak"]),
                *memory,
                _mib(setting["breakdown"]["compute"]),
                f"{setting['prompt_tps']:.1f}",
                f"{setting['decode_tps']:.1f}",
                f"{ms['median']:.2f} ({ms['low']:.2f} to {ms['high']:.2f})",
            ]
        )
    return report.Table("Every setting", _COLUMNS, rows)


def first_tokens(settings: list[dict[str, Any]]) -> list[str]:
    """What the time to the first token consists of: a line for the full f16 cache and each evicted one."""
    return [
        f"{setting['name']}: {in_words(setting['first_token'])}"
        for setting in settings
        if setting["status"] == "ok"
        and (setting["budget"] is not None or (setting["cache_type"] == "f16" and setting["flash_attn"]))
    ]


def pictures(settings: list[dict[str, Any]], prefix: str = "") -> list[report.Picture]:
    """Memory over time, what the peak consists of, and speed."""
    made = [
        report.Picture(
            f"{prefix}memory-over-time",
            "Memory over time",
            "Each setting in a process of its own, on one scale. Grey at the bottom: pages of mapped files,"
            " such as weights. Behind: the phases. The eviction runs layer by layer inside the last batch of"
            " the prompt; the mark is where it is done.",
            plots.memory_over_time(settings),
        )
    ]
    if any(setting["status"] == "ok" for setting in settings):
        made += [
            report.Picture(
                f"{prefix}memory-peak",
                "What the peak consists of",
                "K and V and compute as llama.cpp allocated them, the rest as measured.",
                plots.memory_bars(settings),
            ),
            report.Picture(
                f"{prefix}speed",
                "Speed",
                "Longer is faster. Decoding is the median of the tokens.",
                plots.speed_bars(settings),
            ),
        ]
    return made


def write(folder: Path, content: dict[str, Any]) -> None:
    """Write profile.json, profile.html and the pictures into the folder."""
    model, settings = content["model"], content["settings"]
    done = [setting for setting in settings if setting["status"] == "ok"]
    n_prompt = done[0]["n_prompt"]
    report.write(
        folder,
        "profile",
        content,
        title=f"{model['name']}: a prompt of {n_prompt} positions",
        lead=f"{machine_in_words(content['machine'])}. Head scores: {content['scores']}.",
        cards=_cards(done),
        tables=[table(settings)],
        pictures=pictures(settings),
        notes=[
            *first_tokens(settings),
            READING_FIRST_TOKEN,
            READING_MEMORY,
            "One process a setting, one after the other, the same prompt, greedy decoding. Time on a machine"
            " that also does other work is noisy; bench measures speed by turns.",
        ],
    )


def _cards(done: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The evicted setting of the largest budget against the full cache at its better setting."""
    full = [setting for setting in done if setting["budget"] is None and setting["cache_type"] == "f16"]
    evicted = [setting for setting in done if setting["budget"] is not None]
    if not full or not evicted:
        return []
    best = max(full, key=lambda setting: setting["decode_tps"])
    least = min(full, key=lambda setting: setting["rss_peak"])
    one = max(evicted, key=lambda setting: setting["budget"])
    kv, memory = one["kv"], one["rss_peak"] - least["rss_peak"]
    return [
        (
            f"{kv['bytes_now'] / kv['bytes_full']:.0%}",
            f"of the K and V of a full cache remain at budget {one['budget']}",
        ),
        (f"{one['decode_tps'] / best['decode_tps']:.2f}x", f"as fast as {best['name']} at decoding"),
        (
            f"{memory / 2**20:+,.0f} MiB".replace("-", "\u2212"),
            f"peak memory against {least['name']}",
        ),
        (
            f"{one['prompt_tps'] / max(s['prompt_tps'] for s in full):.2f}x",
            "as fast as the full cache at reading the prompt",
        ),
    ]


def _mib(n_bytes: int | None) -> str:
    return "" if n_bytes is None else f"{n_bytes / 2**20:,.1f}"
