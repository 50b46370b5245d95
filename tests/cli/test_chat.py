"""`chat`: in a terminal, from a pipe, and what its commands do."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from helpers.command_line import CommandLine
from helpers.conversations import EVICTION, OPTIONS, QUESTIONS, said
from helpers.model_files import without_template
from helpers.models import test_model
from sparsemm_edge.runtime import Conversation, Sampling, VisionModel

CLI = (sys.executable, "-m", "sparsemm_edge.cli", "chat")


def chat(typed: str | bytes, *options: object) -> subprocess.CompletedProcess[bytes]:
    """A chat whose messages are piped."""
    files = test_model("llava")
    arguments = ("-m", files.gguf("f16"), "--mmproj", files.mmproj("f16"), *OPTIONS, *options)
    data = typed.encode() if isinstance(typed, str) else typed
    return subprocess.run([*CLI, *map(str, arguments)], input=data, capture_output=True, timeout=120)


def answers(done: subprocess.CompletedProcess[bytes]) -> list[Any]:
    """What a chat with --json said."""
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(b"{")]


# --- piped


def test_chat_answers_each_line_and_reads_no_image_twice(llava: VisionModel, pages: list[Path]) -> None:
    with Conversation(llava, n_ctx=2048, eviction=EVICTION) as conversation:
        expected = [said(conversation, QUESTIONS[0], pages[:1]), said(conversation, QUESTIONS[1], pages[1:])]
        n_prompt = conversation.stats().n_prompt
        expected.append(said(conversation, QUESTIONS[2]))
    typed = (
        f"{QUESTIONS[0]}\n/image\t'{pages[1]}'\n{QUESTIONS[1]}\n\n{QUESTIONS[2]}\n/reset\n{QUESTIONS[2]}\n"
    )
    found = answers(chat(typed, "--image", pages[0], "-n", 12, "--n-ctx", 2048, "--json"))
    assert [tuple(a["tokens"]) for a in found[:3]] == expected
    assert found[1]["n_prompt"] == n_prompt
    assert [a["kv"]["n_evictions"] for a in found] == [1, 2, 3, found[3]["kv"]["n_evictions"]]
    assert found[3]["kv"]["n_positions"] < found[0]["kv"]["n_positions"], "it began anew"


def test_what_chat_cannot_do_is_one_line_and_the_chat_goes_on(pages: list[Path]) -> None:
    typed = (
        b"/help\n/stats\n/nothing\n/image nowhere.png\n/image ~no-one-at-all/x.png\n/image\n"
        b"/image data:,x\n/retry\n/save\n/save s.session\n/load nowhere.session\n/system @nowhere.txt\n"
    ) + b"caf\xe9\n"
    typed += f"/image {pages[0].parent}\nHello\n{'No, no. ' * 60}\n/stats\n/exit\nnot read\n".encode()
    done = chat(typed, "-n", 8, "--n-ctx", 128)
    assert done.returncode == 0
    assert b"/image PATH" in done.stdout
    assert b"positions    " in done.stdout and b"of 128;" in done.stdout
    errors = done.stderr.decode().splitlines()
    expected = (
        "nothing was generated",
        "no command /nothing",
        "nowhere.png: no such file",
        "~no-one-at-all/x.png: no such file",
        "folder",
        "the data URL: not an image",
        "no message yet",
        "which file? /save FILE",
        "no message yet",
        "cannot read nowhere.session",
        "cannot read nowhere.txt",
        "the message is not UTF-8",
        "folder",
        "is full: ",
    )
    assert len(errors) == len(expected), "\n".join(errors)
    for line, said_so in zip(errors, expected, strict=True):
        assert line.startswith("error: ") and said_so in line
    assert "/reset begins anew" in errors[-1]


@pytest.mark.parametrize("leave", ["/exit", "/quit", "/bye", "exit", "quit"])
def test_all_the_usual_words_leave(leave: str) -> None:
    done = chat(f"{leave}\nHello\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_three_quotes_make_a_message_of_several_lines(llava: VisionModel) -> None:
    with Conversation(llava, n_ctx=1024, eviction=EVICTION) as conversation:
        expected = [said(conversation, text) for text in ("What is\n/this\n?", "one line", "to the end")]
    typed = '"""What is\n/this\n?"""\n"""one line"""\n"""\nto the end\n'
    found = answers(chat(typed, "-n", 12, "--n-ctx", 1024, "--json"))
    assert [tuple(a["tokens"]) for a in found] == expected


def test_an_answer_that_fills_the_context_says_how_to_begin_anew() -> None:
    done = chat("Hello\n", "-n", 500, "--n-ctx", 64)
    assert done.stderr.decode().splitlines() == [
        "the context of 64 positions is full: /reset begins anew, --n-ctx makes it larger"
    ]


