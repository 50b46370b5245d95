"""The output of `profile`: the table on the screen and the report folder."""

from collections.abc import Sequence
from pathlib import Path

from sparsemm_edge.profiling.figures import SettingFigures, full_f16_of
from sparsemm_edge.profiling.jobs import CacheSetting
from sparsemm_edge.profiling.machine import in_words
from sparsemm_edge.profiling.profile import Profile
from sparsemm_edge.reports import html, profiling_plots

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


def screen_table(settings: Sequence[SettingFigures]) -> html.Table:
    """The columns of table() that fit a terminal."""
    whole = table(settings)
    picked = (0, 1, 2, 3, 6, 7)
    return html.Table(whole.title, _SCREEN, [[row[index] for index in picked] for row in whole.rows])


def table(settings: Sequence[SettingFigures]) -> html.Table:
    """One row per setting, also for failed ones."""
    rows = []
    for setting in settings:
        kv, speed = [setting.status, ""], ["", "", "", ""]
        if (done := setting.done) is not None:
            ms = done.decode_ms
            kv = [_mib(done.kv.bytes_now), _mib(done.kv.bytes_peak)]
            speed = [_mib(done.breakdown.compute), f"{done.prompt_tps:.1f}", f"{done.decode_tps:.1f}"]
            speed.append(f"{ms.median:.2f} ({ms.low:.2f} to {ms.high:.2f})")
        rows.append([setting.name, *kv, _mib(setting.rss_peak), _mib(setting.anon_peak), *speed])
    return html.Table("Every setting", _COLUMNS, rows, [setting.setting.evicts for setting in settings])


def first_tokens(settings: Sequence[SettingFigures]) -> list[str]:
    """The parts of the time to the first token: one line for the full f16 cache and each evicted one."""
    return [
        f"{setting.name}: {done.first_token.in_words(done.read_bytes_per_s)}"
        for setting in settings
        if (done := setting.done) is not None
        and (setting.setting.evicts or setting.name == CacheSetting().name)
    ]


def pictures(settings: Sequence[SettingFigures], prefix: str = "") -> list[html.Picture]:
    """Memory over time, what the peak consists of, and speed; at least one setting is done."""
    return [
        html.Picture(
            f"{prefix}memory-over-time",
            "Memory over time",
            "Each setting in its own process, on one scale. Grey at the bottom: pages of mapped files,"
            " such as weights. Background: the phases. The eviction runs layer by layer inside the last batch"
            " of the prompt; the mark is where it is done.",
            profiling_plots.memory_over_time(settings),
        ),
        html.Picture(
            f"{prefix}memory-peak",
            "What the peak consists of",
            "K and V and compute as llama.cpp allocated them, the rest as measured.",
            profiling_plots.memory_bars(settings),
        ),
        html.Picture(
            f"{prefix}speed",
            "Speed",
            "Longer is faster. Decoding is the median of the tokens.",
            profiling_plots.speed_bars(settings),
        ),
    ]


def write(folder: Path, found: Profile) -> None:
    """Write profile.json, profile.html and the pictures into the folder."""
    settings = found.settings
    n_prompt = next(setting.done.n_prompt for setting in settings if setting.done)
    html.write(
        folder,
        "profile",
        found.to_dict(),
        title=f"{found.model.name}: a prompt of {n_prompt} positions",
        lead=f"{in_words(found.machine)}. Head scores: {found.scores}.",
        cards=_cards(settings),
        tables=[table(settings)],
        pictures=pictures(settings),
        notes=[
            *first_tokens(settings),
            READING_FIRST_TOKEN,
            READING_MEMORY,
            "One process per setting, one after the other, the same prompt, greedy decoding. Time on a"
            " machine that also does other work is noisy; bench measures speed interleaved.",
        ],
    )


def _cards(settings: Sequence[SettingFigures]) -> list[tuple[str, str]]:
    """The evicted setting with the largest budget, against the faster full setting."""
    full, evicted = (
        [(each, each.done) for each in group if each.done is not None]
        for group in (full_f16_of(settings), [each for each in settings if each.setting.evicts])
    )
    if not full or not evicted:
        return []
    best, best_done = max(full, key=lambda each: each[1].decode_tps)
    least, _ = min(full, key=lambda each: each[0].rss_peak)
    one, one_done = max(evicted, key=lambda each: each[0].setting.budget or 0)
    kv, memory = one_done.kv, one.rss_peak - least.rss_peak
    reading = one_done.prompt_tps / max(done.prompt_tps for _, done in full)
    remain = f"of the K and V of a full cache remain at budget {one.setting.budget}"
    return [
        (f"{kv.bytes_now / kv.bytes_full:.0%}", remain),
        (f"{one_done.decode_tps / best_done.decode_tps:.2f}x", f"as fast as {best.name} at decoding"),
        (f"{memory / 2**20:+,.0f} MiB".replace("-", "\u2212"), f"peak memory against {least.name}"),
        (f"{reading:.2f}x", "as fast as the full cache at reading the prompt"),
    ]


def _mib(n_bytes: int | None) -> str:
    return "" if n_bytes is None else f"{n_bytes / 2**20:,.1f}"
