"""Copy a GGUF file with changed keys: everything else is copied byte for byte."""

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGUFValueType

from sparsemm_edge.gguf_header import DTYPES, GGUFField, GGUFHeader
from sparsemm_edge.gguf_metadata import PREFIX

_CHUNK = 2**24
_SPLIT = ("split.no", "split.count", "split.tensors.count")

Progress = Callable[[int, int], None]
"""Called with the bytes written and their number."""


def copy_with_fields(
    header: GGUFHeader, target: Path, fields: Mapping[str, GGUFField], progress: Progress
) -> None:
    """Write a model, all parts of a split one, to one file.

    Args:
        fields: keys to write after the model's own, of which those of an earlier conversion are left out.
        progress: called with the bytes copied and their total.

    Raises:
        OSError: a file cannot be read or written.
    """
    kept = [key for key in header.entries if not key.startswith(PREFIX) and key not in _SPLIT]
    with target.open("wb") as out:
        n_fields = len(kept) + len(fields)
        out.write(struct.pack("<4sIQQ", b"GGUF", header.version, len(header.tensors), n_fields))
        with header.path.open("rb") as source:
            for key in kept:
                out.write(_bytes(source, header.entries[key]))
        for key, field in fields.items():
            out.write(_text(key) + _field(field))

        offset = 0
        for tensor in header.tensors.values():
            with tensor.path.open("rb") as source:
                out.write(_bytes(source, tensor.entry) + struct.pack("<Q", offset))
            offset += GGUFWriter.ggml_pad(tensor.end - tensor.start, header.alignment)

        total, done = offset, 0
        _pad(out, header.alignment)
        for tensor in header.tensors.values():
            with tensor.path.open("rb") as source:
                for start in range(tensor.start, tensor.end, _CHUNK):
                    part = _bytes(source, slice(start, min(start + _CHUNK, tensor.end)))
                    out.write(part)
                    done += len(part)
                    progress(done, total)
            _pad(out, header.alignment)


def _bytes(source: BinaryIO, place: slice) -> bytes:
    source.seek(place.start)
    return source.read(place.stop - place.start)


def _pad(out: BinaryIO, alignment: int) -> None:
    out.write(bytes(-out.tell() % alignment))


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "replace")
    return struct.pack("<Q", len(data)) + data


def _field(field: GGUFField) -> bytes:
    """Type and value; of arrays those of numbers only."""
    kind = struct.pack("<I", field.type)
    if field.type == GGUFValueType.STRING:
        return kind + _text(field.value)
    if field.item_type is None:
        return kind + DTYPES[field.type](field.value).tobytes()
    head = struct.pack("<IQ", field.item_type, len(field.value))
    return kind + head + np.array(field.value, DTYPES[field.item_type]).tobytes()