def test_a_message_is_answered_again_with_another_seed(llava: VisionModel) -> None:
    sampling = [Sampling(temperature=1.0, seed=seed) for seed in (5, 6, 7)]
    with Conversation(llava, n_ctx=1024, eviction=EVICTION) as conversation:
        expected = [said(conversation, QUESTIONS[0], sampling=sampling[0])]
        for each in sampling[1:]:
            list(conversation.retry(n_predict=12, sampling=each))
            expected.append(conversation.stats().tokens)
        positions = conversation.stats().kv.n_positions
        expected.append(said(conversation, QUESTIONS[2], sampling=sampling[0]))
    assert len(set(expected)) == 4
    typed = f"{QUESTIONS[0]}\n/retry\n/regen\n{QUESTIONS[2]}\n"
    found = answers(chat(typed, "-n", 12, "--n-ctx", 1024, "--json", "--temp", 1.0, "--seed", 5))
    assert [tuple(a["tokens"]) for a in found] == expected
    assert found[2]["kv"]["n_positions"] == positions
    # what was answered at first is forgotten: the last answer is one after the third alone
    with Conversation(llava, n_ctx=1024, eviction=EVICTION) as conversation:
        assert said(conversation, QUESTIONS[0], sampling=sampling[2]) == expected[2]
        assert said(conversation, QUESTIONS[2], sampling=sampling[0]) == expected[3]


def test_an_answer_that_lost_positions_cannot_be_given_again() -> None:
    """With --kv-max-tail the oldest go, and are not there any more when the answer is taken back."""
    done = chat("Hello\n/retry\nAnd now?\n", "-n", 40, "--n-ctx", 512, "--kv-max-tail", 9, "--temp", 1)
    assert done.returncode == 0
    assert len(done.stderr.splitlines()) == 1 and b"cannot drop the reply" in done.stderr
    assert len(done.stdout.splitlines()) >= 2


def test_a_chat_is_saved_and_gone_on_with(llava: VisionModel, tmp_path: Path) -> None:
    with Conversation(llava, n_ctx=1024, eviction=EVICTION) as conversation:
        expected = [said(conversation, QUESTIONS[0]), said(conversation, QUESTIONS[2])]
    first = chat(f"{QUESTIONS[0]}\n/save {tmp_path}/a b.session\n", "-n", 12, "--n-ctx", 1024, "--json")
    assert tuple(answers(first)[0]["tokens"]) == expected[0]
    typed = f"Hello\n/load '{tmp_path}/a b.session'\n{QUESTIONS[2]}\n"
    second = answers(chat(typed, "-n", 12, "--n-ctx", 1024, "--json"))
    assert tuple(second[1]["tokens"]) == expected[1]


def test_a_system_message_begins_anew(llava: VisionModel, tmp_path: Path) -> None:
    (tmp_path / "s.txt").write_text("Be brief.\n")
    options = {"n_ctx": 1024, "eviction": EVICTION}
    with (
        Conversation(llava, **options) as plain,
        Conversation(llava, **options, system="Be brief.") as told,
    ):
        expected = [said(plain, "Hello"), *[said(told, "Hello")] * 3]
    assert expected[0] != expected[1]
    typed = f"Hello\n/system Be brief.\nHello\n/system @{tmp_path}/s.txt\nHello\n/reset\nHello\n/system\n"
    done = chat(typed, "-n", 12, "--n-ctx", 1024, "--json")
    assert [tuple(a["tokens"]) for a in answers(done)] == expected
    assert done.stdout.splitlines()[-1] == b"Be brief."


# --- Ctrl-C


@contextmanager
def running(*options: object, **kwargs: Any) -> Iterator[subprocess.Popen[bytes]]:
    files = test_model("llava")
    arguments = ("-m", files.gguf("f16"), "--mmproj", files.mmproj("f16"), *OPTIONS, *options)
    with subprocess.Popen([*CLI, *map(str, arguments)], bufsize=0, **kwargs) as process:
        try:
            yield process
        finally:
            process.kill()


PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


def test_interrupting_an_answer_keeps_the_chat() -> None:
    with running("-n", "4000", "--n-ctx", "8000", "--kv-max-tail", "16", **PIPES) as process:
        assert process.stdin and process.stdout
        process.stdin.write(b"Count to a million.\n")
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(b"/stats\n", timeout=120)
    assert process.returncode == 0, err
    assert b"last answer" in out
    generated = int(out.split(b"last answer")[1].split(b" generated")[0].split()[-1])
    assert 1 <= generated < 4000


def test_ctrl_c_after_a_piped_answer_keeps_the_chat_and_twice_leaves() -> None:
    with running("-n", "4", "--n-ctx", "512", **PIPES) as process:
        assert process.stdin and process.stdout and process.stderr
        for _ in range(2):
            process.stdin.write(b"Hello\n")
            while process.stdout.read(1) != b"\n":
                pass
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            assert process.stderr.readline() == b"Ctrl-C again leaves the chat\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) in (130, -signal.SIGINT)


