"""What `convert` and `generate` take when nothing is said, and at most. Imports nothing."""

BUDGET = 256
"""Mean head budget in positions, observation window included."""

WINDOW = 32
"""Observation window in positions."""

WINDOW_SHARE = 4
"""The window is at most the budget divided by this, so that most of a small budget is left to choose with."""

IMAGE_WINDOW = 8
"""Observation window of an image that is evicted without a question: its last positions vote."""

VOTE = "mixkv"
"""How a head's positions are ranked, one of budgets.VOTES."""

RESIDUAL = True
"""Whether one place of a head that evicts stands for all that it lost."""

FLOOR_RATIO = 0.2
"""Share of the budget that every head gets (rho). The paper takes 0.1, which leaves some heads of a small
model next to nothing where budgets are small."""

N_CTX = 8192
"""Most positions of a chat."""

IMAGE_MEMORY = 256
"""MiB of images that a chat or a server keeps encoded in memory."""

IMAGE_CACHE_SIZE = 1024
"""MiB that the files of an image cache take at most."""

MAX_THREADS = 512
"""More than llama.cpp has room for (GGML_MAX_N_THREADS) end in a crash."""

MAX_POSITIONS = 2**24
"""More than any model is trained for; llama.cpp takes some fifty bytes a position beside K and V."""
