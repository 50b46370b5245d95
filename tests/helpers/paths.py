"""Where the checkout has what tests read."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HELPERS = ROOT / "tests" / "helpers"
PUBLISHED_SCORES = ROOT / "scores" / "llava-v1.6-vicuna-7b.head-scores.json"
