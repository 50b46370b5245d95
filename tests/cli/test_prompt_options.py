"""What a question can be given as, and what is written around it."""

from __future__ import annotations

import base64
import http.server
import io
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.chat_templates import render
from helpers.command_line import CommandLine
from helpers.model_files import without_template
from helpers.models import sample_image, test_model
from sparsemm_edge import SparseMMError
from sparsemm_edge.runtime import VisionModel, builtin_templates
from sparsemm_edge.runtime.chat_template import Turn, read_template, render_turns

TOKENS = {"marker": "<M>", "bos": "<s>", "eos": "</s>"}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.png"
    sample_image(test_model("llava").image_size, 1).save(path)
    return path


@pytest.fixture
def answer(sparsemm: CommandLine) -> Any:
    """`answer(*options)`: the tokens that `generate` says, and how long the prompt was."""
    files = test_model("llava")
    model = ("-m", files.gguf(), "--mmproj", files.mmproj(), "--threads", 1, "-n", 8, "--json")

    def ask(*options: object) -> tuple[list[int], int]:
        found = sparsemm("generate", *model, *options).report
        return found["tokens"], found["n_prompt"]

    return ask


def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


# --- the question


def test_a_question_comes_from_a_file_or_stdin_too(
    answer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "q.txt").write_text("What is\nthis?\n")
    (tmp_path / "dos.txt").write_bytes("\ufeffWhat is\nthis?\r\n".encode("utf-16"))
    expected = answer("-p", "What is\nthis?")
    assert answer("-f", tmp_path / "q.txt") == answer("-f", tmp_path / "dos.txt") == expected
    stdin(monkeypatch, b"What is\nthis?\n")
    assert answer("-p", "-") == expected


def test_what_mtmd_takes_for_an_image_is_text_in_a_question(answer: Any, page: Path) -> None:
    """Text of eleven bytes is eleven tokens; an image would be hundreds, or an error without one."""
    for images in ((), ("--image", page)):
        _, plain = answer("-p", "x", *images)
        _, with_marker = answer("-p", "x<__media__>", *images)
        assert with_marker == plain + len("<__media__>")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no prompt: give -p TEXT, -p - to read stdin, or -f FILE"),
        (["-p", "x", "-f", "FILE"], "not both"),
        (["-f", "nowhere.txt"], "cannot read nowhere.txt"),
        (["-f", "FILE"], "not a text file"),
        (["-p", "-"], "the prompt on stdin: not a text file"),
        (["-p", "a\udcff"], "the prompt is not UTF-8"),
        (["-p", "x", "--system", "a\udcff"], "--system is not UTF-8"),
        (["-p", "x", "--system", "@nowhere.txt"], "cannot read nowhere.txt"),
        (["-p", "x", "--chat-template-kwargs", "{"], "--chat-template-kwargs: not a JSON object such as"),
        (["-p", "x", "--chat-template-kwargs", "[1]"], "expected a JSON object"),
        (["-p", "x", "--chat-template-kwargs", '{"messages": []}'], "cannot say messages"),
        (["-p", "x", "--chat-template", "vicuna", "--chat-template-kwargs", '{"a": 1}'], "takes no"),
        (["-p", "x", "--chat-template", "vikuna"], "nor is it one of llama.cpp's templates: --chat-template"),
        (["-p", "x", "--image", "data:image/png;base64,xx"], "the data URL: "),
        (["-p", "x", "--image", "data:image/png;base64,"], "the data URL: not an image"),
        (["-p", "x", "--image", "data:"], "the data URL: cannot be read"),
        (["-p", "x", "--image", "http://127.0.0.1:9/x.png"], "http://127.0.0.1:9/x.png: cannot be read"),
        (["-p", "x", "--image", "http://[/x.png"], "http://[/x.png: cannot be read"),
        (["-p", "x", "--image", "https://a b/x.png"], "https://a b/x.png: cannot be read"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, sparsemm: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    stdin(monkeypatch, b"\xff\xfe\xff")
    given = [str(tmp_path / "binary") if argument == "FILE" else argument for argument in arguments]
    assert said in sparsemm("generate", "-m", test_model("llava").gguf(), *given).refusal


# --- images


@pytest.fixture(scope="module")
def server(page: Path) -> Iterator[str]:
    """An HTTP server: its address, at which page.png is the page."""
    data = page.read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "file:///etc/passwd")
                self.end_headers()
                return
            self.send_response(200 if self.path == "/page.png" else 404)
            self.end_headers()
            if self.path == "/page.png":
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()


