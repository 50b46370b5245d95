"""One page, read twice: with the full cache and with eviction, in a process each so that peaks compare."""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sparsemm_edge.convert import convert
from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.gguf_metadata import read_metadata, read_model_shape
from sparsemm_edge.plot import save_head_map
from sparsemm_edge.scores import HeadScores

PAGE_LINES = ("SPARSE MM", "a few heads", "look at the", "page, others", "may forget")
PROMPT = "What does the page say?"
N_PREDICT = 48

_STAND_IN = "llava-gqa"
_STAND_IN_SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "make_test_models.py"


@dataclass(frozen=True)
class DemoModel:
    """What the demo reads with.

    Attributes:
        model, mmproj: GGUF files of the text model and its image encoder.
        scores: head scores of the model.
        image_size: side of the square image that the encoder takes as it is, in pixels.
        budget, window: of the eviction, in positions.
        note: what a reader of the answers has to know.
    """

    model: Path
    mmproj: Path
    scores: Path
    image_size: int
    budget: int
    window: int
    note: str


def run(out: Path) -> dict[str, Any]:
    """Render the page, convert the model and read the page both ways.

    Args:
        out: folder for page.png, the converted model and head-map.png; made if it is not there.

    Returns:
        `note`, the paths `page`, `model` and `head_map`, and under `full` and `evicted` what
        `generate --json` prints.

    Raises:
        SparseMMError: the demo model is missing or cannot be made, or a part of the pipeline fails.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SparseMMError(f"cannot make the folder {out}: {error.strerror}") from error
    demo = stand_in(out)
    page, head_map = out / "page.png", out / "head-map.png"
    render_page(demo.image_size).save(page)
    converted = convert(
        demo.model,
        demo.scores,
        out / "demo.sparsemm.gguf",
        budget=demo.budget,
        window=demo.window,
        force=True,
    ).path

    command = ["-m", str(converted), "--mmproj", str(demo.mmproj), "--image", str(page), "-p", PROMPT]
    # one thread: a token of a model this small takes less time than threads take to meet
    command += ["--n-predict", str(N_PREDICT), "--threads", "1"]
    report = {
        "note": demo.note,
        "page": str(page),
        "model": str(converted),
        "head_map": str(head_map),
        "full": _generate([*command, "--no-evict"]),
        "evicted": _generate(command),
    }
    metadata = read_metadata(converted)
    assert metadata is not None
    save_head_map(metadata.head_budgets, head_map, title=f"head budgets, mean {metadata.budget} positions")
    return report


def show(report: dict[str, Any]) -> None:
    """Print both answers and the table of what they took."""
    from rich.console import Console
    from rich.table import Table

    full, evicted = report["full"], report["evicted"]
    console = Console()
    console.print(f"page: {report['page']}, asked: {PROMPT}", highlight=False)
    console.print(report["note"], style="yellow", highlight=False)
    for name, figures in (("full cache", full), ("evicted", evicted)):
        console.print(f"\n{name}:", style="bold")
        console.print(figures["text"].strip() or "(nothing)", markup=False, highlight=False)

    table = Table(title=f"\nprompt of {full['n_prompt']} positions", title_justify="left")
    table.add_column("")
    for column in ("full cache", "evicted"):
        table.add_column(column, justify="right")
    rows = {
        "K and V for these positions": [
            _kib(full["kv"]["bytes_full"]),
            f"{_kib(evicted['kv']['bytes_now'])} ({_share(evicted)})",
        ],
        "K and V allocated": [_kib(figures["kv"]["bytes_now"]) for figures in (full, evicted)],
        "K and V at peak": [_kib(figures["kv"]["bytes_peak"]) for figures in (full, evicted)],
        "positions kept per head": [
            f"{figures['kv']['positions_kept_mean']:.0f}" for figures in (full, evicted)
        ],
        "prompt": [f"{figures['timings']['prompt_ms']:.0f} ms" for figures in (full, evicted)],
        "per token": [_per_token(figures) for figures in (full, evicted)],
        "peak memory of the process": [
            f"{figures['rss_peak_bytes'] / 2**20:.0f} MiB" for figures in (full, evicted)
        ],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    console.print(table)
    console.print(f"head map: {report['head_map']}", highlight=False)


def render_page(size: int) -> Image.Image:
    """A white page with PAGE_LINES, size x size pixels."""
    page = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(page)
    height = size / (len(PAGE_LINES) + 1)
    font = ImageFont.load_default(height * 0.72)
    for index, line in enumerate(PAGE_LINES):
        draw.text((height / 2, height * (index + 0.5)), line, fill="black", font=font)
    return page


def stand_in(out: Path) -> DemoModel:
    """A test model in place of the trained demo model: real files of every kind, random weights.

    Raises:
        SparseMMError: it is not there yet and cannot be made here.
    """
    if not _STAND_IN_SCRIPT.is_file():
        raise SparseMMError("the demo's stand-in model is made in a checkout: run `make demo` there")
    # another script makes another model
    key = hashlib.sha256(_STAND_IN_SCRIPT.read_bytes()).hexdigest()[:12]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = home / "sparsemm-edge" / "demo" / key
    model, mmproj = (cache / _STAND_IN / f"{name}-f16.gguf" for name in ("model", "mmproj"))
    if not (model.is_file() and mmproj.is_file()):
        if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
            raise SparseMMError("the demo's stand-in model is made with torch: run `make demo`")
        print("making the stand-in model (once)", file=sys.stderr)
        made = subprocess.run([sys.executable, str(_STAND_IN_SCRIPT), str(cache), _STAND_IN], text=True)
        if made.returncode != 0:
            raise SparseMMError(f"{_STAND_IN_SCRIPT.name} could not make the stand-in model, see above")
    shape = read_model_shape(model)
    scores = out / "head-scores.json"
    HeadScores(
        model=_STAND_IN,
        scores=np.random.default_rng(0).gamma(0.3, size=(shape.n_layer, shape.n_head)),
        n_head_kv=shape.n_head_kv,
        provenance={"dataset": "none: random scores for a model of random weights"},
    ).save(scores)
    return DemoModel(
        model=model,
        mmproj=mmproj,
        scores=scores,
        image_size=168,
        budget=48,
        window=16,
        note="The trained demo model does not exist yet: weights are random, and so are the words below.",
    )


def _generate(arguments: list[str]) -> dict[str, Any]:
    """What `generate --json` prints, from a process of its own."""
    command = [sys.executable, "-m", "sparsemm_edge.cli", "generate", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise SparseMMError(lines[-1].removeprefix("error: ") if lines else f"{command} failed")
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def _kib(n_bytes: int) -> str:
    return f"{n_bytes / 2**10:.0f} KiB"


def _share(figures: dict[str, Any]) -> str:
    return f"{figures['kv']['bytes_now'] / figures['kv']['bytes_full']:.0%}"


def _per_token(figures: dict[str, Any]) -> str:
    per_token = figures["timings"]["decode_ms_per_token"]
    return "-" if per_token is None else f"{per_token:.2f} ms"
