"""Long commands stopped in the middle: no process goes on, and no file is half-written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from helpers.interrupt import HOW, stop
from sparsemm_edge.profiling import shapes

SMALL = replace(shapes.SHAPES["llava-1.5-7b"], n_layer=2, n_embd=1024, n_ff=64)

# SIGKILL cannot be caught: files may stay then, processes not
undone = pytest.mark.parametrize("how", [how for how in HOW if how != "SIGKILL"])
every_way = pytest.mark.parametrize("how", HOW)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes.model_of_shape("small", SMALL, tmp_path_factory.mktemp("models"))


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    """The command's folder of temporary files."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    return folder


def loaded(n: int) -> Callable[[list[psutil.Process]], bool]:
    """Whether n child processes have their model."""
    return lambda children: sum(child.memory_info().rss > 60 * 2**20 for child in children) >= n


@every_way
@pytest.mark.parametrize("command", ["bench", "profile"])
def test_a_worker_ends_with_the_command(
    how: str, command: str, small: Path, models: Callable[[str], Any], tmp_path: Path, temporary: Path
) -> None:
    long = {"bench": [small, "--n-prompt", 2000], "profile": [models("llava").gguf(), "-n", 3000]}[command]
    arguments = [command, "-m", *long, "--threads", 1, "--out", tmp_path / "report"]

    assert stop(how, arguments, loaded(1), folder=tmp_path) == (HOW[how], [])

    assert list((tmp_path / "report").iterdir()) == []
    assert how == "SIGKILL" or list(temporary.iterdir()) == []


@undone
def test_a_shape_that_is_not_made_to_its_end_is_not_there(how: str, tmp_path: Path, temporary: Path) -> None:
    cache = tmp_path / "cache" / "sparsemm-edge" / "bench-models"
    arguments = ["bench", "--shape", "llava-1.5-7b", "--layers", 4, "--out", tmp_path / "report"]

    def half_written(_: list[psutil.Process]) -> bool:
        return any(path.stat().st_size > 2**20 for path in cache.glob(".*.part"))

    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert stop(how, arguments, half_written, folder=tmp_path, environment=environment) == (HOW[how], [])

    assert list(cache.iterdir()) == list(temporary.iterdir()) == []


@every_way
def test_the_processes_of_eval_end_with_it_and_what_is_done_is_saved(
    how: str, models: Callable[[str], Any], tmp_path: Path, temporary: Path
) -> None:
    from helpers.models import sample_image

    files, images, out = models("llava"), tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for index in range(30):
        sample_image(files.image_size, seed=index).save(images / f"{index}.png")
    arguments = ["eval", "-m", files.gguf(), "--mmproj", files.mmproj(), "--fidelity-only", images]
    arguments += ["--policies", "uniform", "--window", 8, "--budgets", "20,40", "-n", 300]
    arguments += ["--jobs", 2, "--out", out]

    def both_at_work(children: list[psutil.Process]) -> bool:
        results = out / "results.jsonl"
        return loaded(2)(children) and len(results.read_text().splitlines()) > 1

    assert stop(how, arguments, both_at_work, folder=tmp_path) == (HOW[how], [])

    assert [path.name for path in out.iterdir()] == ["results.jsonl"]
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert 1 < len(lines) < 1 + 30 * 3 and all(line["answer"] for line in lines[1:])
    assert how == "SIGKILL" or list(temporary.iterdir()) == []


@every_way
def test_the_processes_of_score_end_with_it(how: str, tmp_path: Path, temporary: Path) -> None:
    from helpers.models import test_model

    scores = tmp_path / "out" / "scores.json"
    scores.parent.mkdir()
    arguments = ["score", test_model("llava").hf, "--pages", 500, "--page-size", "168x168", "--jobs", 2]

    assert stop(how, [*arguments, "--out", scores], loaded(2), folder=tmp_path) == (HOW[how], [])

    assert not scores.exists()
