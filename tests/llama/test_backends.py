"""On every backend the same prompts keep the same positions and give the same tokens.

The patch goes through ggml's backend API alone: what holds for a device behind the RPC backend, whose memory
this process cannot touch, can be expected of Metal and CUDA. See docs/backends.md.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from helpers.builds import environment, tools
from helpers.models import NAMES, sample_image, test_model
from helpers.paths import HELPERS, ROOT
from sparsemm_edge.budgets import BudgetSpec
from sparsemm_edge.gguf_header import read_header
from sparsemm_edge.gguf_metadata import model_shape

N_PREDICT = 24
LONG = "The quick brown fox jumps over the lazy dog; 3 apples and 14 pears cost $7.50, no? " * 2
QUESTION = "What is written here?"

# context options: the prompt as one ubatch, in several ubatches, or quantised
WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"n_ubatch": 64},
    {"cache_type_k": "q8_0", "cache_type_v": "q8_0"},
    {"cache_type_k": "q4_0", "cache_type_v": "q4_0"},
)
# the paper's vote without a slot, and the default
VOTES: tuple[dict[str, Any], ...] = (
    {"vote": "snapkv", "residual": False},
    {"vote": "mixkv", "residual": True},
)


@pytest.fixture(scope="module")
def rpc_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a ggml-rpc-server on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("rpc") / "server.log"
    with log.open("wb") as file:
        command = [str(tools() / "ggml-rpc-server"), "-H", "127.0.0.1", "-p", str(port), "-t", "1"]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment())
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
        yield f"127.0.0.1:{port}"
        assert process.poll() is None, log.read_text()[-2000:]
    finally:
        process.terminate()
        process.wait()


def job(name: str, image: Path) -> dict[str, Any]:
    """Prompts to one test model: a text and an image, each read in every way, with budgets that differ."""
    files = test_model(name)
    shape = model_shape(read_header(files.gguf()))
    prompts = []
    kinds: list[tuple[str, list[str]]] = [(LONG, []), (QUESTION, [str(image)])]
    for seed, (question, images) in enumerate(kinds):
        for options, votes in itertools.product(WAYS, VOTES):
            spec = BudgetSpec("random", 48, 16, residual=False, seed=seed)
            table = spec.table(None, shape.kv_heads)
            prompt = {"question": question, "images": images, "table": table.tolist(), "window": 16}
            prompts.append(prompt | votes | {"options": options})
    models = {"model": str(files.gguf()), "mmproj": str(files.mmproj())}
    return {"rpc": None, "n_predict": N_PREDICT, "prompts": prompts, **models}


def run(libraries: Path, work: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """What helpers/backend_worker.py answers, and llama.cpp's log."""
    env = environment(libraries)
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(HELPERS / "backend_worker.py")],
        input=json.dumps(work | {"library": str(libraries)}),
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout), done.stderr


@cache
def on_cpu(name: str, image: Path) -> dict[str, Any]:
    found, _ = run(tools(), job(name, image))
    assert found["devices"] == ["CPU"]
    return found


@pytest.fixture
def image(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = request.getfixturevalue("name")
    path: Path = tmp_path_factory.getbasetemp() / f"{name}.png"
    sample_image(test_model(name).image_size, 7).save(path)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_a_device_behind_rpc_keeps_what_the_cpu_keeps_and_answers_alike(
    name: str, image: Path, rpc_server: str
) -> None:
    """All layers, their caches and the image encoder on the server, whose device is a CPU: bit for bit."""
    found, log = run(tools(), job(name, image) | {"rpc": rpc_server})
    assert found["devices"] == ["CPU", "RPC0"]
    n_layer = model_shape(read_header(test_model(name).gguf())).n_layer
    assert f"offloaded {n_layer + 1}/{n_layer + 1} layers to GPU" in log
    assert f"CLIP using RPC0[{rpc_server}] backend" in log
    assert re.search(rf"RPC0\[{rpc_server}\] KV buffer size", log) and "CPU KV buffer size" not in log
    assert found["answers"] == on_cpu(name, image)["answers"]
