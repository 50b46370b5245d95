"""Answers prompts on the devices that llama.cpp finds, or on an RPC server: a process of its own for each.

Reads a job from stdin, writes {"devices": [...], "answers": [...]} to stdout, llama.cpp's log to stderr:

    {"rpc": "127.0.0.1:50052" or null, "library": folder of libggml, "model", "mmproj": files, "n_predict",
     "prompts": [{"question", "images": [files], "table": [n_layer][n_head_kv], "window", "vote", "residual",
                  "options": {...}}]}
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from sparsemm_edge.runtime import VisionModel, library
from sparsemm_edge.runtime.context import Context
from sparsemm_edge.runtime.encode import encode
from sparsemm_edge.runtime.eviction import HeadBudgetTable
from sparsemm_edge.runtime.library import llama


def ggml(folder: str, name: str, function: str, result: Any, *arguments: Any) -> Any:
    """A function of one of ggml's libraries."""
    (path,) = (p for p in Path(folder).iterdir() if p.name in (f"lib{name}.so", f"lib{name}.dylib"))
    found = getattr(ctypes.CDLL(str(path)), function)
    found.restype, found.argtypes = result, arguments
    return found


def devices(folder: str) -> list[str]:
    count = ggml(folder, "ggml", "ggml_backend_dev_count", ctypes.c_size_t)()
    get = ggml(folder, "ggml", "ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
    name = ggml(folder, "ggml-base", "ggml_backend_dev_name", ctypes.c_char_p, ctypes.c_void_p)
    return [name(get(i)).decode() for i in range(count)]


def keep_weights_as_they_are() -> None:
    """No copies of weights that suit the processor (AMX): a device behind RPC has none, so it rounds in
    another way."""
    default = llama.llama_model_default_params

    def params() -> Any:
        found = default()
        found.use_extra_bufts = False
        return found

    llama.llama_model_default_params = params


def answer(model: VisionModel, prompt: dict[str, Any], n_predict: int) -> dict[str, Any]:
    """Greedy tokens, their leads over the second best, and the positions that each head keeps."""
    table = np.array(prompt["table"], np.uint32)
    wanted = HeadBudgetTable(table, prompt["window"], 7, vote=prompt["vote"], residual=prompt["residual"])
    text = model.chat_prompt(prompt["question"], len(prompt["images"]))
    heads = [(il, ih) for il in range(model.shape.n_layer) for ih in range(model.shape.n_head_kv)]
    with (
        model.tokenize(text, prompt["images"]) as tokenized,
        Context(model, wanted, n_ctx=tokenized.n_tokens + n_predict, **prompt["options"]) as context,
    ):
        context.prefill(encode(model, tokenized))
        kept = [context.kept_positions(*head).tolist() for head in heads]
        tokens, leads = [], []
        for _ in range(n_predict):
            logits = context.logits()
            second, best = np.argsort(logits)[-2:]
            tokens.append(int(best))
            leads.append(float(logits[best] - logits[second]))
            context.decode(tokens[-1])
        assert context.kv_stats().n_evictions == 1
    return {"tokens": tokens, "leads": leads, "kept": kept}


def main() -> None:
    job = json.load(sys.stdin)
    folder = job["library"]
    library.require_patched()
    library.start(show_log=True)
    keep_weights_as_they_are()
    if job["rpc"]:
        add = ggml(folder, "ggml-rpc", "ggml_backend_rpc_add_server", ctypes.c_void_p, ctypes.c_char_p)
        register = ggml(folder, "ggml", "ggml_backend_register", None, ctypes.c_void_p)
        server = add(job["rpc"].encode())
        assert server
        register(server)
    with VisionModel.load(job["model"], job["mmproj"], n_threads=1, show_log=True) as model:
        answers = [answer(model, prompt, job["n_predict"]) for prompt in job["prompts"]]
    json.dump({"devices": devices(folder), "answers": answers}, sys.stdout)
    sys.stdout.flush()
    llama.llama_backend_free()


if __name__ == "__main__":
    main()
