"""What a model computes does not depend on what memory held before."""

import json
import os
import subprocess
import sys
from pathlib import Path

from helpers import architectures, mixed_layers
from helpers.paths import HELPERS


def test_no_model_reads_what_it_has_not_written(preloaded_alloc: Path) -> None:
    """Image embeddings and logits, with and without eviction, over two prompts with an image."""
    files = {name: architectures.made(name) for name in architectures.MODELS}
    files |= {name: mixed_layers.made(name) for name in mixed_layers.SPECS}
    arguments = [str(each) for name, model in files.items() for each in (name, model.text, model.mmproj)]
    done = subprocess.run(
        [sys.executable, HELPERS / "uninitialised_worker.py", *arguments],
        env=os.environ | {"LD_PRELOAD": str(preloaded_alloc)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    differs = json.loads(done.stdout)
    assert differs == dict.fromkeys(files)
