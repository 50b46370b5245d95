"""An OpenAI-compatible HTTP server for a model with eviction.

It uses the request types of llama-cpp-python's server, but this package's runtime: `llama_cpp.Llama` splits
prompts into batches of 512 tokens, encodes images again for every request and does not know what is evicted.
"""

import asyncio
import hashlib
import json
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from llama_cpp.server.types import CreateChatCompletionRequest, ModelData, ModelList
from PIL import Image
from pydantic import Field
from starlette.exceptions import HTTPException

from sparsemm_edge.closing import Closing
from sparsemm_edge.errors import ContextFullError, SparseMMError
from sparsemm_edge.image_urls import open_image
from sparsemm_edge.runtime import Cancelled, Conversation, GenerationStats, Sampling
from sparsemm_edge.runtime.chat_template import Turn

_T = TypeVar("_T")
_Pieces = AsyncGenerator["str | _Done", None]
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_SAMPLED = (
    "temperature",
    "top_p",
    "min_p",
    "top_k",
    "repeat_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "grammar",
)
_NOT_SUPPORTED = ("functions", "tools", "logprobs", "logit_bias", "mirostat_mode", "min_tokens")


class ChatRequest(CreateChatCompletionRequest):
    """A chat completion request. Omitted fields use the server's options."""

    messages: list[dict[str, Any]] = Field(min_length=1)  # type: ignore[assignment]
    max_completion_tokens: int | None = None
    response_format: dict[str, Any] | None = None  # type: ignore[assignment]
    stream_options: dict[str, Any] | None = None
    cache_prompt: bool = True  # as llama-server's: False reads everything anew


@dataclass(frozen=True)
class _Said:
    """One message: its turn, and its images as sent by the client."""

    turn: Turn
    images: tuple[str, ...] = ()

    @property
    def identity(self) -> tuple[str, str, tuple[str, ...]]:
        """Identifies a message, to compare it with an earlier one."""
        images = tuple(hashlib.sha256(image.encode()).hexdigest() for image in self.images)
        return self.turn.role, self.turn.text.strip(), images


@dataclass(frozen=True)
class _Job:
    """A parsed request; n_predict None: no limit but the context."""

    said: tuple[_Said, ...]
    sampling: Sampling
    n_predict: int
    go_on: bool


@dataclass(frozen=True)
class _Done:
    """How an answer ended; n_cached: prompt positions that were in the cache already."""

    stats: GenerationStats
    n_cached: int

    @property
    def finish_reason(self) -> str:
        return "stop" if self.stats.ended else "length"

    def usage(self) -> dict[str, Any]:
        n_prompt, n_generated = self.n_cached + self.stats.n_prompt, self.stats.n_generated
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_generated,
            "total_tokens": n_prompt + n_generated,
            "prompt_tokens_details": {"cached_tokens": self.n_cached},
            "kv": asdict(self.stats.kv),
            "timings": asdict(self.stats.timings),
            "first_token": self.stats.first_token.to_dict(self.stats.read_bytes_per_s),
        }


