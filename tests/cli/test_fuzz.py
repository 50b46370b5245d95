"""Several hundred bad inputs of all kinds: no command ends in a traceback or a signal, all say one line.

The short version of the fuzz run; its seed is fixed, so that a failure stays. A longer one:
SPARSEMM_FUZZ_CASES=50 python -m pytest tests/cli/test_fuzz.py multiplies the cases by 50.
"""

from __future__ import annotations

import base64
import io
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from helpers.chat_templates import SHAPES
from helpers.paths import HELPERS, ROOT
from helpers.tiny_gguf import write_model
from sparsemm_edge.demo import DemoModel

WORKER = HELPERS / "fuzz_worker.py"
FACTOR = int(os.environ.get("SPARSEMM_FUZZ_CASES", "1"))
SECONDS_A_CASE = 60
DEMO = DemoModel()

ODD_TEXT = (
    "", " ", "-", "--", "-1", "0", "nan", "inf", "1e400", "9" * 5000, "4294967297", "99999999999", "0x10",
    "\u0663", "1,2", ",", "a,b", "64,", "~nobody/x", "~", ".", "..", "/", "/dev/null", "/dev/full",
    "x" * 5000, "a\nb", "\r", "\x1b[31m", "{", "}", "{{", "{{ x", "{% for %}", "[/b]", "[red]", "\u2028",
    "<__media__>", "<image>", "<|im_end|>", "data:,", "data:image/png;base64,!!", "file:///nowhere", "true",
    "null", "[]", "{}", '{"a": 1}', "grid", "documents", "full", "auto", "@nowhere", "@",
)  # fmt: skip
ODD_BYTES = (b"\xff", b"a\xffb", b"\xed\xa0\x80", b"\xc3", b"\xfe\xff")
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2**31, 2**64, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x",
    "\ud800", "a\nb", [], {}, [[]], [None], {"": None}, [1, [2, [3]]], "9" * 400,
)  # fmt: skip


class Case(NamedTuple):
    arguments: list[str | bytes]
    stdin: bytes = b""


