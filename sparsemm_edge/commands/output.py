"""What several commands print."""

import json
from typing import Any


def print_json(content: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(content, indent=2))


def print_figures(report: dict[str, Any]) -> None:
    """The figures of one converted model, a line each."""
    table = report["head_budgets"]
    length = report["water_fill_length"]
    lines = {
        "model": f"{report['name']} ({report['architecture']}), {report['n_layer']} layers,"
        f" {report['n_head']} query heads, {report['n_head_kv']} KV heads",
        "policy": report["policy"]
        + ("" if report["enabled"] else ", switched off (sparsemm.enabled = false)"),
        "budget": f"{report['budget']} positions per KV head on average, window {report['window']};"
        f" floor ratio {report['floor_ratio']:g}",
        "water-filled": f"for a prompt of {length} positions" if length else "no",
        "head budgets": f"min {table['min']}, median {table['median']:g}, max {table['max']};"
        f" {table['heads_at_floor']:.1%} of the KV heads at the floor",
        "scores": report["scores_source"],
    }
    for name, text in lines.items():
        print(f"{name + ':':<14}{text}")
