"""What `convert` and `generate` take when nothing is said. Imports nothing: the CLI starts at once."""

BUDGET = 256
"""Mean head budget in positions, observation window included."""

WINDOW = 32
"""Observation window in positions."""

FLOOR_RATIO = 0.1
"""Share of the budget that every head gets (rho)."""

N_CTX = 8192
"""Most positions of a chat."""