class Worker:
    """The process that runs cases; a new one where the last died."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[str] | None = None

    def outcome(self, case: Case) -> dict[str, Any]:
        if self.process is None:
            changes = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "80"}
            path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
            self.process = subprocess.Popen(
                [sys.executable, str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=(self.folder / "stderr").open("ab"),
                text=True,
                cwd=self.folder,
                env=os.environ | changes | {"PYTHONPATH": path},
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        words = [
            word if isinstance(word, bytes) else word.encode("utf-8", "surrogatepass")
            for word in case.arguments
        ]
        job = {"arguments": [word.replace(b"\0", b"").hex() for word in words], "stdin": case.stdin.hex()}
        timer = threading.Timer(SECONDS_A_CASE, self.process.kill)
        timer.start()
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        timer.cancel()
        if line:
            return json.loads(line)  # type: ignore[no-any-return]
        status, self.process = self.process.wait(), None
        return {
            "status": status,
            "err": "",
            "failure": f"the process ended with {status} (-9: took too long)",
        }

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def check(cases: Iterator[Case], folder: Path) -> None:
    """Run all cases; whatever ended otherwise than well or in one line is shown."""
    worker, bad, n_refused, n = Worker(folder), [], 0, 0
    try:
        for n, case in enumerate(cases, 1):  # noqa: B007
            found = worker.outcome(case)
            errors = [line for line in found["err"].splitlines() if line.startswith("error: ")]
            refused = found["status"] == 2 and len(errors) == 1 and found["err"].splitlines()[-1] == errors[0]
            n_refused += bool(errors)
            if found["failure"] or not (refused or found["status"] == 0 or asks_for_help(case, found)):
                bad.append((case, found["status"], found["err"][-500:], found["failure"][-1500:]))
    finally:
        worker.close()
    assert not bad, "\n\n".join(map(str, bad[:5])) + f"\n{len(bad)} of {n}"
    assert n_refused > n / 4, "these are bad inputs: most are to be refused"


def asks_for_help(case: Case, found: dict[str, Any]) -> bool:
    return found["status"] == 2 and found["err"].startswith("Usage: ")


def spoiled(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, dropped, doubled or put in."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at = rng.randrange(len(data) + 1)
        length = rng.choice((1, 1, 2, 4, 8, 64))
        kind = rng.randrange(5)
        if kind == 0:
            data[at : at + length] = rng.randbytes(length)
        elif kind == 1:
            del data[at : at + length]
        elif kind == 2:
            data[at:at] = data[at : at + length]
        elif kind == 3:
            data[at : at + length] = rng.choice((b"\xff", b"\0", b"\x7f", b"\x80")) * length
        elif rng.random() < 0.2:
            del data[at:]
    return bytes(data)


def spoiled_json(content: Any, rng: random.Random) -> bytes:
    """JSON with an odd value somewhere, or that is spoiled as text."""
    content = json.loads(json.dumps(content))
    place, steps = content, rng.randrange(5)
    for _ in range(steps):
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            break
        key = rng.choice(keys)
        if rng.random() < 0.4 or not isinstance(place[key], dict | list) or not place[key]:
            if rng.random() < 0.2:
                del place[key]
            else:
                place[key] = rng.choice(ODD_VALUES)
            break
        place = place[key]
    data = json.dumps(content, ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")
    if rng.random() < 0.3:
        data = spoiled(data, rng)
    if rng.random() < 0.1:
        with suppress(ValueError):
            data = data.decode("utf-8").encode("utf-16")
    return data


# --- the kinds of input, with how many of each there are


def arguments(folder: Path, rng: random.Random) -> Iterator[Case]:
    """Any option of any command with any value, and words in between."""
    import typer

    from sparsemm_edge import cli

    tiny = str(write_model(folder / "tiny.gguf"))
    needed: dict[str, list[str]] = {
        "convert": [tiny, "--scores", str(DEMO.scores)],
        "inspect": [tiny],
        "fit": [tiny],
        "generate": ["-m", tiny, "-p", "x"],
        "chat": ["-m", tiny],
        "serve": ["-m", tiny, "--port", "0"],
        "kept": ["-m", tiny, "--mmproj", tiny, "--image", tiny, "-p", "x"],
        "profile": ["-m", "nowhere.gguf"],
        "bench": ["-m", "nowhere.gguf"],
        "eval": ["-m", tiny, "--mmproj", tiny, "--data", "grid", "--pages", "1"],
        "mmproj": [str(folder)],
        "score": [str(folder), "--pages", "1"],
        "scores show": [str(DEMO.scores)],
        "scores compare": [str(DEMO.scores), str(DEMO.scores)],
    }
    group = typer.main.get_command(cli.app)
    commands: dict[str, Any] = {}
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        for sub, each in getattr(command, "commands", {}).items():
            commands[f"{name} {sub}"] = each
        if not hasattr(command, "commands"):
            commands[name] = command
    # these would run for minutes, open a port, or write where they are
    commands = {name: each for name, each in commands.items() if name in needed}
    while True:
        name = rng.choice(list(commands))
        words: list[str | bytes] = list(needed[name])
        for _ in range(rng.choice((0, 1, 1, 2, 3))):
            option = rng.choice([each for each in commands[name].params if each.param_type_name == "option"])
            value = rng.choice((*ODD_TEXT, *ODD_BYTES))
            if rng.random() < 0.15:
                words.insert(rng.randrange(len(words) + 1), value)
            elif rng.random() < 0.1:
                words.append(rng.choice(option.opts))
            elif option.name not in ("out", "save_session"):
                words += [rng.choice(option.opts), value]
        if rng.random() < 0.1:
            del words[rng.randrange(len(words))]
        yield Case([*name.split(), *words], rng.randbytes(20))


def pictures(folder: Path, rng: random.Random) -> Iterator[Case]:
    tiny = write_model(folder / "tiny.gguf")
    page = Image.effect_noise((40, 30), 60)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x9003] = "2024:01:01 00:00:00"
    forms: list[bytes] = []
    for kind, picture, options in (
        ("PNG", page.convert("RGBA"), {}),
        ("PNG", page.convert("P"), {"transparency": 3}),
        ("PNG", Image.fromarray(np.asarray(page).astype(np.uint16) * 257), {}),
        ("JPEG", page.convert("CMYK"), {"exif": exif}),
        ("JPEG", page, {"exif": exif}),
        ("GIF", page, {"save_all": True, "append_images": [page]}),
        ("WEBP", page.convert("RGBA"), {"exif": exif}),
        ("TIFF", page.convert("F"), {}),
        ("TIFF", page, {"compression": "tiff_lzw", "exif": exif}),
        ("BMP", page, {}),
        ("ICO", page, {}),
        ("PPM", page, {}),
        ("TGA", page, {}),
        ("JPEG2000", page, {}),
        ("AVIF", page.convert("RGB"), {}),
    ):
        file = io.BytesIO()
        with suppress(OSError, KeyError):  # a Pillow without this format
            picture.save(file, kind, **options)
            forms.append(file.getvalue())
    while True:
        path = folder / "picture"
        path.write_bytes(spoiled(rng.choice(forms), rng))
        yield Case(["fit", str(tiny), "--image", str(path)])


def scores(folder: Path, rng: random.Random) -> Iterator[Case]:
    tiny = write_model(folder / "tiny.gguf")
    own = {"format": "sparsemm-edge/head-scores", "version": 1, "model": "Tiny", "n_layer": 2, "n_head": 4}
    own |= {"n_head_kv": 2, "dataset": "x", "n_pages": 3, "scores": [[0.0, 1, 2, 3], [4, 5, 6, 7]]}
    own |= {"convergence": [{"n_pages": 1, "spearman": 0.5, "top_overlap": 0.5}], "character_accuracy": 0.5}
    reference = {f"{layer}-{head}": [1.0, 2] for layer in range(2) for head in range(4)}
    path = folder / "scores.json"
    while True:
        path.write_bytes(spoiled_json(rng.choice((own, own, reference)), rng))
        command = rng.choice(("show", "compare", "convert", "convert"))
        if command == "convert":
            yield Case(
                ["convert", str(tiny), "--scores", str(path), "--out", str(folder / "c.gguf"), "--force"]
            )
        else:
            yield Case(["scores", command, str(path), *([str(path)] if command == "compare" else [])])


def questions(folder: Path, rng: random.Random) -> Iterator[Case]:
    """Data sets of eval; one that can be read meets a model that cannot be loaded."""
    tiny = write_model(folder / "tiny.gguf")
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    own = {"image": "a.png", "question": "?", "answers": ["x", 3], "metric": "anls", "task": "t"}
    docvqa = {"questionId": 1, "docId": 2, "image": "a.png", "question": "?", "answers": ["x"]}
    other = {"file_name": "a.png", "query": "?", "label": "x"}
    while True:
        data = folder / "data"
        data.mkdir(exist_ok=True)
        for old in data.iterdir():
            old.unlink()
        if rng.random() < 0.5:
            lines = [spoiled_json(own, rng).replace(b"\n", b" ") for _ in range(rng.randrange(4))]
            (data / "q.jsonl").write_bytes(b"\n".join(lines))
        else:
            rows = [rng.choice((docvqa, other))] * 2
            (data / "val.json").write_bytes(spoiled_json(rng.choice((rows, {"data": rows})), rng))
        command = [
            "eval",
            "-m",
            str(tiny),
            "--mmproj",
            str(tiny),
            "--data",
            str(data),
            "--policies",
            "uniform",
        ]
        yield Case([*command, "--out", str(folder / f"out-{rng.randrange(10**9)}")])


def headers(folder: Path, rng: random.Random) -> Iterator[Case]:
    """The head of a GGUF file, through what reads it without llama.cpp (with: llama/test_broken_gguf.py)."""
    from sparsemm_edge.budgets import BudgetSpec
    from sparsemm_edge.convert import convert

    model = write_model(folder / "tiny.gguf")
    own = {f"{layer}-{head}": [1.0 + head] for layer in range(2) for head in range(4)}
    known = folder / "known.json"
    known.write_text(json.dumps(own))
    whole = [
        model.read_bytes(),
        convert(
            model, known, folder / "c.gguf", spec=BudgetSpec().override(budget=64), n_prompt=100
        ).path.read_bytes(),
    ]
    path = folder / "spoiled.gguf"
    while True:
        data = rng.choice(whole)
        head = rng.choice((64, 400, 1200, 2400))  # mostly within the keys
        path.write_bytes(spoiled(data[:head], rng) + data[head:])
        if rng.random() < 0.5:
            yield Case(["inspect", str(path), *rng.choice(([], ["--json"]))])
        else:
            yield Case(
                ["convert", str(path), "--scores", str(known), "--out", str(folder / "o.gguf"), "--force"]
            )


def checkpoints(folder: Path, rng: random.Random) -> Iterator[Case]:
    demo = ROOT / "models" / "demo"
    texts = {name: json.loads((demo / name).read_text()) for name in ("config.json", "processor_config.json")}
    (folder / "model.safetensors").symlink_to(demo / "model.safetensors")
    while True:
        spoiled_one = rng.choice(list(texts))
        for name, content in texts.items():
            data = spoiled_json(content, rng) if name == spoiled_one else json.dumps(content).encode()
            (folder / name).write_bytes(data)
        yield Case(["mmproj", str(folder), "--out", str(folder / "mmproj.gguf"), "--force"])


def scored(folder: Path, rng: random.Random) -> Iterator[Case]:
    """What score reads: a checkpoint's files, pages, and an unfinished run; answers are two tokens long."""
    from helpers.vision_models import letters_folder, make

    whole, pages = make("llava", folder / "whole"), letters_folder(folder / "pages", 1)
    texts = [path.name for path in whole.iterdir() if path.suffix == ".json"]
    records = json.loads((pages / "pages.json").read_text())
    key = {"model": "m", "data": "letters", "question": "?", "max_new_tokens": 2, "dtype": "auto"}
    done = {"name": "a", "n_tokens": 2, "n_scored": 1, "accuracy": 0.5, "scores": [[0, 1, 0.5]]}
    partial = {"key": key, "shape": {"n_layer": 3, "n_head": 4, "n_head_kv": 2}, "pages": {"0": done}}
    out = folder / "s.json"
    words = ["--max-new-tokens", "2", "--pages", "1", "--device", "cpu", "--prompt", "?"]
    checkpoint = folder / "m"
    while True:
        shutil.rmtree(checkpoint, ignore_errors=True)
        checkpoint.mkdir()
        for path in whole.iterdir():
            (checkpoint / path.name).symlink_to(path)
        (pages / "pages.json").write_text(json.dumps(records))
        more: list[str] = ["--force"]
        kind = rng.random()
        if kind < 0.6:
            name = rng.choice((*texts, "config.json", "config.json", "model.safetensors"))
            (checkpoint / name).unlink()
            if name == "model.safetensors":
                data = (whole / name).read_bytes()
                data = spoiled(data[:2000], rng) + data[2000:]  # mostly within its head
            else:
                data = spoiled_json(json.loads((whole / name).read_text()), rng)
            (checkpoint / name).write_bytes(data)
        elif kind < 0.85:
            (pages / "pages.json").write_bytes(spoiled_json(records, rng))
        else:
            out.unlink(missing_ok=True)
            own = partial | {"key": key | {"model": str(checkpoint), "data": "pages"}}
            out.with_name("s.json.partial").write_bytes(spoiled_json(own, rng))
            more = ["--resume"]
        yield Case(["score", str(checkpoint), "--data", str(pages), "--out", str(out), *words, *more])


