"""An allocation fails once: the error says so, and the next prompt is answered rightly."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.models import sample_image, test_model
from helpers.paths import HELPERS

NEVER_EVICTS = 600  # positions: more than the prompts have


@pytest.mark.parametrize(
    ("budget", "which", "allocates"),
    [
        pytest.param(24, 0, "heads_hidden", id="first prompt"),
        pytest.param(24, 1, "cache_heads_idxs", id="second prompt, after an eviction"),
        pytest.param(NEVER_EVICTS, 1, "cache_heads_k", id="second prompt, the cache grows"),
    ],
)
def test_a_failed_allocation_is_said_and_the_next_prompt_is_answered(
    budget: int, which: int, allocates: str, preloaded_alloc: Path, tmp_path: Path
) -> None:
    """Each allocation of a ggml buffer in turn."""
    failed = failures(preloaded_alloc, tmp_path, budget, which, "buffer")
    # some are tried again
    errors = [case["error"] for case in failed if case["error"] is not None]
    assert len(errors) > 10 and all("failed to allocate" in error for error in errors), errors
    assert not any("positions is full" in error for error in errors)
    assert any(allocates in error for error in errors)


@pytest.mark.parametrize("which", [0, 1], ids=["first prompt", "second prompt"])
def test_what_cpp_throws_does_not_leave_llama_decode(
    which: int, preloaded_alloc: Path, tmp_path: Path
) -> None:
    failed = failures(preloaded_alloc, tmp_path, 24, which, "new")
    # some are tried again
    errors = [case["error"] for case in failed if case["error"] is not None]
    assert len(errors) > 20 and all("out of memory" in error for error in errors), errors


def failures(preload: Path, tmp_path: Path, budget: int, which: int, kind: str) -> list[dict[str, Any]]:
    """One for each allocation that failed; what was asked again was answered rightly."""
    files = test_model("llava")
    images = [tmp_path / "one.png", tmp_path / "two.png"]
    for seed, path in enumerate(images):
        sample_image(files.image_size, seed).save(path)
    arguments = [files.gguf("f16"), files.mmproj("f16"), *images, budget, which, kind]
    done = subprocess.run(
        [sys.executable, HELPERS / "out_of_memory_worker.py", *map(str, arguments)],
        env=os.environ | {"LD_PRELOAD": str(preload)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *failed, last = map(json.loads, done.stdout.splitlines())
    assert last == {"done": len(failed)}
    assert all(case["again"] for case in failed)
    if which:  # nothing but the failed prompt is forgotten
        assert not any(case["lost"] for case in failed)
    return failed
