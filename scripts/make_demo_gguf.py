#!/usr/bin/env python3
"""Derive the demo model's GGUF files from its checkpoint: models/demo -> sparsemm_edge/demo_model.

    make_demo_gguf.py                    what `make setup` runs; nothing to do where the files are up to date
    make_demo_gguf.py HF_DIR OUTDIR      the same for another checkpoint

The packaged files are the GGUF files of text model and image encoder, and the head scores (scores/demo.json).
The text model is converted by the converter inside the pinned llama.cpp source (which needs torch), vision
tower and projector by this package. Both are f16. The user cache keeps the files by the hash of what they
are made from, so that a machine converts a checkpoint once.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CHECKPOINT = ROOT / "models" / "demo"
PACKAGED = ROOT / "sparsemm_edge" / "demo_model"
SCORES = ROOT / "scores" / "demo.json"
FILES = ("model-f16.gguf", "mmproj-f16.gguf")

# what the files are made by, besides the checkpoint
_MAKERS = (
    ROOT / "patches" / "pin.json",
    ROOT / "sparsemm_edge" / "mmproj.py",
    Path(__file__).resolve(),
)


def make(checkpoint: Path, out: Path) -> None:
    """Put FILES into `out`, from the cache where it has them."""
    key = _hash(checkpoint)
    stamp = out / ".made-from"
    if stamp.is_file() and stamp.read_text() == key and all((out / name).is_file() for name in FILES):
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cached = home / "sparsemm-edge" / "demo-model" / key
    if not cached.is_dir():
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent, prefix=".making-") as work:
            made = Path(work) / "made"
            made.mkdir()
            _convert(checkpoint, made)
            try:
                made.rename(cached)
            except OSError:
                if not cached.is_dir():  # else another process was faster
                    raise
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        _replace(cached / name, out / name)
    stamp.write_text(key)


def _replace(source: Path, target: Path) -> None:
    """Copy beside the target and rename: a process that has the old file mapped keeps it."""
    from sparsemm_edge.files import atomic_path

    with atomic_path(target) as part:
        shutil.copyfile(source, part)


def _hash(checkpoint: Path) -> str:
    """Of the checkpoint's files and of what converts them."""
    if not (checkpoint / "config.json").is_file():
        raise SystemExit(f"error: {checkpoint} holds no checkpoint (config.json is missing)")
    digest = hashlib.sha256()
    for path in [*sorted(path for path in checkpoint.iterdir() if path.suffix != ".md"), *_MAKERS]:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _convert(checkpoint: Path, out: Path) -> None:
    from make_test_models import llama_cpp_source

    from sparsemm_edge.mmproj import convert_mmproj

    text, vision = (out / name for name in FILES)
    converter = llama_cpp_source(None) / "convert_hf_to_gguf.py"
    command = [sys.executable, str(converter), str(checkpoint), "--outtype", "f16", "--outfile", str(text)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"error: llama.cpp's converter failed:\n{done.stdout}")
    convert_mmproj(checkpoint, vision, outtype="f16")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", default=CHECKPOINT, metavar="HF_DIR")
    parser.add_argument("out", type=Path, nargs="?", default=PACKAGED, metavar="OUTDIR")
    arguments = parser.parse_args()
    make(arguments.checkpoint, arguments.out)
    if arguments.out == PACKAGED:
        if not SCORES.is_file():
            raise SystemExit(
                f"error: {SCORES} is missing: sparsemm-edge score models/demo --data grid makes it"
            )
        _replace(SCORES, PACKAGED / "head-scores.json")


if __name__ == "__main__":
    main()
