"""Plots of profile and bench, narrow enough for a small screen."""

import io
import itertools
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sparsemm_edge.profiling.bench import Length
from sparsemm_edge.profiling.figures import Breakdown, SettingFigures
from sparsemm_edge.profiling.runs import Phase
from sparsemm_edge.reports import new_figure

_MIB = 2**20
_WIDTH = 4.8  # inches
_FULL, _EVICTED, _LIMIT, _INK = "#8a97a3", "#c4472f", "#2f6f8f", "#2b2f33"

# what memory is for, from the bottom of a bar to its top
_PARTS = {
    "weights in the file": "#d5dde4",
    "weights, copied": "#aebbc6",
    "image encoder": "#e3bf6c",
    "compute": "#86b99a",
    "K and V": _EVICTED,
    "other": "#ececec",
}
_PHASES = {
    "load": "#eef1f4",
    "context": "#dfe5ea",
    "image": "#f8ebcd",
    "prompt": "#e4f0e8",
    "decode": "#fbe3dd",
}


def memory_over_time(settings: Sequence[SettingFigures]) -> Figure:
    """Resident memory of each setting's process over its phases; one row each, on the same axes."""
    figure = new_figure(_WIDTH, 0.7 + 1.15 * len(settings))
    rows = figure.subplots(len(settings), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    top = max(1, *(setting.rss_peak / _MIB for setting in settings)) * 1.32
    end = max((setting.memory["t"] or [0])[-1] for setting in settings)
    for axes, setting in zip(rows, settings, strict=True):
        memory = setting.memory
        t, rss = memory["t"], [value / _MIB for value in memory["rss"]]
        for phase in setting.phases:
            _draw_phase(axes, phase, end, top)
        if "file" in memory:
            mapped = [value / _MIB for value in memory["file"]]
            axes.fill_between(t, mapped, color=_PARTS["weights in the file"], lw=0)
            axes.fill_between(t, mapped, rss, color=_color(setting.setting.evicts), alpha=0.55, lw=0)
        axes.plot(t, rss, color=_INK, lw=0.9)
        peak = setting.rss_peak / _MIB
        ended = "" if setting.status == "ok" else f" ({setting.status})"
        axes.set_title(
            f"{setting.name}: peak {peak:,.0f} MiB{ended}", fontsize=9, loc="left", pad=3, color=_INK
        )
        axes.set_ylim(0, top)
        axes.set_xlim(0, end or 1)
        axes.yaxis.set_major_locator(MaxNLocator(3))
        axes.set_ylabel("MiB")
        _plain(axes)
    rows[-1].set_xlabel("seconds since loading began")
    return figure


def memory_bars(settings: Sequence[SettingFigures]) -> Figure:
    """The parts of each setting's peak resident size, as stacked bars."""
    done = [(setting, setting.done) for setting in settings if setting.done is not None]
    figure = new_figure(_WIDTH, 1.25 + 0.42 * len(done))
    axes = figure.add_subplot()
    names = [setting.name for setting, _ in done]
    left = [0.0] * len(done)
    parts = [memory_parts(setting, measured.breakdown) for setting, measured in done]
    for part, color in _PARTS.items():
        sizes = [of[part] / _MIB for of in parts]
        if max(sizes) > 0:
            axes.barh(names, sizes, left=left, color=color, label=part, height=0.68)
            left = [base + size for base, size in zip(left, sizes, strict=True)]
    _finish_bars(axes, left, [f"{total:,.0f}" for total in left], room=1.14)
    axes.set_xlabel("MiB at the peak, buffers as allocated")
    figure.legend(loc="outside upper left", ncols=3, fontsize=8.5, frameon=False, handlelength=1)
    return figure


def over_weights_bars(lengths: Sequence[Length]) -> Figure:
    """Memory beyond the weights: one bar per prompt length and setting, at the peak and after the prompt.

    What was not measured is left out.
    """
    bars = []
    for length in lengths:
        measured = [each for each in length.settings if each.peak_over_weights is not None and each.done]
        for index, figures in enumerate(measured):
            name = figures.name if index else f"{length.n_prompt} positions\n{figures.name}"
            bars.append((name, figures))
    figure = new_figure(_WIDTH, 1.0 + 0.42 * len(bars))
    axes = figure.add_subplot()
    peaks = [(figures.peak_over_weights or 0) / _MIB for _, figures in bars]
    afters = [max(0, figures.after_over_weights or 0) / _MIB for _, figures in bars]
    colors = [_color(figures.setting.evicts) for _, figures in bars]
    axes.barh(range(len(bars)), peaks, color=colors, height=0.68)
    axes.barh(range(len(bars)), afters, color="white", alpha=0.45, height=0.34, lw=0)
    axes.set_yticks(range(len(bars)), [name for name, _ in bars])
    labels = [f"{peak:,.0f}; {after:,.0f}" for peak, after in zip(peaks, afters, strict=True)]
    _finish_bars(axes, peaks, labels, room=1.25)
    axes.set_xlabel("MiB over the weights, at the peak; after the prompt")
    return figure


def memory_parts(setting: SettingFigures, sizes: Breakdown) -> dict[str, int]:
    """A setting's peak resident size by purpose, in bytes; `other` is the unexplained rest."""
    parts = {
        # the pages of the file that were in memory, and those of libraries
        "weights in the file": setting.file_peak or sizes.weights_mapped,
        "weights, copied": sizes.weights_copied,
        "image encoder": sizes.vision_weights + sizes.vision_compute,
        "compute": sizes.compute + sizes.hidden + sizes.output,
        "K and V": sizes.kv_peak,
    }
    return parts | {"other": max(0, setting.rss_peak - sum(parts.values()))}


def speed_bars(settings: Sequence[SettingFigures]) -> Figure:
    """Tokens per second for the prompt and for decoding."""
    done = [(setting, setting.done) for setting in settings if setting.done is not None]
    figure = new_figure(_WIDTH, 0.95 + 0.34 * len(done))
    names = [setting.name for setting, _ in done]
    colors = [_color(setting.setting.evicts) for setting, _ in done]
    for axes, title in zip(figure.subplots(1, 2, sharey=True), ("prompt", "decode"), strict=True):
        values = [each.prompt_tps if title == "prompt" else each.decode_tps for _, each in done]
        axes.barh(names, values, color=colors, height=0.68)
        _finish_bars(axes, values, [_short(value) for value in values], room=1.25)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_title(title, fontsize=9, loc="left", color=_INK)
        axes.set_xlabel("tokens/s")
    return figure


def decode_over_length(lengths: Sequence[Length]) -> Figure:
    """Decoding speed over prompt length: a line for each setting, and the empty cache's."""
    figure = new_figure(_WIDTH, 3.0)
    axes = figure.add_subplot()
    evicts = {
        figures.name: figures.setting.evicts
        for length in lengths
        for figures in length.settings
        if figures.name in length.decode_tps
    }
    styles, marks = itertools.cycle(("-", "--", ":", "-.")), itertools.cycle("osD^v<>p*h")
    for name, evicting in evicts.items():
        points = [(of.n_prompt, of.decode_tps[name]) for of in lengths if name in of.decode_tps]
        axes.plot(
            *zip(*points, strict=True),
            marker=next(marks),
            ms=5,
            lw=1.6,
            ls=next(styles),
            color=_color(evicting),
            label=name,
        )
    limits = [of.depth_0_tps or 0.0 for of in lengths]
    axes.plot([of.n_prompt for of in lengths], limits, color=_LIMIT, lw=1.4, label="empty cache")
    axes.set_ylim(0, None)
    axes.set_xticks([of.n_prompt for of in lengths])
    axes.set_xlabel("prompt, positions")
    axes.set_ylabel("tokens/s")
    _plain(axes)
    figure.legend(loc="outside upper left", ncols=2, fontsize=8.5, frameon=False)
    return figure


def decode_bars(length: Length) -> Figure:
    """Decoding speed by setting, and with an empty cache as a line."""
    names, values = list(length.decode_tps), list(length.decode_tps.values())
    limit = length.depth_0_tps or 0.0
    figure = new_figure(_WIDTH, 1.0 + 0.34 * len(names))
    axes = figure.add_subplot()
    colors = [_color(each.setting.evicts) for each in length.settings if each.name in length.decode_tps]
    axes.barh(names, values, color=colors, height=0.68)
    _finish_bars(axes, values, [_short(value) for value in values], room=1.12)
    axes.axvline(limit, color=_LIMIT, lw=1.4, ls=(0, (4, 2)))
    axes.text(limit, -0.6, f"empty cache {_short(limit)} ", ha="right", va="bottom", fontsize=8, color=_LIMIT)
    axes.set_xlim(0, max([*values, limit]) * 1.12)
    axes.set_ylim(len(names) - 0.5, -1.1)
    axes.set_xlabel("tokens/s")
    return figure


def svg(figure: Figure) -> str:
    """The figure as SVG text, the same for the same figure."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _finish_bars(axes: Axes, lengths: Sequence[float], labels: Sequence[str], room: float) -> None:
    """Label horizontal bars at their ends, with the first at the top."""
    for place, (length, label) in enumerate(zip(lengths, labels, strict=True)):
        axes.text(length, place, f" {label}", va="center", fontsize=8.5, color=_INK)
    axes.set_xlim(0, max(lengths) * room)
    axes.yaxis.set_inverted(True)
    _plain(axes)
    axes.tick_params(axis="y", length=0, labelcolor=_INK)


def _plain(axes: Axes) -> None:
    """No frame, but the axes themselves."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b9c1c8")
    axes.tick_params(colors="#5c6670", labelsize=8.5)
    axes.xaxis.label.set(color="#5c6670", fontsize=8.5)
    axes.yaxis.label.set(color="#5c6670", fontsize=8.5)


def _draw_phase(axes: Axes, phase: Phase, end: float, top: float) -> None:
    start, stop = phase.start, phase.end
    if phase.name == "eviction":
        axes.axvline(start, color=_EVICTED, lw=1)
        axes.text(start, top * 0.82, "evicted ", fontsize=7.5, color=_EVICTED, ha="right", va="top")
        return
    axes.axvspan(start, stop, color=_PHASES[phase.name], lw=0, zorder=0)
    if stop - start > 0.09 * end:
        middle = (start + stop) / 2
        axes.text(middle, top * 0.97, phase.name, fontsize=7.5, color="#5c6670", ha="center", va="top")


def _color(evicts: bool) -> str:
    return _EVICTED if evicts else _FULL
