"""What `convert` and `generate` take when nothing is said. Imports nothing: the CLI starts at once."""

BUDGET = 256
"""Mean head budget in positions, observation window included."""

WINDOW = 32
"""Observation window in positions."""

WINDOW_SHARE = 4
"""The window is at most the budget divided by this, so that most of a small budget is left to choose with."""

VOTE = "mixkv"
"""How a head's positions are ranked, one of budgets.VOTES."""

RESIDUAL = True
"""Whether one place of a head that evicts stands for all that it lost."""

FLOOR_RATIO = 0.1
"""Share of the budget that every head gets (rho)."""

N_CTX = 8192
"""Most positions of a chat."""