class Slot(Closing):
    """The server's one conversation, for which requests queue.

    A request that continues the conversation computes only its new turns; any other starts a new one. Close
    it before the model, or use it in a `with`.
    """

    def __init__(
        self, conversation: Conversation, *, sampling: Sampling, n_predict: int, system: str | None
    ) -> None:
        """Args:
        conversation: for the slot's exclusive use.
        sampling: defaults for requests.
        n_predict: default for requests.
        system: the system message of requests without one.
        """
        self._conversation = conversation
        self._sampling = sampling
        self._n_predict = n_predict
        self._system = system
        self._history: list[Any] | None = None
        self._thread = ThreadPoolExecutor(1, "slot")
        self._closing = threading.Event()

    def stop(self) -> None:
        """Cancel the current answer and refuse further requests."""
        self._closing.set()

    def close(self) -> None:
        """Stop, and free the context."""
        self.stop()
        self._thread.shutdown(cancel_futures=True)
        self._conversation.close()

    def job(self, request: ChatRequest) -> _Job:
        """Parse a request.

        Raises:
            SparseMMError: an unsupported or invalid field.
        """
        for name in _NOT_SUPPORTED:
            if getattr(request, name):
                raise SparseMMError(f"{name} is not supported")
        if (request.n or 1) != 1:
            raise SparseMMError("n must be 1: there is one slot")
        said = tuple(_said(message) for message in request.messages)
        if said[-1].turn.role != "user":
            raise SparseMMError("the last message must be the user's")
        if self._system is not None and said[0].turn.role != "system":
            said = (_Said(Turn("system", self._system)), *said)
        n_predict = request.max_completion_tokens or request.max_tokens
        return _Job(
            said,
            _sampling(self._sampling, request),
            self._n_predict if n_predict is None else n_predict,
            request.cache_prompt,
        )

    async def answer(self, job: _Job) -> _Pieces:
        """The pieces of the answer and how it ended. Who stops to listen gives it up."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[str | _Done | BaseException]()
        gone = threading.Event()

        def put(item: str | _Done | BaseException) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, item)

        def work() -> None:
            if gone.is_set():  # while it waited for its turn
                return
            try:
                for item in self._answer(job, lambda: gone.is_set() or self._closing.is_set()):
                    put(item)
            except BaseException as error:
                put(error)

        self._thread.submit(work)
        try:
            while True:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if isinstance(item, _Done):
                    return
        finally:
            gone.set()

    def _answer(self, job: _Job, gone: Callable[[], bool]) -> Iterator[str | _Done]:
        """answer(), in the slot's thread."""
        conversation, identities = self._conversation, [said.identity for said in job.said]
        history, self._history = self._history, None  # unknown until the answer has ended
        go_on = job.go_on and history is not None and identities[:-1] == history
        options: dict[str, Any] = {
            "n_predict": job.n_predict,
            "sampling": job.sampling,
            "cancelled": gone,
        }
        n_cached = 0
        if go_on:
            assert conversation.context is not None
            last, n_cached = job.said[-1], conversation.n_held
            pieces = conversation.ask(last.turn.text, _opened(last.images), **options)
        else:
            turns = [said.turn for said in job.said]
            images = [image for said in job.said for image in _opened(said.images)]
            pieces = conversation.begin(turns, images, **options)
        text = ""
        with closing(pieces):
            for piece in pieces:
                if gone():
                    raise Cancelled
                text += piece
                yield piece
        stats = conversation.stats()
        # a text to stop at is held, but is not part of the answer
        if not job.sampling.stop:
            self._history = [*identities, _Said(Turn("assistant", text)).identity]
        yield _Done(stats, n_cached)


def make_app(slot: Slot, model_name: str) -> FastAPI:
    """The app: /v1/chat/completions, /v1/models and /health."""
    app = FastAPI(title="SparseMM Edge")
    created = int(time.time())

    @app.exception_handler(SparseMMError)
    async def refused(_: Request, error: SparseMMError) -> Response:
        return _error(str(error), "context_length_exceeded" if isinstance(error, ContextFullError) else None)

    @app.exception_handler(Cancelled)
    async def stopping(_: Request, error: Cancelled) -> Response:
        return JSONResponse({"error": _described("the server is being stopped")}, status_code=503)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return _error(f"{where}: {first['msg']}" if where else str(first["msg"]))

    @app.exception_handler(HTTPException)
    async def failed(_: Request, error: HTTPException) -> Response:
        """FastAPI's own errors: no such address, a body that is not UTF-8."""
        return _error(str(error.detail), status=error.status_code)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models", response_model=None)
    async def models() -> ModelList:
        described = {"id": model_name, "object": "model", "created": created, "owned_by": "sparsemm-edge"}
        return {"object": "list", "data": [cast(ModelData, {**described, "permissions": []})]}

    @app.post("/v1/chat/completions", response_model=None)
    async def complete(asked: ChatRequest, request: Request) -> Response:
        job = slot.job(asked)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model_name}
        pieces = slot.answer(job)
        if not asked.stream:
            found = await _unless_gone(request, _whole(pieces, head))
            return _gone() if found is None else JSONResponse(found)
        # what cannot be answered is an HTTP error, not the beginning of a stream
        first = await _unless_gone(request, anext(pieces))
        if first is None:
            return _gone()
        with_usage = bool((asked.stream_options or {}).get("include_usage"))
        return StreamingResponse(_stream(first, pieces, head, with_usage), media_type="text/event-stream")

    return app


