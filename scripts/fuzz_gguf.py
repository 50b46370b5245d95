#!/usr/bin/env python3
"""Load GGUF files with a broken head: every one has to be refused in a line, or to load and answer.

    fuzz_gguf.py --seconds 600 --out build/fuzz          as many cases as fit into the time
    fuzz_gguf.py --seed 7 --cases 300                    these 300 cases
    fuzz_gguf.py --seed 7 --only 123 --out build/fuzz    case 123 of them again, its file kept

A case is a tiny converted model with some of its bytes or keys changed, three times in four among the
`sparsemm.*` keys. It goes through the Python readers, which may raise nothing but SparseMMError, and through
llama.cpp, which may refuse the file or load it; what loads makes a context, reads a prompt that evicts, and
decodes. All of that runs in a child process of limited memory, so that a crash is a result as well.

What fails here is tried with --stock, a folder with the libraries of the unpatched llama.cpp: what fails
there too is counted as upstream's, and so is what a sanitizer finds in ggml's parser of the header, which
runs before any code of the patch. For AddressSanitizer and UBSan see `make sanitize`: run this script with
the LLAMA_CPP_LIB_PATH and LD_PRELOAD that stand there.

Exit code 1 if a case failed that is not upstream's; its file is in --out, with a .txt that says how.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

N_LAYER, N_HEAD, N_HEAD_KV, HEAD_DIM, N_VOCAB = 2, 4, 2, 32, 260
WINDOW, BUDGET, N_PROMPT = 8, 40, 100
MEMORY = 4 << 30  # bytes of address space that a child may take, without sanitizers
CASE_SECONDS = 300  # a case that takes longer hangs

# --- the model whose head is broken


def write_model(path: Path, changes: dict[str, Any] | None = None, weight: float | None = None) -> Path:
    """A LLaMA of two layers with `sparsemm.*` keys.

    Args:
        changes: by key: (value, type, type of an array's items or None), or None to leave the key out.
        weight: the value of all weights, for instance NaN; None: random ones.
    """
    kind = gguf.GGUFValueType
    n_embd = N_HEAD * HEAD_DIM
    tokens = ["<unk>", "<s>", "</s>", "x", *(f"<0x{i:02X}>" for i in range(256))]
    budgets = [BUDGET, 60, 30, 120]
    fields: dict[str, Any] = {
        "llama.block_count": (N_LAYER, kind.UINT32, None),
        "llama.context_length": (512, kind.UINT32, None),
        "llama.embedding_length": (n_embd, kind.UINT32, None),
        "llama.feed_forward_length": (n_embd, kind.UINT32, None),
        "llama.attention.head_count": (N_HEAD, kind.UINT32, None),
        "llama.attention.head_count_kv": (N_HEAD_KV, kind.UINT32, None),
        "llama.attention.layer_norm_rms_epsilon": (1e-5, kind.FLOAT32, None),
        "llama.rope.dimension_count": (HEAD_DIM, kind.UINT32, None),
        "tokenizer.ggml.model": ("llama", kind.STRING, None),
        "tokenizer.ggml.tokens": (tokens, kind.ARRAY, kind.STRING),
        "tokenizer.ggml.scores": ([0.0] * N_VOCAB, kind.ARRAY, kind.FLOAT32),
        "tokenizer.ggml.token_type": ([2, 3, 3, 1] + [6] * 256, kind.ARRAY, kind.INT32),
        "sparsemm.version": (1, kind.UINT32, None),
        "sparsemm.enabled": (True, kind.BOOL, None),
        "sparsemm.policy": ("sparsemm", kind.STRING, None),
        "sparsemm.budget": (BUDGET, kind.UINT32, None),
        "sparsemm.window": (WINDOW, kind.UINT32, None),
        "sparsemm.pool_kernel": (7, kind.UINT32, None),
        "sparsemm.floor_ratio": (0.1, kind.FLOAT32, None),
        "sparsemm.water_fill_length": (0, kind.UINT32, None),
        "sparsemm.seed": (0, kind.UINT32, None),
        "sparsemm.scores_source": ("fuzz", kind.STRING, None),
        "sparsemm.head_budgets": (budgets, kind.ARRAY, kind.UINT32),
        "sparsemm.head_scores": ([0.125] * N_LAYER * N_HEAD, kind.ARRAY, kind.FLOAT32),
    }
    writer = gguf.GGUFWriter(path, "llama")
    for key, field in (fields | (changes or {})).items():
        if field is not None:
            writer.add_key_value(key, *field)
    rng = np.random.default_rng(0)

    def matrix(*shape: int) -> np.ndarray:
        drawn = rng.normal(0, 0.2, shape).astype(np.float32)
        return drawn if weight is None else np.full_like(drawn, weight)

    n_kv = N_HEAD_KV * HEAD_DIM
    writer.add_tensor("token_embd.weight", matrix(N_VOCAB, n_embd))
    writer.add_tensor("output_norm.weight", np.ones(n_embd, np.float32))
    for il in range(N_LAYER):
        for name, rows in (("attn_q", n_embd), ("attn_k", n_kv), ("attn_v", n_kv), ("attn_output", n_embd)):
            writer.add_tensor(f"blk.{il}.{name}.weight", matrix(rows, n_embd))
        for name in ("ffn_gate", "ffn_up", "ffn_down"):
            writer.add_tensor(f"blk.{il}.{name}.weight", matrix(n_embd, n_embd))
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{il}.{name}.weight", np.ones(n_embd, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# --- how it is broken

NUMBERS = (0, 1, 2, 6, 7, 8, 9, 255, 256, 1023, 1025, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
LENGTHS = (0, 1, 3, 5, 2**16, 2**31, 2**32, 2**60, 2**62, 2**63, 2**64 - 8, 2**64 - 1)
FLOATS = (float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e38, -1e-45)


@dataclass(frozen=True)
class Place:
    """Where something of one key is in the file: what is "key", "type", "length", "items" or "value"."""

    what: str
    offset: int
    size: int
    sparsemm: bool


def places(data: bytes) -> list[Place]:
    """Where the counts and keys of a good GGUF file are."""
    found = [Place("length", 8, 8, False), Place("length", 16, 8, False)]
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    (n_fields,) = struct.unpack_from("<Q", data, 16)
    at = 24
    for _ in range(n_fields):
        (length,) = struct.unpack_from("<Q", data, at)
        ours = data[at + 8 : at + 8 + length].startswith(b"sparsemm.")
        (kind,) = struct.unpack_from("<I", data, at + 8 + length)
        found.append(Place("length", at, 8, ours))
        found.append(Place("key", at + 8, length, ours))
        found.append(Place("type", at + 8 + length, 4, ours))
        at += 12 + length
        if kind == 9:
            item, count = struct.unpack_from("<IQ", data, at)
            found += [Place("type", at, 4, ours), Place("length", at + 4, 8, ours)]
            start = at = at + 12
            for _ in range(count):
                at += sizes[item] if item in sizes else 8 + struct.unpack_from("<Q", data, at)[0]
            found.append(Place("items", start, at - start, ours))
        elif kind == 8:
            (length,) = struct.unpack_from("<Q", data, at)
            found += [Place("length", at, 8, ours), Place("items", at + 8, length, ours)]
            at += 8 + length
        else:
            found.append(Place("value", at, sizes[kind], ours))
            at += sizes[kind]
    return found


def spoil(data: bytearray, place: Place, rng: random.Random) -> None:
    """Put something else into one place."""
    at, size = place.offset, place.size
    if place.what == "type":
        struct.pack_into("<I", data, at, rng.choice([*range(14), 2**31, 2**32 - 1]))
    elif place.what == "length":
        (now,) = struct.unpack_from("<Q", data, at)
        struct.pack_into("<Q", data, at, rng.choice([*LENGTHS, max(now - 1, 0), now + 1, 2 * now]))
    elif place.what == "value" and size == 4 and rng.random() < 0.8:
        number = rng.choice(NUMBERS) if rng.random() < 0.7 else rng.getrandbits(32)
        data[at : at + 4] = (
            struct.pack("<f", rng.choice(FLOATS)) if rng.random() < 0.2 else number.to_bytes(4, "little")
        )
    elif place.what == "items" and size >= 4 and rng.random() < 0.8:
        offset = at + 4 * rng.randrange(size // 4)
        word = (
            struct.pack("<f", rng.choice(FLOATS))
            if rng.random() < 0.5
            else rng.choice(NUMBERS).to_bytes(4, "little")
        )
        data[offset : offset + 4] = word
    elif size:
        data[at + rng.randrange(size)] ^= 1 << rng.randrange(8)


def rewritten(path: Path, rng: random.Random) -> bytes:
    """The model with one or two of the `sparsemm.*` keys left out, or of another type or length."""
    kind = gguf.GGUFValueType
    scalars: tuple[Callable[[], Any], ...] = (
        lambda: (rng.choice(NUMBERS), kind.UINT32, None),
        lambda: (-1, kind.INT32, None),
        lambda: (rng.choice(LENGTHS), kind.UINT64, None),
        lambda: (rng.choice(FLOATS), kind.FLOAT32, None),
        lambda: (rng.random() < 0.5, kind.BOOL, None),
        lambda: ("x" * rng.choice((0, 1, 70000)), kind.STRING, None),
    )
    arrays: tuple[Callable[[int], Any], ...] = (
        lambda n: ([rng.choice(NUMBERS) for _ in range(n)], kind.ARRAY, kind.UINT32),
        lambda n: ([rng.choice((-1, -(2**31), BUDGET)) for _ in range(n)], kind.ARRAY, kind.INT32),
        lambda n: ([rng.choice(FLOATS) for _ in range(n)], kind.ARRAY, kind.FLOAT32),
        lambda n: ([BUDGET] * n, kind.ARRAY, kind.UINT64),
        lambda n: (["x"] * n, kind.ARRAY, kind.STRING),
        lambda n: ([True] * n, kind.ARRAY, kind.BOOL),
    )
    keys = ["version", "enabled", "window", "pool_kernel", "head_budgets", "head_budgets", "head_scores"]
    keys += ["budget", "policy", "floor_ratio", "water_fill_length", "seed", "scores_source"]
    changes: dict[str, Any] = {}
    for key in rng.sample(keys, rng.choice((1, 1, 2))):
        choice = rng.random()
        if choice < 0.15:
            changes[f"sparsemm.{key}"] = None
        elif (choice < 0.75) == key.startswith("head_"):
            n = rng.choice((1, 3, 4, 5, 8, 4096, N_LAYER * N_HEAD_KV, N_LAYER * N_HEAD_KV))
            changes[f"sparsemm.{key}"] = rng.choice(arrays)(n)
        else:
            changes[f"sparsemm.{key}"] = rng.choice(scalars)()
    return write_model(path, changes).read_bytes()


def make_case(base: bytes, where: list[Place], seed: int, index: int, path: Path) -> None:
    """Write case `index` of a seed."""
    rng = random.Random(f"{seed}/{index}")
    if rng.random() < 0.5:
        path.write_bytes(rewritten(path, rng))
        return
    data = bytearray(base)
    head = where[-1].offset + where[-1].size
    ours = [place for place in where if place.sparsemm]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        spoil(data, rng.choice(ours if rng.random() < 0.75 else where), rng)
    if rng.random() < 0.05:
        data = data[: rng.randrange(head)]
    path.write_bytes(data)


# --- what happens: in the child


def try_readers(path: Path) -> str:
    """What the Python readers say."""
    from sparsemm_edge.errors import SparseMMError
    from sparsemm_edge.gguf_header import read_header
    from sparsemm_edge.gguf_metadata import check_supported, model_shape, sparsemm_metadata

    try:
        header = read_header(path)
        shape = model_shape(header)
        found = sparsemm_metadata(header)
        check_supported(header, shape)
        return "read" if found else "read, no metadata"
    except SparseMMError as error:
        if "\n" in str(error):
            return f"FAULT several lines: {error!r}"
        return "refused"
    except BaseException as error:
        return f"FAULT {type(error).__name__}: {error}"


class Llama:
    """llama.cpp, patched or not, by its C functions."""

    def __init__(self) -> None:
        import llama_cpp.llama_cpp as lib

        self.lib = lib
        self.lines: list[tuple[int, str]] = []
        self._log = lib.llama_log_callback(
            lambda level, text, _: self.lines.append((level, text.decode("utf-8", "replace")))
        )
        lib.llama_log_set(self._log, None)
        lib.llama_backend_init()
        self.stats = getattr(lib._lib, "llama_memory_heads_stats", None)
        if self.stats:
            self.stats.argtypes, self.stats.restype = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_bool

    def attempt(self, path: Path) -> str:
        """Load a file; read a prompt that ends in an eviction, decode, read on and evict again."""
        lib = self.lib
        self.lines.clear()
        model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        if not model:
            errors = [text for level, text in self.lines if level == 4]
            if any(word in text for text in errors for word in ("bad_alloc", "bad_array_new", "max_size")):
                return f"FAULT a huge allocation: {errors[0].strip()}"
            return "refused" if errors else "FAULT refused without a line"
        warned = any("will not evict" in text for level, text in self.lines if level == 3)
        try:
            params = lib.llama_context_default_params()
            params.n_ctx = params.n_batch = params.n_ubatch = 256
            params.n_threads = params.n_threads_batch = 1
            context = lib.llama_init_from_model(model, params)
            if not context:
                return (
                    "no context"
                    if any(level == 4 for level, _ in self.lines)
                    else "FAULT no context, no line"
                )
            for first, n in ((0, N_PROMPT), (N_PROMPT, 1), (N_PROMPT + 1, 20), (N_PROMPT + 21, 1)):
                if first + n <= lib.llama_n_ctx(context) and self.decode(context, first, n) != 0:
                    return "FAULT llama_decode failed"
            stats = ctypes.create_string_buffer(256)
            evicts = bool(self.stats and self.stats(lib.llama_get_memory(context), stats))
            lib.llama_free(context)
        finally:
            lib.llama_model_free(model)
        return "evicts" if evicts else "does not evict, warned" if warned else "does not evict"

    def decode(self, context: int, first: int, n: int) -> int:
        lib = self.lib
        n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(lib.llama_get_model(context)))
        batch = lib.llama_batch_init(n, 0, 1)
        batch.n_tokens = n
        for i in range(n):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = (
                (first + i) % min(n_vocab, N_VOCAB),
                first + i,
                1,
            )
            batch.seq_id[i][0], batch.logits[i] = 0, i == n - 1
        status: int = lib.llama_decode(context, batch)
        lib.llama_synchronize(context)
        lib.llama_batch_free(batch)
        return status


def child() -> None:
    """Answer each path on stdin with a line of JSON: [the readers' result, llama.cpp's result]."""
    results = os.fdopen(os.dup(1), "w", buffering=1)  # so that nothing else gets between
    os.dup2(2, 1)
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    llama = Llama()
    for line in sys.stdin:
        path = Path(line.rstrip("\n"))
        readers = try_readers(path)
        print(json.dumps([readers, "started"]), file=results)
        print(json.dumps([readers, llama.attempt(path)]), file=results)


# --- the parent


class Child:
    """A process that tries files; a new one after each crash.

    Attributes:
        environment: of the process.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self._process: subprocess.Popen[str] | None = None

    def attempt(self, path: Path) -> tuple[str, str]:
        """What the readers say, and what llama.cpp says or how it ended."""
        if self._process is None:
            self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
            self._process = subprocess.Popen(
                [sys.executable, __file__, "--child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=self.environment,
                text=True,
            )
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        readers = "FAULT the readers did not answer"
        watchdog = threading.Timer(CASE_SECONDS, process.kill)
        watchdog.start()
        try:
            process.stdin.write(f"{path}\n")
            process.stdin.flush()
            for line in process.stdout:
                readers, result = json.loads(line)
                if result != "started":
                    return readers, result
        except BrokenPipeError:
            pass
        finally:
            watchdog.cancel()
        code = process.wait()
        self._stderr.seek(0)
        said = self._stderr.read().strip()
        self.close()
        return readers, f"FAULT ended with {code}: {said[-6000:]}"

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None and self._process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.wait()
            self._process.stdout.close()
            self._stderr.close()
            self._process = None


def indices(options: argparse.Namespace) -> Iterator[int]:
    if options.only is not None:
        yield options.only
        return
    deadline = time.monotonic() + options.seconds
    index = 0
    while (options.cases is None or index < options.cases) and time.monotonic() < deadline:
        yield index
        index += 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, help="of the cases (default: the time)")
    parser.add_argument("--cases", type=int, help="how many (default: what fits into --seconds)")
    parser.add_argument("--seconds", type=float, default=60.0, help="stop after this long (default 60)")
    parser.add_argument("--only", type=int, metavar="I", help="case I only")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "fuzz", help="folder for what fails")
    parser.add_argument("--stock", type=Path, help="folder of the unpatched libraries, to try failures with")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child()
        return 0

    seed = int(time.time()) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    patched, stock = Child(dict(os.environ)), None
    if options.stock:
        libraries = dict.fromkeys(("LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB"), str(options.stock.resolve()))
        others = ("LD_PRELOAD", "LD_LIBRARY_PATH")
        environment = {name: value for name, value in os.environ.items() if name not in others}
        stock = Child(environment | libraries)

    counts: Counter[str] = Counter()
    n_own = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.gguf"
        base = write_model(path).read_bytes()
        where = places(base)
        good = patched.attempt(path)
        assert good == ("read", "evicts"), good
        for index in indices(options):
            make_case(base, where, seed, index, path)
            readers, result = patched.attempt(path)
            counts[f"readers: {readers.split(':')[0]}"] += 1
            counts[f"llama.cpp: {result.split(':')[0]}"] += 1
            faults = [text for text in (readers, result) if text.startswith("FAULT")]
            upstream = False
            if result.startswith("FAULT") and stock is not None:
                upstream = "gguf_init_from_reader" in result or stock.attempt(path)[1].startswith("FAULT")
            if faults or options.only is not None:
                options.out.mkdir(parents=True, exist_ok=True)
                kept = options.out / f"case-{seed}-{index}.gguf"
                kept.write_bytes(path.read_bytes())
                kept.with_suffix(".txt").write_text(f"readers: {readers}\nllama.cpp: {result}\n")
            if upstream:
                counts["llama.cpp: of these, upstream's"] += 1
            if readers.startswith("FAULT") or (result.startswith("FAULT") and not upstream):
                n_own += 1
                print(f"case {index}: {faults[0].splitlines()[0][:200]} ({kept})", flush=True)
    for worker in (patched, stock):
        if worker:
            worker.close()
    for name, count in sorted(counts.items()):
        print(f"{count:7d}  {name}")
    print(f"{n_own} failed (seed {seed})")
    return int(n_own > 0)


if __name__ == "__main__":
    sys.exit(main())