def test_an_image_may_be_a_url(
    answer: Any, page: Path, server: str, tmp_path: Path, sparsemm: CommandLine
) -> None:
    data_url = "data:image/png;base64," + base64.b64encode(page.read_bytes()).decode()
    expected = answer("-p", "x", "--image", page)
    assert answer("-p", "x", "--image", data_url) == expected
    assert answer("-p", "x", "--image", f"{server}/page.png") == expected
    files = test_model("llava")
    model = ("-m", files.gguf(), "--mmproj", files.mmproj(), "-t", 1, "--image", data_url, "-p", "x")
    small = ("--policy", "uniform", "--window", 8)
    assert sparsemm("kept", *model, *small, "--budget", 32, "--out", tmp_path / "k.png").status == 0
    assert sparsemm("profile", *model, *small, "-n", 2, "--budgets", 32, "--out", tmp_path).status == 0
    refused = sparsemm("generate", "-m", files.gguf(), "-p", "x", "--image", f"{server}/other.png").refusal
    assert "the server says 404" in refused
    refused = sparsemm("generate", "-m", files.gguf(), "-p", "x", "--image", f"{server}/moved").refusal
    assert "the server says 302" in refused, "a server must not send anyone to local files"


# --- system messages


SYSTEM_ROLE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
)
DROPS_SYSTEM = (
    "{% for m in messages %}{% if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
)
TYPED = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{% if part.type == 'image' %}<image>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}<assistant>"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (SYSTEM_ROLE, "<system>Be brief. <user><M>\nwhat?<assistant>"),
        (NO_SYSTEM, "<user><M>\nBe brief. \n\nwhat?<assistant>"),
        (DROPS_SYSTEM, "<user><M>\nBe brief. \n\nwhat?"),
        (TYPED, "<system>Be brief. <user><M>what?<assistant>"),
        ("llama2-sys", "[INST] <<SYS>>\nBe brief. \n<</SYS>>\n\n<M>\nwhat? [/INST]"),
    ],
)
def test_a_system_message_stands_where_the_template_puts_it_or_before_the_question(
    template: str, expected: str
) -> None:
    assert render(template, "what?", 1, **TOKENS, system="Be brief. ") == expected


def test_what_was_said_is_written_in_turns() -> None:
    turns = [
        Turn("system", "Be brief."),
        Turn("user", "<image> what?", 1),
        Turn("assistant", "A page."),
        Turn("user", "", 2),
    ]
    assert render_turns(TYPED, turns, **TOKENS) == (
        "<system>Be brief.<user><M><image> what?<assistant>A page.<user><M><M><assistant>"
    )


def test_generate_and_profile_tell_the_model_what_it_is_told(
    answer: Any, tmp_path: Path, sparsemm: CommandLine
) -> None:
    (tmp_path / "s.txt").write_text("Be brief.\n")
    plain, told = answer("-p", "x"), answer("-p", "x", "--system", "Be brief.")
    assert told[1] > plain[1]
    assert answer("-p", "x", "--system", f"@{tmp_path / 's.txt'}") == told
    files = test_model("llava")
    arguments = ("-m", files.gguf(), "-p", "x", "--system", "Be brief.", "-n", 2, "-t", 1)
    found = sparsemm("profile", *arguments, "--out", tmp_path / "p", "--json").report
    assert found["settings"][0]["n_prompt"] == told[1]