async def _whole(pieces: _Pieces, head: dict[str, Any]) -> dict[str, Any]:
    """A response of OpenAI's chat API."""
    text = ""
    async with aclosing(pieces) as listening:
        async for piece in listening:
            if isinstance(piece, _Done):
                break
            text += piece
    assert isinstance(piece, _Done)
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": piece.finish_reason}
    return {**head, "object": "chat.completion", "choices": [choice], "usage": piece.usage()}


async def _stream(
    first: str | _Done, pieces: _Pieces, head: dict[str, Any], with_usage: bool
) -> AsyncIterator[str]:
    """The same as server-sent events."""

    def event(delta: dict[str, Any] | None, finish_reason: str | None = None, **more: Any) -> str:
        choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish_reason}]
        content = {**head, "object": "chat.completion.chunk", "choices": choices, **more}
        return f"data: {json.dumps(content)}\n\n"

    async with aclosing(pieces) as listening:
        yield event({"role": "assistant", "content": ""})
        piece = first
        try:
            while not isinstance(piece, _Done):
                yield event({"content": piece})
                piece = await anext(listening)
        except (SparseMMError, Cancelled) as error:  # in the middle: its status was sent already
            described = _described(str(error) or "the server is being stopped")
            yield f"data: {json.dumps({'error': described})}\n\n"
        else:
            yield event({}, piece.finish_reason)
            if with_usage:
                yield event(None, usage=piece.usage())
        yield "data: [DONE]\n\n"


async def _unless_gone(request: Request, wanted: Awaitable[_T]) -> _T | None:
    """What is wanted; None, and it is given up, if the client goes before."""
    task = asyncio.ensure_future(wanted)
    try:
        while not (await asyncio.wait({task}, timeout=0.2))[0]:
            if await request.is_disconnected():
                return None
        return task.result()
    finally:
        task.cancel()


def _said(message: dict[str, Any]) -> _Said:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in _ROLES:
        raise SparseMMError(f"a message of role {role!r}: expected one of {', '.join(_ROLES)}")
    if not isinstance(content, str | list | None):
        raise SparseMMError(f"a message's content is {content!r}: expected a text or a list of parts")
    texts, images = [], []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content or []:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url":
            given = part.get("image_url")
            url = given.get("url") if isinstance(given, dict) else given
            if not isinstance(url, str) or not url.lower().startswith("data:"):
                raise SparseMMError("an image is given as a data URL (data:image/png;base64,...)")
            images.append(url)
        else:
            raise SparseMMError(f"a part of type {kind!r} in a message: expected text or image_url")
    if images and role != "user":
        raise SparseMMError("only a user's message shows images")
    return _Said(Turn(_ROLES[role], "\n".join(texts), len(images)), tuple(images))


def _sampling(default: Sampling, request: ChatRequest) -> Sampling:
    """The sampling options of a request."""
    given = {
        name: getattr(request, name)
        for name in _SAMPLED
        if name in request.model_fields_set and getattr(request, name) is not None
    }
    if request.stop is not None:
        given["stop"] = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)
    wanted = request.response_format or {}
    kind = wanted.get("type", "text")
    if kind == "json_object":
        given["json_schema"] = json.dumps(wanted.get("schema") or {"type": "object"})
    elif kind == "json_schema":
        described = wanted.get("json_schema")
        schema = described.get("schema") if isinstance(described, dict) else None
        given["json_schema"] = json.dumps(schema or {"type": "object"})
    elif kind != "text":
        raise SparseMMError(f"response_format {kind!r}: expected text, json_object or json_schema")
    if "json_schema" in given or "grammar" in given:
        default = replace(default, grammar=None, json_schema=None)
    return replace(default, **given)


def _opened(images: tuple[str, ...]) -> list[Image.Image]:
    return [open_image(image) for image in images]


def _described(message: str, code: str | None = None) -> dict[str, Any]:
    return {"message": message, "type": "invalid_request_error", "param": None, "code": code}


def _error(message: str, code: str | None = None, status: int = 400) -> Response:
    return JSONResponse({"error": _described(message, code)}, status_code=status)


def _gone() -> Response:
    return Response(status_code=499)  # nginx's code for a client that left
