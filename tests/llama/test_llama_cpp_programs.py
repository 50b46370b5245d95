"""Programs that know nothing of this package evict with a converted file, and answer as `generate` does.

That they evict is seen by the text: with the full cache it is another one.
"""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.builds import environment, tools
from helpers.model_files import random_scores
from helpers.models import sample_image, test_model
from sparsemm_edge.budgets import BudgetSpec
from sparsemm_edge.convert import convert
from sparsemm_edge.runtime import Eviction, VisionModel, generate, library
from sparsemm_edge.runtime.context import Context, context_for
from sparsemm_edge.runtime.encode import encode, encode_text

LLAVAS = ("llava", "llava-gqa")
MODELS = (*LLAVAS, "qwen2vl")
# chosen so that the greedy answers hang on no lead that rounding could turn over
QUESTIONS = ("What is written here?", "Where is the largest box?")
OTHER_QUESTION = {
    "llava": "Is there a circle?",
    "llava-gqa": "How many boxes?",
    "qwen2vl": "Is there a circle?",
}
N_PREDICT = 24

SYSTEM = "Be brief."
# What llama_cpp.llama_chat_format.Llava15ChatHandler makes of this system message and a question: its
# template has a line break before each role, and jinja's trim_blocks takes them away
HANDLER_TEMPLATE = SYSTEM + "USER: <image>{{ messages[0].content[-1].text }}ASSISTANT: "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Per test model: NAME.gguf, converted so that every head evicts, and NAME.png."""
    path: Path = tmp_path_factory.mktemp("servers")
    for name in MODELS:
        model = test_model(name).gguf()
        # no head's budget is below the text before an image, which some clients mark as a prompt of its own
        # and no answer has two tokens as good as tied, which other batches would tell apart
        spec = BudgetSpec(budget=80, window=16, floor_ratio=0.1, water_fill=False)
        convert(model, random_scores(model, path), path / f"{name}.gguf", spec=spec)
        sample_image(test_model(name).image_size, 1).save(path / f"{name}.png")
    return path


@cache
def expected(folder: Path, name: str, question: str, template: str | None) -> str:
    """What `generate` answers, which is not what it answers with the full cache."""
    with VisionModel.load(folder / f"{name}.gguf", test_model(name).mmproj(), n_threads=1) as model:
        texts = []
        for eviction in (Eviction(), Eviction(enabled=False)):
            options: dict[str, Any] = {"chat_template": template, "eviction": eviction}
            pieces = generate(model, question, [folder / f"{name}.png"], n_predict=N_PREDICT, **options)
            texts.append("".join(pieces))
            assert pieces.stats().kv.n_evictions == eviction.enabled
    assert texts[0] != texts[1]
    return texts[0]


def own_template(name: str) -> str | None:
    """The model's chat template as a program renders it that puts a marker for the image into the text."""
    if name == "qwen2vl":
        return None
    return "USER: <image>{{ messages[0].content[-1].text }}\nASSISTANT:"