def templates(folder: Path, rng: random.Random) -> Iterator[Case]:
    known = [shape[0] for shape in SHAPES.values()]
    pieces = (
        "{{ messages }}",
        "{{ messages[0] }}",
        "{{ 1/0 }}",
        "{% if %}",
        "{{ x.y.z }}",
        "{{ bos_token * 9 }}",
    )
    pieces += (
        "{{ raise_exception(messages) }}",
        "{{ messages[0].content[0] }}",
        "{{ [1] | sum }}",
        "\0",
        "\u4e16",
    )
    while True:
        text = rng.choice(known)
        at = rng.randrange(len(text))
        if rng.random() < 0.5:
            data = (text[:at] + rng.choice(pieces) + text[at:]).encode()
        else:
            data = spoiled(text.encode(), rng)
        (folder / "t.jinja").write_bytes(data)
        given = str(folder / "t.jinja") if rng.random() < 0.6 else data
        words = ["generate", "-m", str(DEMO.model), "--threads", "1", "-n", "1", "--n-ctx", "2000"]
        yield Case([*words, "-p", rng.choice(ODD_TEXT[:40]) or "x", "--chat-template", given])


def typed(folder: Path, rng: random.Random) -> Iterator[Case]:
    """What comes in on stdin: a chat's lines, commands among them."""
    commands = [
        "/image",
        "/image ",
        "/image\t",
        "/image ~nobody/x.png",
        "/image '",
        '/image "a b',
        "/reset",
        "/stats",
    ]
    commands += [
        "/help",
        "/",
        "//",
        "/exit now",
        "/save",
        "/load",
        "/system",
        "/retry",
        "/regen",
        "/save /",
        "/load /",
    ]
    while True:
        lines = [
            rng.choice(
                (
                    rng.choice(commands).encode(),
                    rng.choice(ODD_TEXT[:40]).encode("utf-8", "surrogatepass")[:200],
                    rng.choice(ODD_BYTES),
                    rng.randbytes(8),
                )
            )
            for _ in range(3)
        ]
        yield Case(
            ["chat", "-m", str(DEMO.model), "--threads", "1", "-n", "1", "--n-ctx", "500"],
            rng.choice((b"\n", b"\r\n")).join(lines),
        )


