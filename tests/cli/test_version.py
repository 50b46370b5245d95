"""What the command line says of itself: versions, completion, options that commands share."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import typer

from helpers.command_line import CommandLine
from helpers.paths import ROOT
from sparsemm_edge import __version__, cli
from sparsemm_edge.runtime import library
from sparsemm_edge.versions import LLAMA_CPP_COMMIT, LLAMA_CPP_PYTHON


def test_the_version_names_package_llama_cpp_and_patches(
    sparsemm: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin = json.loads((ROOT / "patches" / "pin.json").read_text())
    assert (pin["version"], pin["llama_cpp_commit"]) == (LLAMA_CPP_PYTHON, LLAMA_CPP_COMMIT)
    done = sparsemm("--version")
    first, second = done.out.splitlines()
    assert (done.status, first) == (0, f"sparsemm-edge {__version__}")
    assert second.startswith(f"llama.cpp {LLAMA_CPP_COMMIT}, patched, in llama-cpp-python {LLAMA_CPP_PYTHON}")

    monkeypatch.setattr(library.llama, "_lib", object())
    done = sparsemm("--version")
    assert done.status == 0 and "is not the patched one" in done.out
    monkeypatch.setattr("llama_cpp.__version__", "0.9.9")
    assert f"llama.cpp not {LLAMA_CPP_COMMIT}" in sparsemm("--version").out


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("sparsemm-edge gen", {"generate"}),
        ("sparsemm-edge s", {"score", "scores", "serve"}),
        ("sparsemm-edge generate --json", {"--json", "--json-schema"}),
    ],
)
def test_the_shell_completes_commands_and_options(words: str, completed: set[str]) -> None:
    program = "import sys; sys.argv = ['sparsemm-edge']; from sparsemm_edge.cli import main; main()"
    environment = {
        "_SPARSEMM_EDGE_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | environment, capture_output=True, text=True
    )
    assert set(done.stdout.split()) == completed


def options(command: str) -> set[str]:
    """The names of a command's parameters."""
    group = typer.main.get_command(cli.app)
    found = group.commands[command]  # type: ignore[attr-defined]
    return {parameter.name for parameter in found.params}


# what says how an answer is sampled, how long it is, or where a conversation comes from and goes
OF_ANSWERS = {"temp", "seed", "top_k", "top_p", "min_p", "repeat_penalty", "presence_penalty"}
OF_ANSWERS |= {"frequency_penalty", "stop", "json_schema", "grammar_file", "n_predict", "n_ctx"}
OF_ANSWERS |= {"save_session", "load_session", "as_json"}
# for images that come again
OF_REPEATS = {"image_cache", "image_cache_size", "reuse_evicted"}
# profile compares budgets, cache types and the full cache by itself, in processes that have no terminal
COMPARED = {"budget", "evict", "cache_type_k", "cache_type_v", "verbose"}


def test_commands_take_what_generate_takes() -> None:
    generate = options("generate")
    assert generate - OF_ANSWERS - OF_REPEATS <= options("kept")
    assert generate - OF_ANSWERS - OF_REPEATS - COMPARED <= options("profile")
    assert generate - {"prompt", "file", "save_session", "load_session"} <= options("chat")
    assert generate - {"prompt", "file", "image", "save_session", "load_session", "as_json"} <= options(
        "serve"
    )
