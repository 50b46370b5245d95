"""A conversation in which one allocation fails, for test_out_of_memory.py: a JSON line for each that can.

Arguments: model, mmproj, two images, head budget, which prompt fails (0 or 1).
"""

import ctypes
import json
import sys

from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.runtime import Eviction, VisionModel
from sparsemm_edge.runtime.conversation import Conversation
from sparsemm_edge.runtime.library import llama

N_PREDICT = 6


def main(model_path: str, mmproj: str, image: str, image_2: str, budget: int, which: int) -> None:
    preloaded = ctypes.CDLL(None)
    left = ctypes.c_int.in_dll(preloaded, "alloc_left")
    following = ctypes.c_void_p.in_dll(preloaded, "alloc_next")
    following.value = ctypes.cast(llama._lib.ggml_backend_buft_alloc_buffer, ctypes.c_void_p).value
    eviction = Eviction(policy="uniform", budget=budget, window=8)
    with VisionModel.load(model_path, mmproj, n_threads=1) as model:
        asked = (("What is written here?", [image]), ("And here, on the other one? " * 20, [image_2]))

        def ask(conversation: Conversation, turn: int) -> str:
            question, images = asked[turn]
            return "".join(conversation.ask(question, images, n_predict=N_PREDICT))

        def begin() -> Conversation:
            return Conversation(model, eviction=eviction, n_ctx=1024)

        with begin() as conversation:
            right = [ask(conversation, 0), ask(conversation, 1)]
        with begin() as conversation:
            right_alone = ask(conversation, 1)
        for n in range(200):
            error = None
            with begin() as conversation:
                for turn in range(which):
                    ask(conversation, turn)
                left.value = n
                answer = None
                try:
                    answer = ask(conversation, which)
                except SparseMMError as raised:
                    error = str(raised)
                reached, left.value = left.value == -1, -1
                if not reached:
                    break
                lost = conversation.n_held == 0
                if error is not None:
                    answer = ask(conversation, which)
                again = answer == (right_alone if error and lost and which else right[which])
            print(json.dumps({"n": n, "error": error, "lost": lost, "again": again}), flush=True)
        print(json.dumps({"done": n}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:5], int(sys.argv[5]), int(sys.argv[6]))
