"""The command line, whatever it is given: text that is none, numbers out of range, a full disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import typer

from helpers.command_line import CommandLine
from sparsemm_edge import cli, resources
from sparsemm_edge.defaults import RANGES
from sparsemm_edge.demo import DemoModel
from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.output import whole_numbers
from sparsemm_edge.resources import machine_memory, usable_cores
from sparsemm_edge.runtime import Conversation, Eviction, VisionModel

CLI = (sys.executable, "-m", "sparsemm_edge.cli")
FILES = DemoModel()
MODEL = ("-m", str(FILES.model), "--threads", "1")


def run(
    *arguments: str | bytes, encoding: str = "utf-8", **options: Any
) -> subprocess.CompletedProcess[bytes]:
    """The command line in a process of its own, which reads and prints in this encoding."""
    environment = os.environ | {"PYTHONIOENCODING": encoding, "COLUMNS": "200"}
    options = {"stdout": subprocess.PIPE, "stdin": subprocess.DEVNULL} | options
    return subprocess.run([*CLI, *arguments], stderr=subprocess.PIPE, env=environment, **options)


def refused(done: subprocess.CompletedProcess[bytes]) -> str:
    """The one line of a refusal."""
    (line,) = done.stderr.decode("utf-8", "replace").splitlines()
    assert done.returncode == 2 and line.startswith("error: "), done
    return line


@pytest.mark.parametrize("command", [[], ["generate"], ["convert"], ["eval"]])
def test_help_imports_nothing_that_takes_long(command: list[str]) -> None:
    heavy = {"numpy", "PIL", "gguf", "llama_cpp", "torch", "transformers", "matplotlib", "jinja2"}
    program = (
        "import atexit, sys; from sparsemm_edge import cli;"
        f"atexit.register(lambda: print(sorted({heavy} & sys.modules.keys()), file=sys.stderr));"
        f"sys.argv = ['sparsemm-edge', *{command}, '--help']; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "No such command 'nothing'"),
        (["generate"], "Missing option '--model' / '-m'"),
        (["generate", "--nothing"], "No such option: --nothing"),
        (["generate", "-m", "x", "-p", "y", "-n", "many"], "'--n-predict' / '-n'"),
        (["inspect", "x", "--plot"], "'--plot' requires an argument"),
    ],
)
def test_a_mistake_in_the_options_is_one_line(arguments: list[str], said: str, sparsemm: CommandLine) -> None:
    assert said in sparsemm(*arguments).refusal


# --- text that is none


def test_a_prompt_or_a_template_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    assert "is not UTF-8" in refused(run("generate", *MODEL, "-p", b"what\xff"))
    assert "the chat template is not UTF-8" in refused(
        run("generate", *MODEL, "-p", "x", "--chat-template", b"{{ messages[0].content }}\xff")
    )
    (tmp_path / "t.jinja").write_bytes(b"{{ messages[0].content }}\xff")
    template = ("--chat-template", str(tmp_path / "t.jinja"))
    assert "t.jinja: not a text file" in refused(run("generate", *MODEL, "-p", "x", *template))
    assert "cannot read" in refused(run("generate", *MODEL, "-p", "x", "--chat-template", b"\xff.jinja"))


def test_a_line_of_a_chat_that_is_no_text_is_refused_and_the_chat_goes_on() -> None:
    done = run("chat", *MODEL, "-n", "2", "--json", input=b"what\xff\nwhat\n", stdin=None)
    assert done.returncode == 0, done
    assert "is not UTF-8" in refused(subprocess.CompletedProcess([], 2, b"", done.stderr))
    assert len(done.stdout.split()) > 0 and json.loads(done.stdout)["n_generated"] >= 1


def test_files_may_have_names_that_are_no_text(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff\xe9\nm.gguf"
    os.symlink(os.fsencode(FILES.model), name)
    done = run("generate", "-m", name, "--threads", "1", "-p", "x", "-n", "1")
    assert done.returncode == 0, done
    assert run("inspect", name).returncode == 0
    assert "missing" not in refused(run("inspect", name + b"x"))
    scores = ("--scores", str(FILES.scores), "--budget", "64", "--window", "8")
    done = run("convert", name, *scores)
    assert done.returncode == 0 and b"wrote" in done.stdout, done


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_what_the_terminal_has_no_sign_for_is_printed_as_a_replacement(encoding: str, tmp_path: Path) -> None:
    grammar = tmp_path / "\u4e16.gbnf"
    grammar.write_text('root ::= "a\u4e16b"', encoding="utf-8")
    done = run("generate", *MODEL, "-p", "\u4e16", "--grammar-file", str(grammar), encoding=encoding)
    assert (done.returncode, done.stdout.strip()) == (0, b"a?b"), done
    link = tmp_path / "\u4e16.gguf"
    link.symlink_to(FILES.model)
    done = run("inspect", str(link), encoding=encoding)
    assert done.returncode == 0 and b"?.gguf" in done.stdout
    assert "\\u754c.gguf" in refused(run("inspect", str(tmp_path / "\u754c.gguf"), encoding=encoding))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "arguments", [["inspect", str(FILES.model)], ["generate", *MODEL, "-p", "x", "-n", "3"]]
)
def test_a_full_disk_on_stdout_is_one_line(arguments: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = run(*arguments, stdout=full)
    line = [each for each in done.stderr.decode().splitlines() if not each.startswith("[KV cache")]
    assert (done.returncode, line) == (2, ["error: cannot use the output: No space left on device"])


# --- numbers


def numbers() -> Iterator[tuple[str, str, str]]:
    """Every option that is a number: the command, the option, and its name in RANGES."""

    def walk(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
        for name, each in getattr(command, "commands", {}).items():
            yield from walk(each, (*path, name))
        for param in command.params:
            # a number is what takes the word "1" and returns no text
            if param.param_type_name == "option" and not isinstance(
                taken(param, "1"), str | Path | bool | None
            ):
                yield " ".join(path), param.opts[0], param.name

    def taken(param: Any, word: str) -> Any:
        if getattr(param, "is_flag", False) or param.multiple or param.nargs != 1:
            return None
        try:
            return param.process_value(typer.Context(command=app), word)
        except Exception:
            return None

    app = typer.main.get_command(cli.app)
    yield from walk(app, ())


def test_every_number_of_every_command_has_a_range() -> None:
    found = list(numbers())
    assert len(found) > 40 and {name for _, _, name in found} <= RANGES.keys()


@pytest.mark.parametrize("command", sorted({command for command, _, _ in numbers()}))
def test_a_number_out_of_its_range_is_one_line(command: str, sparsemm: CommandLine, tmp_path: Path) -> None:
    needed = {
        "convert": ["nowhere.gguf", "--scores", "nowhere.json"],
        "eval": ["-m", "nowhere.gguf", "--mmproj", "nowhere.gguf", "--data", "grid"],
        "fit": ["nowhere.gguf"],
        "generate": ["-m", "nowhere.gguf", "-p", "x"],
        "kept": ["-m", "nowhere.gguf", "--mmproj", "nowhere.gguf", "--image", "nowhere.png", "-p", "x"],
        "profile": ["-m", "nowhere.gguf"],
        "chat": ["-m", "nowhere.gguf"],
        "serve": ["-m", "nowhere.gguf"],
        "score": ["nowhere"],
        "scores knockout": ["nowhere", "--scores", "nowhere.json"],
    }.get(command, [])
    for each, option, name in numbers():
        if each != command:
            continue
        low, high = RANGES[name]
        for value in (
            "nan",
            "inf",
            "-inf",
            low - 1,
            high * 2 + 1,
            2**32 + 1,
            2**64,
            -(2**63),
            "9" * 5000,
            "1e400",
        ):
            line = sparsemm(*command.split(), *needed, option, value).refusal
            assert option in line or f"--{name.replace('_', '-')}" in line, line
            assert "nowhere" not in line


def test_numbers_in_lists_and_sizes_have_bounds_too(sparsemm: CommandLine) -> None:
    for text in ("0", "-1", "x", "1,,2", "1.5", "9" * 5000, str(2**24 + 1), "nan"):
        with pytest.raises(SparseMMError, match="--budgets"):
            whole_numbers("--budgets", text)
    assert whole_numbers("--budgets", " 64, 256") == [64, 256]
    data = ("eval", "-m", "x", "--mmproj", "x", "--data", "grid", "--pages", "1")
    for option in ("--budgets", "--retention", "--window", "--floor-ratio"):
        for text in ("nan", "inf", "-1", "1e400", "9" * 5000, "99999999999"):
            assert sparsemm(*data, option, text).refusal
    for text in ("0G", "9" * 400 + "G", "nanG", "1e9G", "8"):
        assert "--memory" in sparsemm("fit", "x", "--memory", text).refusal
    for text in ("9" * 5000 + "x1", "0x5", "99999x1"):
        assert "--image" in sparsemm("fit", "x", "--image", text).refusal
        assert "pixels" in sparsemm("score", "x", "--page-size", text).refusal


@pytest.mark.parametrize("evicts", [True, False])
def test_a_context_that_no_machine_has_memory_for_is_refused_at_once(
    evicts: bool, sparsemm: CommandLine
) -> None:
    policy = ("--policy", "uniform", "--budget", "64", "--window", "8") if evicts else ()
    started = time.monotonic()
    done = sparsemm("generate", *MODEL, *policy, "-p", "x" * 4000, "--n-ctx", 2**24)
    assert "--n-ctx makes it smaller" in done.refusal
    assert time.monotonic() - started < 20


# --- batches below the window


def test_batches_below_the_window_answer_as_the_whole_prompt(sparsemm: CommandLine, tmp_path: Path) -> None:
    from sparsemm_edge.pages.grid import READ_PROMPT, grid_page

    grid_page(5).image.save(tmp_path / "page.png")
    arguments = ("generate", *MODEL, "--mmproj", FILES.mmproj, "--image", tmp_path / "page.png")
    options = (
        "-p",
        READ_PROMPT,
        "--scores",
        FILES.scores,
        "--budget",
        64,
        "--window",
        32,
        "-n",
        24,
        "--json",
    )
    whole = sparsemm(*arguments, *options)
    assert whole.err == ""
    for n_ubatch in (1, 3, 31):
        done = sparsemm(*arguments, *options, "--n-ubatch", n_ubatch)
        assert done.report["tokens"] == whole.report["tokens"]
        assert done.err == ""


def test_a_short_first_question_does_not_cut_later_windows() -> None:
    """The context is made for the first question, and would read the others as few tokens at a time."""
    with VisionModel.load(FILES.model, n_threads=1) as model:
        eviction = Eviction(policy="uniform", budget=64, window=32)
        with Conversation(model, n_ctx=2048, eviction=eviction) as conversation:
            list(conversation.ask("x", n_predict=1))
            first = conversation.stats()
            assert first.n_prompt < 32
            assert conversation.context is not None and conversation.context.n_ubatch >= 32


# --- threads and memory of a container


def put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "10000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "300000 100000\n"}, 3),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "300000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/x\n2:cpu,cpuacct:/docker/outside\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "400000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/\n0::/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            8,
        ),
        ({"proc/self/cgroup": "nonsense", "sys/fs/cgroup/cpu.max": "x\n"}, 8),
    ],
)
def test_threads_are_those_that_the_container_has_time_for(
    files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 16 if logical else 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(resources, "_ROOT", put(tmp_path, files))
    assert usable_cores() == cores


def test_where_no_physical_cores_are_known_all_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 6 if logical else None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(resources, "_ROOT", tmp_path)
    assert usable_cores() == 6
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5}, raising=False)
    assert usable_cores() == 2


GIB = 2**30
V1 = "sys/fs/cgroup/memory"


def of_version_1(group: str, limit: int, used: int, files: int) -> dict[str, str]:
    """A control group of memory; what its own files hold is less than what those of its children hold."""
    return {
        f"{group}/memory.limit_in_bytes": f"{limit}\n",
        f"{group}/memory.usage_in_bytes": f"{used}\n",
        f"{group}/memory.stat": f"inactive_file 7\ntotal_cache {files}\ntotal_inactive_file {files}\n",
    }


def of_version_2(group: str, limit: object, used: int, files: int) -> dict[str, str]:
    return {
        f"{group}/memory.max": f"{limit}\n",
        f"{group}/memory.current": f"{used}\n",
        f"{group}/memory.stat": f"anon 7\ninactive_file {files}\n",
    }


@pytest.mark.parametrize(
    ("cgroup", "files", "total", "available"),
    [
        ("", {}, 64, 40),
        ("0::/", of_version_2("sys/fs/cgroup", "max", 9 * GIB, 0), 64, 40),
        ("0::/", of_version_2("sys/fs/cgroup", 8 * GIB, 3 * GIB, GIB), 8, 6),
        ("0::/", of_version_2("sys/fs/cgroup", 50 * GIB, 3 * GIB, GIB), 50, 40),  # others use the machine
        ("0::/", of_version_2("sys/fs/cgroup", 2 * GIB, 3 * GIB, 0), 2, 0),
        (
            "0::/a/b",
            of_version_2("sys/fs/cgroup/a", 8 * GIB, 7 * GIB, 0)
            | of_version_2("sys/fs/cgroup/a/b", 4 * GIB, GIB, 0),
            4,
            1,
        ),
        ("4:memory:/\n0::/", of_version_1(V1, 8 * GIB, 3 * GIB, GIB), 8, 6),
        ("4:memory:/docker/outside\n1:cpu:/", of_version_1(V1, 8 * GIB, 3 * GIB, GIB), 8, 6),
        ("4:memory:/a", of_version_1(f"{V1}/a", 8 * GIB, 3 * GIB, GIB), 8, 6),
        ("4:memory:/", of_version_1(V1, 2**63 - 4096, 3 * GIB, GIB), 64, 40),  # no limit
        ("4:cpu:/", of_version_1(V1, 8 * GIB, 3 * GIB, GIB), 64, 40),
        ("4:memory:/", {f"{V1}/memory.limit_in_bytes": "x"}, 64, 40),
    ],
)
def test_memory_is_what_the_container_may_use(
    cgroup: str,
    files: dict[str, str],
    total: int,
    available: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = SimpleNamespace(total=64 * GIB, available=40 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    monkeypatch.setattr(resources, "_ROOT", put(tmp_path, files | {"proc/self/cgroup": cgroup}))
    assert machine_memory() == (total * GIB, available * GIB)
