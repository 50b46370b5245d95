"""Default values and limits of options. Imports nothing."""

BUDGET = 256
"""Mean head budget in positions, observation window included."""

WINDOW = 32
"""Observation window in positions."""

WINDOW_SHARE = 4
"""The window is at most the budget divided by this, so that small budgets keep other positions too."""

IMAGE_WINDOW = 8
"""Observation window of an image that is evicted without a question: its last positions vote."""

VOTE = "mixkv"
"""How a head's positions are ranked, one of budgets.VOTES."""

RESIDUAL = True
"""Whether an evicting head keeps a residual slot that summarises what it evicted."""

FLOOR_RATIO = 0.2
"""Share of the budget that is divided evenly (rho). The paper uses 0.1, which gives some heads of small
models almost nothing at small budgets."""

N_CTX = 8192
"""Default context size of a chat, in positions."""

IMAGE_MEMORY = 256
"""MiB of encoded images that a chat or server keeps in memory."""

IMAGE_CACHE_SIZE = 1024
"""Default size limit of an image cache on disk, in MiB."""

MAX_THREADS = 512
"""llama.cpp crashes with more threads (GGML_MAX_N_THREADS)."""

MAX_POSITIONS = 2**24
"""More than any model is trained for; llama.cpp needs about fifty bytes per position beside K and V."""

RANGES: dict[str, tuple[float, float]] = {
    "budget": (1, 2**31 - 1),
    "draws": (1, 1000),
    "floor_ratio": (0, 1),
    "frequency_penalty": (-100, 100),
    "image_cache_size": (1, 2**20),
    "image_max_tokens": (1, 2**16),  # llama.cpp counts an image's pixels in 32 bits
    "image_memory": (0, 2**20),
    "image_min_tokens": (1, 2**16),
    "jobs": (1, 64),
    "kv_max_tail": (1, 2**31 - 1),
    "layers": (1, 1000),
    "max_new_tokens": (1, MAX_POSITIONS),
    "min_p": (0, 1),
    "n_ctx": (1, MAX_POSITIONS),
    "n_gpu_layers": (-1, 2**31 - 1),
    "n_predict": (1, MAX_POSITIONS),
    "n_prompt": (1, 2**31 - 1),
    "n_threads": (1, MAX_THREADS),
    "n_threads_batch": (1, MAX_THREADS),
    "n_text": (1, MAX_POSITIONS),
    "n_ubatch": (1, MAX_POSITIONS),
    "pages": (1, 10**6),
    "port": (0, 2**16 - 1),
    "presence_penalty": (-100, 100),
    "random_seeds": (1, 1000),
    "repeat_penalty": (0.01, 100),
    "rounds": (0, 1000),
    "seed": (-1, 2**32 - 1),
    "share": (0, 1),
    "temp": (0, 1000),
    "temperature": (0, 1000),
    "threads": (1, MAX_THREADS),
    "threads_batch": (1, MAX_THREADS),
    "top_k": (0, 2**31 - 1),
    "top_p": (0, 1),
    "turns": (1, 1000),
    "until": (0, 2),
    "window": (1, 1024),
}
"""The range of every number that a user can set, by its name in the command line and in Python. Outside it
something crashes, overflows or takes all memory. Narrower limits are checked where they are known."""
