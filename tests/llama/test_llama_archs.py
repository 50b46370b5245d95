"""llama.cpp's own test of the architectures, which the patch series extends: every architecture that can, evicts."""

from __future__ import annotations

import subprocess

from helpers.builds import tools


def test_every_architecture_that_can_evicts_and_no_other_changes() -> None:
    """Its table has a row per architecture, with ok or FAIL; the exit status is not 0 after a FAIL."""
    done = subprocess.run([tools() / "test-llama-archs"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "FAIL" not in done.stdout
    for arch in ("llama", "qwen2vl", "qwen3vl", "qwen3vlmoe"):
        assert any(arch in row and "evict" in row.lower() for row in done.stdout.splitlines()), arch
