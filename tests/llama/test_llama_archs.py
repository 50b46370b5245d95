"""llama.cpp's own test of the architectures, which the patch series extends."""

from __future__ import annotations

import subprocess

from helpers.builds import tools


def test_every_architecture_that_can_evicts_and_no_other_changes() -> None:
    """It makes a tiny model of each, and fails if a cache that evicts is not what it should be."""
    done = subprocess.run([tools() / "test-llama-archs"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "FAIL" not in done.stdout
