"""A conversation in which one allocation fails, for test_out_of_memory.py: a JSON line for each that can.

Arguments: model, mmproj, two images, head budget, which prompt fails (0 or 1), and what it lacks: `buffer`,
one of ggml's, or `new`, memory that C++ takes while llama_decode reads it.
"""

import ctypes
import json
import sys
from typing import Any

import numpy as np

from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.runtime import Eviction, VisionModel
from sparsemm_edge.runtime.conversation import Conversation
from sparsemm_edge.runtime.library import llama

N_PREDICT = 6
N_NEW = 25
"""So many places at which C++ takes memory, of some thousand."""

MAX = 2**31 - 1


class Limit:
    """How many allocations succeed before one fails."""

    def __init__(self, preloaded: ctypes.CDLL, kind: str) -> None:
        self._counter = ctypes.c_int.in_dll(preloaded, {"buffer": "alloc_left", "new": "new_left"}[kind])
        self._left = -1
        self.decoding_only = kind == "new"  # the C functions around it do not catch what C++ throws
        if self.decoding_only:
            self._decode, llama.llama_decode = llama.llama_decode, self._limited

    def _limited(self, context: int, batch: Any) -> int:
        if batch.n_tokens == 1:
            return int(self._decode(context, batch))
        self._counter.value = self._left
        try:
            return int(self._decode(context, batch))
        finally:
            self._left, self._counter.value = self._counter.value, -1

    def arm(self, n: int) -> None:
        if self.decoding_only:
            self._left = n
        else:
            self._counter.value = n

    def disarm(self) -> int:
        """How many more would have succeeded; -1: one failed."""
        left, self._left = self._left if self.decoding_only else self._counter.value, -1
        self._counter.value = -1
        return left


def main(model_path: str, mmproj: str, image: str, image_2: str, budget: int, which: int, kind: str) -> None:
    preloaded = ctypes.CDLL(None)
    following = ctypes.c_void_p.in_dll(preloaded, "alloc_next")
    following.value = ctypes.cast(llama._lib.ggml_backend_buft_alloc_buffer, ctypes.c_void_p).value
    limit = Limit(preloaded, kind)
    eviction = Eviction(policy="uniform", budget=budget, window=8)
    with VisionModel.load(model_path, mmproj, n_threads=1) as model:
        asked = (("What is written here?", [image]), ("And here, on the other one? " * 20, [image_2]))

        def ask(conversation: Conversation, turn: int) -> str:
            question, images = asked[turn]
            return "".join(conversation.ask(question, images, n_predict=N_PREDICT))

        def begin(n_turns: int) -> Conversation:
            conversation = Conversation(model, eviction=eviction, n_ctx=1024)
            for turn in range(n_turns):
                ask(conversation, turn)
            return conversation

        with begin(0) as conversation:
            right = [ask(conversation, 0), ask(conversation, 1)]
        with begin(0) as conversation:
            right_alone = ask(conversation, 1)
        places = range(200)
        if limit.decoding_only:
            with begin(which) as conversation:
                limit.arm(MAX)
                ask(conversation, which)
                places = np.unique(np.linspace(0, MAX - limit.disarm() - 1, N_NEW).astype(int)).tolist()
        n_failed = 0
        for n in places:
            error = None
            with begin(which) as conversation:
                limit.arm(n)
                answer = None
                try:
                    answer = ask(conversation, which)
                except SparseMMError as raised:
                    error = str(raised)
                if limit.disarm() != -1:
                    break
                n_failed += 1
                lost = conversation.n_held == 0
                if error is not None:
                    answer = ask(conversation, which)
                again = answer == (right_alone if error and lost and which else right[which])
            print(json.dumps({"n": n, "error": error, "lost": lost, "again": again}), flush=True)
        print(json.dumps({"done": n_failed}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:5], int(sys.argv[5]), int(sys.argv[6]), sys.argv[7])