def sessions(folder: Path, rng: random.Random) -> Iterator[Case]:
    from sparsemm_edge.runtime import Conversation, VisionModel

    with VisionModel.load(DEMO.model, n_threads=1) as model, Conversation(model, n_ctx=200) as conversation:
        list(conversation.ask("x", n_predict=2))
        conversation.save(folder / "whole")
    data = (folder / "whole").read_bytes()
    head = data.index(b"\n")
    while True:
        if rng.random() < 0.5:
            (folder / "session").write_bytes(spoiled_json(json.loads(data[:head]), rng) + data[head:])
        else:
            (folder / "session").write_bytes(spoiled(data[: head + 200], rng) + data[head + 200 :])
        arguments = ["generate", "-m", str(DEMO.model), "--threads", "1", "-n", "1", "-p", "y"]
        yield Case([*arguments, "--load-session", str(folder / "session")])


KINDS: dict[Callable[[Path, random.Random], Iterator[Case]], int] = {
    arguments: 150,
    pictures: 100,
    scores: 60,
    questions: 60,
    headers: 100,
    checkpoints: 12,
    scored: 60,
    templates: 40,
    typed: 15,
    sessions: 15,
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_bad_input_is_one_line(kind: Callable[[Path, random.Random], Iterator[Case]], tmp_path: Path) -> None:
    cases = kind(tmp_path, random.Random(kind.__name__))
    check((next(cases) for _ in range(KINDS[kind] * FACTOR)), tmp_path)


def test_bad_requests_are_answered_in_one_line() -> None:
    """What a server is sent: an answer, or a 400 that says why; never a 500."""
    from starlette.testclient import TestClient

    from sparsemm_edge.runtime import Conversation, Eviction, Sampling, VisionModel
    from sparsemm_edge.server import Slot, make_app

    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    shown = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]
    asked = [{"role": "system", "content": "x"}, {"role": "user", "content": "Hello"}]
    bodies: list[dict[str, Any]] = [
        {"messages": asked},
        {"messages": [{"role": "user", "content": shown}], "stop": ["x"], "seed": 3},
        {"messages": [*asked, {"role": "assistant", "content": "y"}, asked[1]], "temperature": 0.5},
        {"messages": asked, "response_format": {"type": "json_object", "schema": {"type": "integer"}}},
        {
            "messages": asked,
            "response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": [1]}}},
        },
        {"messages": asked, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "repeat_penalty": 1.1, "model": "x"},
        {
            "messages": asked,
            "stream": True,
            "stream_options": {"include_usage": True},
            "grammar": "root ::= [a]",
        },
    ]
    rng, statuses, bad = random.Random("requests"), [], []
    eviction = Eviction(policy="uniform", budget=64, window=8)
    with (
        VisionModel.load(DEMO.model, DEMO.mmproj, n_threads=1) as model,
        Conversation(model, n_ctx=600, eviction=eviction) as conversation,
        Slot(conversation, sampling=Sampling(), n_predict=2, system=None) as slot,
        TestClient(make_app(slot, "m"), raise_server_exceptions=False) as client,
    ):
        for _ in range(150 * FACTOR):
            data = spoiled_json(rng.choice(bodies) | {"max_tokens": 2}, rng)
            answer = client.post(
                "/v1/chat/completions", content=data, headers={"Content-Type": "application/json"}
            )
            statuses.append(answer.status_code)
            message = answer.json()["error"]["message"] if answer.status_code == 400 else "x"
            if answer.status_code not in (200, 400) or not message or "\n" in message:
                bad.append((data[:300], answer.text))
        plain = client.post("/v1/chat/completions", json=bodies[0])
    assert not bad, "\n\n".join(map(str, bad[:5])) + f"\n{len(bad)} of {len(statuses)}"
    assert plain.status_code == 200, "it goes on"
    assert statuses.count(400) > len(statuses) / 4