def test_a_resumed_conversation_takes_no_system_message(tmp_path: Path, sparsemm: CommandLine) -> None:
    arguments = ("generate", "-m", test_model("llava").gguf(), "-p", "x", "-n", 2, "--system", "Be brief.")
    assert sparsemm(*arguments, "--save-session", tmp_path / "s").status == 0
    assert "has begun" in sparsemm(*arguments, "--load-session", tmp_path / "s").refusal


# --- templates


def test_a_template_is_told_what_the_user_says(answer: Any) -> None:
    template = "{{ messages[0].content }}{% if enable_thinking %}<think>{% endif %}"
    options = ("-p", "x", "--chat-template", template)
    assert (
        answer(*options)[1] + len("<think>")
        == answer(*options, "--chat-template-kwargs", '{"enable_thinking": true}')[1]
    )


@pytest.mark.parametrize("name", builtin_templates.names())
def test_every_template_of_llama_cpp_takes_an_image_and_a_later_question(name: str) -> None:
    assert read_template(name) == name
    first = render(name, "what?", 1, **TOKENS)
    assert "<M>\nwhat?" in first
    later = render(name, "and this?", 0, **TOKENS, first=False)
    assert "and this?" in later and "what?" not in later


def test_the_templates_of_llava_are_those_that_it_was_trained_with() -> None:
    assert render("vicuna", "what?", 1, **TOKENS) == "USER: <M>\nwhat?\nASSISTANT:"
    assert render("vicuna", "what?", 1, **TOKENS, first=False) == "</s>\nUSER: <M>\nwhat?\nASSISTANT:"
    chatml = "<|im_start|>user\n<M>\nwhat?<|im_end|>\n<|im_start|>assistant\n"
    assert render("chatml", "what?", 1, **TOKENS) == chatml


@pytest.mark.parametrize(
    ("file", "projector", "fits"),
    [
        ("llava-v1.5-7b-Q4_K.gguf", "mlp", "vicuna"),
        ("llava-v1.6-vicuna-13b.gguf", "mlp", "vicuna"),
        ("llava-1.5-7b-hf-f16.gguf", None, "vicuna"),
        ("llava-v1.6-mistral-7b.gguf", "mlp", "mistral-v1"),
        ("llava-v1.6-34b.gguf", "mlp", "chatml"),
        ("llava-llama-3-8b-v1_1-int4.gguf", "mlp", "llama3"),
        ("MobileVLM-3B.gguf", "ldp", "deepseek"),
        ("ggml-model-f16.gguf", "mlp", "vicuna"),
        ("ggml-model-f16.gguf", None, None),
    ],
)
def test_a_files_name_or_projector_suggests_a_template(file: str, projector: Any, fits: str | None) -> None:
    assert builtin_templates.suggestion(file, projector) == fits
    assert fits is None or fits in builtin_templates.names()


def test_a_file_without_a_template_is_asked_with_one_by_name(tmp_path: Path, sparsemm: CommandLine) -> None:
    path = without_template(test_model("llava").gguf(), tmp_path / "llava-v1.5-7b.gguf")
    arguments = ("generate", "-m", path, "-p", "x", "-n", 2, "-t", 1)
    said = sparsemm(*arguments).refusal
    assert "has no chat template: give one, such as --chat-template vicuna" in said
    assert all(f"{name}," in said for name in builtin_templates.names()[:-1])
    assert sparsemm(*arguments, "--chat-template", "vicuna").status == 0
    with VisionModel.load(path, n_threads=1) as model, pytest.raises(SparseMMError, match="no chat template"):
        model.chat_prompt("x", 0)


def test_json_of_a_schema_in_a_file_with_a_mark(tmp_path: Path, sparsemm: CommandLine) -> None:
    (tmp_path / "s.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"type": "boolean"}).encode())
    arguments = ("generate", "-m", test_model("llava").gguf(), "-p", "x", "-t", 1, "-n", 9)
    assert sparsemm(*arguments, "--json-schema", tmp_path / "s.json").out.strip() in ("true", "false")
