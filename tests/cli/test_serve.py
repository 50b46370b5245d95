"""`serve`, asked over HTTP with the official client, and its slot."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import openai
import pytest

from helpers.command_line import CommandLine
from helpers.models import sample_image, test_model
from sparsemm_edge.runtime import Conversation, Eviction, Sampling, VisionModel
from sparsemm_edge.server import ChatRequest, Slot

EVICTION = Eviction(policy="uniform", budget=48, window=8)
OPTIONS = ("--policy", "uniform", "--budget", "48", "--window", "8", "--threads", "1")
QUESTIONS = ("What is written here?", "Which of the two is longer?", "Is there a circle?")
N = 12


def data_url(seed: int) -> str:
    data = BytesIO()
    sample_image(test_model("llava").image_size, seed).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def user(text: str, *seeds: int) -> dict[str, Any]:
    images = [{"type": "image_url", "image_url": {"url": data_url(seed)}} for seed in seeds]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


@contextmanager
def serving(*options: object, model: Path | None = None) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server in a process of its own: its address."""
    files = test_model("llava")
    arguments = ("-m", model or files.gguf(), "--mmproj", files.mmproj(), "--port", 0, *OPTIONS, *options)
    with subprocess.Popen(
        [sys.executable, "-m", "sparsemm_edge.cli", "serve", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # what a shell starts in the background inherits that Ctrl-C is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line.startswith("serving model-f16.gguf at http://127.0.0.1:"), process.stderr
            yield line.split(" at ")[1].strip(), process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving("--n-ctx", 1024) as (found, process):
        yield found
        assert process.poll() is None


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=60)


def ask(client: openai.OpenAI, *messages: Any, **options: Any) -> Any:
    return client.chat.completions.create(
        model="any", messages=list(messages), **{"max_tokens": N, "temperature": 0} | options
    )


def text_of(reply: Any) -> str:
    return str(reply.choices[0].message.content)


def expected(model: VisionModel, *turns: tuple[str, list[int]], **options: Any) -> list[tuple[str, Any]]:
    """The answers of a conversation, and their figures."""
    found = []
    with Conversation(model, n_ctx=1024, eviction=EVICTION, **options) as conversation:
        for text, seeds in turns:
            images = [sample_image(test_model("llava").image_size, seed) for seed in seeds]
            said = "".join(conversation.ask(text, images, n_predict=N))
            found.append((said, conversation.stats()))
    return found


# --- answers


def test_the_official_client_gets_what_generate_answers_and_what_it_took(
    client: openai.OpenAI, llava: VisionModel
) -> None:
    for seed, question in enumerate(QUESTIONS):
        ((text, stats),) = expected(llava, (question, [seed]))
        reply = ask(client, user(question, seed))
        assert text_of(reply) == text
        assert reply.choices[0].finish_reason == ("stop" if stats.ended else "length")
        usage = reply.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (stats.n_prompt, stats.n_generated)
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert usage.kv == asdict(stats.kv)
        assert usage.kv["n_evictions"] == 1 and usage.kv["bytes_now"] < usage.kv["bytes_full"]


def test_an_answer_is_streamed(client: openai.OpenAI, llava: VisionModel) -> None:
    ((text, stats),) = expected(llava, (QUESTIONS[0], [5]))
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(ask(client, user(QUESTIONS[0], 5), **options))
    deltas = [choice.delta.content for chunk in chunks for choice in chunk.choices]
    assert "".join(filter(None, deltas)) == text and len(deltas) > 3
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    assert reasons[-1] in ("stop", "length") and not any(reasons[:-1])
    assert chunks[-1].usage.kv == asdict(stats.kv)
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_conversation_goes_on_and_another_begins_anew(client: openai.OpenAI, llava: VisionModel) -> None:
    (first, stats), (second, later) = expected(llava, (QUESTIONS[0], [1]), (QUESTIONS[1], [2]))
    alone, _ = expected(llava, (QUESTIONS[1], [2]))[0]
    reply = ask(client, user(QUESTIONS[0], 1))
    said = {"role": "assistant", "content": text_of(reply)}
    assert text_of(reply) == first
    turns = (user(QUESTIONS[0], 1), said, user(QUESTIONS[1], 2))
    again = ask(client, *turns)
    assert text_of(again) == second
    assert again.usage.kv == asdict(later.kv)
    n_cached = again.usage.prompt_tokens_details.cached_tokens
    assert n_cached == stats.n_prompt + stats.n_generated
    assert again.usage.prompt_tokens == n_cached + later.n_prompt
    assert text_of(ask(client, user(QUESTIONS[1], 2))) == alone

    # read anew: another first message, an edited history, or because the client says so
    for messages, options in (
        (turns, {}),
        ((turns[0], {**said, "content": "No."}, turns[2]), {}),
        (turns, {"extra_body": {"cache_prompt": False}}),
    ):
        ask(client, user(QUESTIONS[0], 1))
        if messages is turns and not options:
            ask(client, user("Something else"))
        fresh = ask(client, *messages, **options)
        assert fresh.usage.prompt_tokens_details.cached_tokens == 0
        assert fresh.usage.kv["n_evictions"] == 1


def test_messages_before_the_last_are_part_of_the_prompt(client: openai.OpenAI, llava: VisionModel) -> None:
    told, _ = expected(llava, (QUESTIONS[0], []), system="Be brief.")[0]
    plain, _ = expected(llava, (QUESTIONS[0], []))[0]
    assert told != plain
    for role in ("system", "developer"):
        assert text_of(ask(client, {"role": role, "content": "Be brief."}, user(QUESTIONS[0]))) == told
    assert text_of(ask(client, {"role": "user", "content": QUESTIONS[0]})) == plain
    history = (user("Hello", 1), {"role": "assistant", "content": "Hello."})
    assert text_of(ask(client, *history, user(QUESTIONS[0]))) not in (plain, told)


def test_a_request_says_how_it_is_sampled(client: openai.OpenAI) -> None:
    whole = text_of(ask(client, user("Hello"), max_tokens=40))
    stop = whole[10:13]
    cut = ask(client, user("Hello"), max_tokens=40, stop=[stop])
    assert text_of(cut) == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert ask(client, user("Hello"), max_tokens=3).choices[0].finish_reason == "length"
    assert ask(client, user("Hello"), max_completion_tokens=3).usage.completion_tokens == 3

    seeds = [text_of(ask(client, user("Hello"), temperature=1, seed=seed)) for seed in (1, 1, 2)]
    assert seeds[0] == seeds[1] != seeds[2]
    assert len({text_of(ask(client, user("Hello"), temperature=1)) for _ in range(3)}) == 3

    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    assert list(json.loads(text_of(ask(client, user("Hello"), max_tokens=60, response_format=wanted)))) == [
        "n"
    ]
    wanted = {"type": "json_object", "schema": schema}
    assert list(json.loads(text_of(ask(client, user("Hello"), max_tokens=60, response_format=wanted)))) == [
        "n"
    ]


def test_requests_queue_for_the_one_slot(client: openai.OpenAI, llava: VisionModel) -> None:
    wanted = [expected(llava, (QUESTIONS[seed % 3], [seed]))[0][0] for seed in range(6)]
    found: list[str] = [""] * 6

    def work(seed: int) -> None:
        found[seed] = text_of(ask(client, user(QUESTIONS[seed % 3], seed)))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == wanted


def test_it_says_what_it_serves_and_that_it_is_well(client: openai.OpenAI, address: str) -> None:
    (model,) = client.models.list().data
    assert model.id == "model-f16" and model.created > 0
    with urllib.request.urlopen(address.removesuffix("/v1") + "/health") as response:
        assert json.load(response) == {"status": "ok"}


def test_what_the_server_was_told_is_for_requests_that_say_nothing(llava: VisionModel) -> None:
    told, _ = expected(llava, (QUESTIONS[0], []), system="Be brief.")[0]
    options = ("--system", "Be brief.", "-n", N, "--n-ctx", 1024)
    with serving(*options) as (address, _):
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
        reply = client.chat.completions.create(
            model="any", messages=[{"role": "user", "content": QUESTIONS[0]}]
        )
        assert text_of(reply) == told
        other = ask(client, {"role": "system", "content": "Be long."}, user(QUESTIONS[0]))
        assert text_of(other) != told


# --- what cannot be


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "a message of role 'tool'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "the last message must be the user's"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "type 'input_audio'"),
        ({"messages": [{"role": "user", "content": [7]}]}, "a part of type None"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/"}}]}
                ]
            },
            "an image is given as a data URL",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "data:,x"}]}]},
            "the data URL: not an image",
        ),
        ({"messages": [{"role": [None], "content": "x"}]}, "a message of role [None]"),
        (
            {"messages": [{"role": "user", "content": 0.5}]},
            "a message's content is 0.5: expected a text or a",
        ),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": "warm"}, "temperature: Input should be a valid number"),
        ({"n": 2}, "n must be 1"),
        ({"logprobs": True}, "logprobs is not supported"),
        ({"max_tokens": -3}, "n_predict is -3"),
        ({"max_tokens": 10**400}, "n_predict is 1000"),
        ({"response_format": {"type": "xml"}}, "response_format 'xml'"),
        ({"response_format": {"type": "json_object", "schema": {"type": "thing"}}}, "Unrecognized schema"),
        ({"grammar": "root ::= nothing"}, "the grammar is broken"),
        ({"stop": ""}, "a stop text is empty"),
        ({"messages": [{"role": "user", "content": "x" * 2000}]}, "--n-ctx allows 1024"),
    ],
)
def test_what_cannot_be_answered_is_a_400_in_openais_words(
    body: dict[str, Any], said: str, stream: bool, client: openai.OpenAI
) -> None:
    plain: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    with pytest.raises(openai.BadRequestError, match="400") as caught:
        client.post("/chat/completions", cast_to=object, body={**plain, "stream": stream, **body})
    error = caught.value.body
    assert isinstance(error, dict) and said in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["code"] == ("context_length_exceeded" if "--n-ctx" in said else None)
    assert ask(client, user("Hello")).usage.completion_tokens > 0, "it goes on"


