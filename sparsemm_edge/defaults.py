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