class Terminal:
    """The other end of a terminal that a chat runs in."""

    def __init__(self, *options: object) -> None:
        self._ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self._running = running(*options, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
        self.process = self._running.__enter__()
        os.close(theirs)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self._running.__exit__(None, None, None)
        os.close(self._ours)

    def types(self, data: bytes) -> None:
        os.write(self._ours, data)

    def says(self, *texts: str) -> str:
        """What appears until all of these texts did and it asks for the next message."""
        found = ""
        while not (all(text in found for text in texts) and found.rstrip(" \b").endswith("\n>")):
            assert select.select([self._ours], [], [], 20)[0], repr(found)
            found += os.read(self._ours, 4096).decode("utf-8", "replace")
            found = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", found)
        return found


def test_in_a_terminal_lines_are_edited_pasted_and_remembered(llava: VisionModel) -> None:
    with Conversation(llava, n_ctx=512, eviction=EVICTION) as conversation:
        expected = [
            "".join(conversation.ask(text, n_predict=8)) for text in ("Hello", "one\ntwo\nthree", "Hello")
        ]
    with Terminal("-n", 8, "--n-ctx", 512) as terminal:
        terminal.says("/help lists the commands")
        terminal.types(b"Jello\x01\x1b[3~H\r")  # to the line's start, delete a character, another instead
        terminal.says(expected[0])
        terminal.types(b"\x1b[200~one\ntwo\nthree\x1b[201~")  # as a terminal pastes
        terminal.types(b"\r")
        terminal.says(expected[1])
        terminal.types(b"\x1b[A\x1b[A\x1b[A\x1b[A\r")  # to the first message
        terminal.says(expected[2])
        terminal.types(b"\x04")
        assert terminal.process.wait(timeout=60) == 0


def test_in_a_terminal_ctrl_c_never_loses_what_was_said() -> None:
    with Terminal("-n", 8, "--n-ctx", 512) as terminal:
        terminal.says("/help lists the commands")
        terminal.types(b"Hello\r")
        terminal.says("Hello")
        for _ in range(3):
            terminal.types(b"\x03")
            terminal.says("Ctrl-D or /exit leaves the chat")
        terminal.types(b'"""half a message\r')
        time.sleep(0.3)
        terminal.types(b"\x03")
        terminal.says("Ctrl-D or /exit leaves the chat")
        terminal.process.send_signal(signal.SIGINT)
        terminal.says("Ctrl-D or /exit leaves the chat")
        terminal.types(b"/stats\r")
        assert "last answer" in terminal.says("last answer")
        terminal.types(b"/bye\r")
        assert terminal.process.wait(timeout=60) == 0


# --- refused before the first prompt


@pytest.mark.parametrize(
    ("options", "said_so"),
    [
        (["--image", "nowhere.png"], "nowhere.png: no such file"),
        (["-m", "nowhere.gguf"], "nowhere.gguf"),
        (["-m", "NOTEMPLATE"], "has no chat template"),
        (["--chat-template", "{{ 1 }}"], "the chat template cannot be used"),
        (["--policy", "best"], "unknown policy 'best'"),
        (["--scores", "nowhere.json"], "nowhere.json"),
        (["--budget", "64"], "holds no head scores"),
        (["--n-ctx", "3"], "--n-ctx allows 3"),
        (["--grammar-file", "BROKEN"], "the grammar is broken"),
        (["--no-evict", "--kv-max-tail", "64"], "--kv-max-tail"),
    ],
)
def test_a_chat_that_could_answer_nothing_is_refused_at_once(
    options: list[str], said_so: str, tmp_path: Path, sparsemm: CommandLine
) -> None:
    model = test_model("llava").gguf("f16")
    (tmp_path / "broken.gbnf").write_text("root ::= nothing")
    files = {"BROKEN": tmp_path / "broken.gbnf"}
    if "NOTEMPLATE" in options:
        files["NOTEMPLATE"] = without_template(model, tmp_path / "m.gguf")
    given = [files.get(option, option) for option in options]
    arguments = [] if "-m" in options else ["-m", model]
    assert said_so in sparsemm("chat", *arguments, *given).refusal


def test_a_model_that_cannot_evict_is_refused_at_once(
    sparsemm: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsemm_edge.gguf_metadata.SUPPORTED_ARCHITECTURES", frozenset())
    arguments = ("chat", "-m", test_model("llava").gguf(), "--policy", "uniform", "--budget", 64)
    assert "unsupported architecture 'llama'" in sparsemm(*arguments).refusal


def test_an_image_without_an_encoder_is_refused_at_once(pages: list[Path], sparsemm: CommandLine) -> None:
    arguments = ("chat", "-m", test_model("llava").gguf(), "--image", pages[0])
    assert "--mmproj" in sparsemm(*arguments).refusal