@pytest.mark.parametrize(
    ("where", "data", "status"),
    [("/chat/completions", b"\xff{", 400), ("/chat/completions", b"{", 400), ("/nowhere", b"{}", 404)],
)
def test_what_no_client_asks_is_refused_in_openais_words(
    where: str, data: bytes, status: int, address: str
) -> None:
    request = urllib.request.Request(f"{address}{where}", data, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    assert caught.value.code == status
    error = json.load(caught.value)["error"]
    assert error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-m", "nowhere.gguf"], "nowhere.gguf"),
        (["--host", "192.0.2.1"], "cannot listen at 192.0.2.1"),
        (["--host", "no such host"], "cannot listen at no such host"),
        (["--port", "65536"], "--port is 65536"),
        (["--chat-template", "{{ 1 }}"], "the chat template cannot be used"),
        (["--policy", "best"], "unknown policy"),
        (["--image-memory", "-1"], "--image-memory is -1"),
    ],
)
def test_a_server_that_could_answer_nothing_is_refused_at_once(
    options: list[str], said: str, sparsemm: CommandLine
) -> None:
    arguments = [] if "-m" in options else ["-m", test_model("llava").gguf()]
    assert said in sparsemm("serve", *arguments, "--port", 0, *options).refusal


def test_a_port_that_is_taken_is_one_line(sparsemm: CommandLine) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = sparsemm("serve", "-m", test_model("llava").gguf(), "--port", port).refusal
    assert f"cannot listen at 127.0.0.1, port {port}: Address already in use" in said