def data_url(image: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()


def ask(image: Path, question: str) -> dict[str, Any]:
    """A message of OpenAI's chat API."""
    parts = [
        {"type": "image_url", "image_url": {"url": data_url(image)}},
        {"type": "text", "text": question},
    ]
    return {"role": "user", "content": parts}


# --- llama_cpp.Llama

CLIENT = """
import ctypes, json, sys
from llama_cpp import Llama, llama_cpp
from llama_cpp.llama_chat_format import Llava15ChatHandler

job = json.load(sys.stdin)
handler = Llava15ChatHandler(clip_model_path=job["mmproj"], verbose=False)
model = Llama(job["model"], chat_handler=handler, n_ctx=1024, n_threads=1, n_threads_batch=1, verbose=False)
texts, stats = [], []
for messages in job["messages"]:
    reply = model.create_chat_completion(messages, max_tokens=job["n"], temperature=0, repeat_penalty=1)
    texts.append(reply["choices"][0]["message"]["content"])
    found = (ctypes.c_uint64 * 16)()
    function = llama_cpp._lib.llama_memory_heads_stats
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_bool
    assert function(llama_cpp.llama_get_memory(model._ctx.ctx), found)
    stats.append(bytes(found).hex())
json.dump([texts, stats, [name for name in sys.modules if name.startswith("sparsemm")]], sys.stdout)
"""


@pytest.mark.parametrize("name", LLAVAS)
def test_llama_cpp_pythons_chat_handler_answers_as_generate_does(folder: Path, name: str) -> None:
    """One question after another about one image, in a process that never imports this package."""
    system = {"role": "system", "content": SYSTEM}
    job = {
        "model": str(folder / f"{name}.gguf"),
        "mmproj": str(test_model(name).mmproj()),
        "messages": [[system, ask(folder / f"{name}.png", question)] for question in QUESTIONS],
        "n": N_PREDICT,
    }
    command = [sys.executable, "-c", CLIENT]
    done = subprocess.run(
        command, input=json.dumps(job), capture_output=True, text=True, cwd=folder, env=environment()
    )
    assert done.returncode == 0, done.stderr
    texts, found, imported = json.loads(done.stdout)
    assert imported == []
    assert texts == [expected(folder, name, question, HANDLER_TEMPLATE) for question in QUESTIONS]
    for count, data in enumerate(found, 1):
        stats = library.HeadsStats.from_buffer_copy(bytes.fromhex(data))
        assert stats.n_evictions == count
        assert stats.n_kept <= (80 + N_PREDICT) * stats.n_layer * stats.n_head_kv
        assert stats.n_kept < stats.n_pos * stats.n_layer * stats.n_head_kv


# --- servers


@contextmanager
def server(command: list[Any], path: str, **options: Any) -> Iterator[str]:
    """Run an HTTP server on a free port, and stop it: its address, once it answers at `path`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = Path(options["cwd"]) / f"server-{port}.log"
    with log.open("wb") as file:
        arguments = [str(part) for part in (*command, "--port", port)]
        process = subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT, **options)
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(address + path, timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
                time.sleep(0.1)
        yield address
        assert process.poll() is None, log.read_text()[-2000:]
    finally:
        process.terminate()
        process.wait()


def post(address: str, messages: list[dict[str, Any]], **options: Any) -> Any:
    """OpenAI's chat API: the whole reply, or with stream=True the text of its pieces."""
    body = {"messages": messages, "max_tokens": N_PREDICT, "temperature": 0, **options}
    request = urllib.request.Request(
        address + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        if not options.get("stream"):
            return json.load(response)
        lines = [line[6:] for line in response if line.startswith(b"data: ")]
    assert lines.pop().strip() == b"[DONE]"
    deltas = [choice["delta"] for line in lines for choice in json.loads(line)["choices"]]
    return [delta["content"] for delta in deltas if delta.get("content")]


def text_of(reply: Any) -> str:
    return str(reply["choices"][0]["message"]["content"])


def test_llama_cpp_pythons_server_answers_as_generate_does(folder: Path) -> None:
    command = [sys.executable, "-m", "llama_cpp.server", "--model", folder / "llava.gguf", "--n_ctx", 1024]
    command += ["--clip_model_path", test_model("llava").mmproj(), "--chat_format", "llava-1-5"]
    command += ["--n_threads", 1, "--n_threads_batch", 1, "--host", "127.0.0.1"]
    # its default asks for the logits of every token, which a cache takes for a check of several tokens
    command += ["--logits_all", "false"]
    with server(command, "/v1/models", cwd=folder, env=environment()) as address:
        for question in QUESTIONS:
            messages = [{"role": "system", "content": SYSTEM}, ask(folder / "llava.png", question)]
            text = expected(folder, "llava", question, HANDLER_TEMPLATE)
            assert text_of(post(address, messages, repeat_penalty=1)) == text
            pieces = post(address, messages, repeat_penalty=1, stream=True)
            assert "".join(pieces) == text and len(pieces) > 1


def llama_server(folder: Path, name: str, *options: Any) -> list[Any]:
    model = ["-m", folder / f"{name}.gguf", "--mmproj", test_model(name).mmproj()]
    return [tools() / "llama-server", *model, "-c", 1024, "-t", 1, "-tb", 1, "--host", "127.0.0.1", *options]


@pytest.mark.parametrize("name", MODELS)
def test_llama_server_answers_as_generate_does(folder: Path, name: str) -> None:
    """Again and again: a prompt that begins as the one before cannot go back into what was evicted."""
    with server(llama_server(folder, name, "-np", 1), "/health", cwd=folder) as address:
        for question in (QUESTIONS[0], OTHER_QUESTION[name]):
            messages = [ask(folder / f"{name}.png", question)]
            text = expected(folder, name, question, own_template(name))
            reply = post(address, messages)
            assert text_of(reply) == text
            assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
            pieces = post(address, messages, stream=True)
            assert "".join(pieces) == text and len(pieces) > 1


@pytest.mark.parametrize("name", ["llava", "qwen2vl"])
def test_llama_server_goes_on_from_what_it_holds(folder: Path, name: str) -> None:
    """The second turn reads what is new only: as a context does that drops the reply and reads on."""
    first = ask(folder / f"{name}.png", QUESTIONS[0])
    second = {"role": "user", "content": OTHER_QUESTION[name]}
    with server(llama_server(folder, name, "-np", 1), "/health", cwd=folder) as address:
        reply = post(address, [first])
        answer = {"role": "assistant", "content": text_of(reply)}
        again = post(address, [first, answer, second])
    n_prompt, n_cached = reply["usage"]["prompt_tokens"], _n_cached(again)
    assert n_prompt <= n_cached < again["usage"]["prompt_tokens"]

    with VisionModel.load(folder / f"{name}.gguf", test_model(name).mmproj(), n_threads=1) as model:
        prompt = model.chat_prompt(QUESTIONS[0], 1, own_template(name))
        if name == "qwen2vl":
            turns = "%s<|im_end|>\n<|im_start|>user\n%s<|im_end|>\n<|im_start|>assistant\n"
        else:
            turns = " %s\nUSER: %s\nASSISTANT:"
        with (
            model.tokenize(prompt, [folder / f"{name}.png"]) as tokenized,
            model.tokenize(turns % (text_of(reply), OTHER_QUESTION[name])) as more,
            # in calls for text and image, as the server reads it
            context_for(model, tokenized, n_predict=1, n_ctx=1024) as context,
        ):
            tokens = more.parts[0].tokens
            tokens = tokens[int(library.llama.llama_vocab_get_add_bos(model._vocab)) :]
            assert n_prompt + len(tokens) == again["usage"]["prompt_tokens"]
            context.prefill(encode(model, tokenized))
            # what the server decoded token by token is decoded so here
            for token in tokens[: n_cached - n_prompt]:
                context.decode(int(token))
            context.prefill(encode_text(tokens[n_cached - n_prompt :], context.n_past))
            assert greedy(model, context) == text_of(again)
            assert context.kv_stats().n_evictions == 2


def _n_cached(reply: Any) -> int:
    return int(reply["usage"]["prompt_tokens_details"]["cached_tokens"])


def greedy(model: VisionModel, context: Context) -> str:
    data = b""
    for _ in range(N_PREDICT):
        token = int(np.argmax(context.logits()))
        data += model.piece(token)
        context.decode(token)
    return data.decode()


def complete(address: str, prompt: str) -> Any:
    """llama-server's own API: a greedy completion of a text."""
    body = {"prompt": prompt, "n_predict": N_PREDICT, "temperature": 0, "cache_prompt": False}
    request = urllib.request.Request(
        address + "/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


@pytest.mark.parametrize("draft", [True, False], ids=["a draft that evicts", "a draft with a full cache"])
def test_llama_server_drafts_tokens_and_answers_as_without_a_draft(folder: Path, draft: bool) -> None:
    """Drafts are taken back: the draft model keeps its whole cache, whatever its file says."""
    model = folder / "llava.gguf"
    command = [tools() / "llama-server", "-m", model, "-np", 1, "-c", 1024, "-t", 1, "-tb", 1]
    draft_model = model if draft else test_model("llava").gguf()
    drafting = ["-md", draft_model, "--spec-type", "draft-simple"]
    replies = []
    for options in ([], drafting):
        with server([*command, "--host", "127.0.0.1", *options], "/health", cwd=folder) as address:
            replies.append([complete(address, question * 20) for question in QUESTIONS])
    for plain, drafted in zip(*replies, strict=True):
        assert drafted["content"] == plain["content"]
        assert drafted["timings"]["draft_n"] > 0


@pytest.mark.parametrize("slots", [["-np", 2], []])
def test_llama_server_with_several_slots_is_refused_in_a_line_that_says_what_to_set(
    folder: Path, slots: list[Any]
) -> None:
    command = [str(part) for part in llama_server(folder, "llava", *slots)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder)
    assert done.returncode == 1
    assert "supports one sequence" in done.stderr and "set it to 1 (llama-server: -np 1)" in done.stderr


# --- llama-mtmd-cli


@pytest.mark.parametrize("name", MODELS)
def test_llama_mtmd_cli_answers_as_generate_does(folder: Path, name: str) -> None:
    command: list[Any] = [tools() / "llama-mtmd-cli", "-m", folder / f"{name}.gguf"]
    command += ["--mmproj", test_model(name).mmproj(), "--image", folder / f"{name}.png"]
    command += ["-p", QUESTIONS[0], "--temp", 0, "-n", N_PREDICT]
    command += ["-c", 1024, "-t", 1, "-tb", 1, "--jinja"]
    text = expected(folder, name, QUESTIONS[0], own_template(name))
    for _ in range(5):  # now and then it ends before its log thread has printed the last characters
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=folder)
        assert done.returncode == 0, done.stderr
        found = done.stdout.removeprefix("\n").removesuffix("\n\n")
        assert text.startswith(found)
        if found == text:
            break
    else:
        pytest.fail(f"{found!r}, expected {text!r}")