def test_what_is_not_installed_is_named(sparsemm: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    said = sparsemm("serve", "-m", test_model("llava").gguf()).refusal
    assert "serving needs uvicorn, which is not installed: pip install 'sparsemm-edge[serve]'" in said


# --- clients that leave


LONG = {"max_tokens": 6000}


@contextmanager
def long_slot(model: VisionModel) -> Iterator[Slot]:
    eviction = Eviction(policy="uniform", budget=48, window=8, max_tail=16)
    with (
        Conversation(model, n_ctx=8000, eviction=eviction) as conversation,
        Slot(conversation, sampling=Sampling(), n_predict=N, system=None) as slot,
    ):
        yield slot


def test_an_answer_that_nobody_listens_to_is_given_up(llava: VisionModel) -> None:
    """Those that wait get their turn at once, and those that waited in vain get none."""

    async def first_pieces(pieces: AsyncIterator[Any]) -> None:
        async with aclosing(pieces) as listening:  # type: ignore[type-var]
            async for _ in listening:
                return

    async def whole(pieces: AsyncIterator[Any]) -> Any:
        return [piece async for piece in pieces]

    async def run(slot: Slot) -> tuple[Any, Any]:
        def job(**options: Any) -> Any:
            return slot.job(ChatRequest(messages=[{"role": "user", "content": "Hello"}], **options))

        await first_pieces(slot.answer(job(**LONG)))
        waiting = asyncio.ensure_future(whole(slot.answer(job(**LONG))))
        vain = asyncio.ensure_future(whole(slot.answer(job(**LONG))))
        await asyncio.sleep(0.1)
        waiting.cancel()
        vain.cancel()
        return await whole(slot.answer(job())), slot.conversation.stats()

    with long_slot(llava) as slot:
        started = time.monotonic()
        found, stats = asyncio.run(run(slot))
        took = time.monotonic() - started
    assert found[-1].stats == stats and stats.n_generated <= N
    with long_slot(llava) as slot:
        request = ChatRequest(messages=[{"role": "user", "content": "Hello"}], **LONG)
        started = time.monotonic()
        asyncio.run(whole(slot.answer(slot.job(request))))
        assert took < (time.monotonic() - started) / 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_makes_room_for_the_next(stream: bool, llava: VisionModel) -> None:
    with serving("--n-ctx", 60000, "--kv-max-tail", 16) as (address, process):
        host, port = address.removeprefix("http://").removesuffix("/v1").split(":")
        body = json.dumps(
            {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 50000, "stream": stream}
        ).encode()
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            if stream:
                assert connection.recv(10)
            else:
                time.sleep(0.5)
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=10)
        started = time.monotonic()
        assert ask(client, user("Hello")).usage.completion_tokens <= N
        assert time.monotonic() - started < 5
        assert process.poll() is None


@pytest.mark.parametrize(("how", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_server_is_stopped_in_the_middle_of_an_answer(how: signal.Signals, status: int) -> None:
    with serving("--n-ctx", 60000, "--kv-max-tail", 16) as (address, process):
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=30)
        chunks = iter(ask(client, user("Hello"), max_tokens=50000, stream=True))
        for _ in range(3):
            next(chunks)
        os.kill(process.pid, how)
        assert process.wait(timeout=30) in (status, -how)
        assert process.stderr is not None and "Traceback" not in process.stderr.read()
