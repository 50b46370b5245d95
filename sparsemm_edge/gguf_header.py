"""The head of a GGUF file: its keys and its list of tensors, checked against the file's size.

gguf.GGUFReader takes seconds for a large vocabulary and fails with an index error on a truncated file. This
reads the header once, skips arrays of strings and tensor data, and checks that all tensor data is present.
"""

import mmap
import re
import reprlib
import struct
from collections.abc import Container
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from sparsemm_edge.errors import SparseMMError, os_errors

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMS = 4  # GGML_MAX_DIMS
DTYPES = GGUFReader.gguf_scalar_to_np  # of all types but texts and arrays


@dataclass(frozen=True)
class GGUFField:
    """One key's value.

    Attributes:
        type: its GGUF type.
        item_type: the type of an array's items; None if it is no array.
        value: int, float, bool or str; an array [n] for an array of numbers; None for an array of strings.
    """

    type: GGUFValueType
    item_type: GGUFValueType | None
    value: Any


@dataclass(frozen=True)
class GGUFTensor:
    """One entry of the list of tensors.

    Attributes:
        path: the file that holds it; another than the header's for a later part of a split model.
        entry: the bytes of that file that list it, but for where its data is.
        shape: GGUF's order, fastest dimension first.
        type: how its numbers are stored.
        start, end: the bytes of the file that hold its data.
    """

    path: Path
    entry: slice
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    start: int
    end: int


@dataclass(frozen=True)
class GGUFHeader:
    """The keys and tensors of one GGUF file, or of a model that is split into several.

    Attributes:
        path: the file, the first one of several.
        version: of the format.
        fields: by key, in the file's order; those of the first of several files.
        entries: the bytes of that file that hold each key, its type and its value.
        tensors: by name, in the file's order.
        alignment: in bytes, of the tensors' data.
    """

    path: Path
    version: int
    fields: dict[str, GGUFField]
    entries: dict[str, slice]
    tensors: dict[str, GGUFTensor]
    alignment: int

    def value(self, key: str, default: Any = None) -> Any:
        """The value of a key, or the default if the file does not have it."""
        field = self.fields.get(key)
        return default if field is None else field.value


def bytes_of(kind: GGMLQuantizationType, n: int) -> int:
    """Bytes of n numbers of a GGML type, n in whole blocks."""
    block, n_bytes = GGML_QUANT_SIZES[kind]
    return n // block * n_bytes


def read_header(path: Path) -> GGUFHeader:
    """Read a GGUF file's keys and list of tensors, and check that the file holds all of their data.

    The first part of a split model is read with its other parts.

    Raises:
        SparseMMError: the file cannot be read, is no GGUF (of version 2 or 3, little-endian), is cut short,
            or holds a tensor of a type that gguf does not know; or it is a later part of a split model, or a
            part is missing.
    """
    header = _read_file(path)
    n_parts = header.value("split.count", 0)
    if not isinstance(n_parts, int) or n_parts < 2:
        return header
    names, tensors = _part_names(header, n_parts), dict(header.tensors)
    for name in names[1:]:
        for tensor, listed in _read_file(path.with_name(name)).tensors.items():
            if tensor in tensors:
                raise SparseMMError(f"{path.with_name(name)}: {path.name} has the tensor {shown(tensor)} too")
            tensors[tensor] = listed
    return replace(header, tensors=tensors)


def _part_names(header: GGUFHeader, n_parts: int) -> list[str]:
    """The file names of a split model's parts, of which the header is of the first."""
    path, part = header.path, header.value("split.no", 0)
    what = f"part {part + 1} of {n_parts} of a split model" if isinstance(part, int) else "a part of a model"
    found = re.fullmatch(r"(.*-)(\d{5})(-of-\d{5}\.gguf)", path.name)
    if found is None or not isinstance(part, int) or n_parts > 99_999:
        raise SparseMMError(
            f"{path}: {what}: expected a name such as model-00001-of-{n_parts:05}.gguf, which names the rest"
        )
    if part != 0:
        raise SparseMMError(f"{path}: {what}: give its first part, {found[1]}00001{found[3]}")
    return [f"{found[1]}{number + 1:05}{found[3]}" for number in range(n_parts)]


def _read_file(path: Path) -> GGUFHeader:
    """One file's part of read_header."""
    with os_errors(f"read {path}"), path.open("rb") as file:
        magic = file.read(len(_MAGIC))
        if not magic:
            raise SparseMMError(f"{path}: not a GGUF file (it is empty)")
        if magic != _MAGIC:
            raise SparseMMError(f"{path}: not a GGUF file (it starts with {magic!r}, expected {_MAGIC!r})")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Walk(path, data).header()


def weight_bytes(path: Path) -> int:
    """Bytes of all tensors of a GGUF file.

    Raises:
        SparseMMError: as read_header.
    """
    return sum(tensor.end - tensor.start for tensor in read_header(path).tensors.values())


def weight_bytes_read(header: GGUFHeader) -> int:
    """Bytes of text-model weights that a batch reads: all but token embeddings that are not tied."""
    sizes = {name: tensor.end - tensor.start for name, tensor in header.tensors.items()}
    tied = "output.weight" not in sizes
    return sum(sizes.values()) - (0 if tied else sizes.get("token_embd.weight", 0))


def shown(value: Any) -> str:
    """A value for a one-line error: in a damaged file it may be long, or not text."""
    if isinstance(value, str) and value.isprintable() and 0 < len(value) <= 64:
        return value
    return reprlib.repr(value)


@dataclass
class _Walk:
    """One pass over the header's bytes."""

    path: Path
    data: mmap.mmap
    offset: int = len(_MAGIC)

    def header(self) -> GGUFHeader:
        version = self.number("<u4")
        if version and not version & 0xFFFF:
            raise SparseMMError(f"{self.path}: a big-endian GGUF file; only little-endian ones are supported")
        if version not in _VERSIONS:
            raise SparseMMError(f"{self.path}: GGUF version {version}; only versions 2 and 3 are supported")
        n_tensors, n_fields = self.number("<u8"), self.number("<u8")

        fields: dict[str, GGUFField] = {}
        entries: dict[str, slice] = {}
        for _ in range(n_fields):
            start = self.offset
            key = self.name("key", fields)
            fields[key] = self.field(self.type(key))
            entries[key] = slice(start, self.offset)

        listed: dict[str, GGUFTensor] = {}
        for _ in range(n_tensors):
            start = self.offset
            name = self.name("tensor", listed)
            listed[name] = self.tensor(name, start)

        alignment = GGUF_DEFAULT_ALIGNMENT
        if "general.alignment" in fields:
            alignment = fields["general.alignment"].value
            if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
                raise self.damaged(f"general.alignment is {alignment!r}")
        start = GGUFWriter.ggml_pad(self.offset, alignment)
        tensors = {}
        for name, tensor in listed.items():
            end = start + tensor.end
            if end > len(self.data):
                raise SparseMMError(
                    f"{self.path}: the file is cut short: the data of {shown(name)} ends at byte"
                    f" {end}, the file has {len(self.data)}"
                )
            tensors[name] = replace(tensor, start=start + tensor.start, end=end)
        return GGUFHeader(self.path, version, fields, entries, tensors, alignment)

    def damaged(self, reason: str) -> SparseMMError:
        return SparseMMError(f"{self.path}: damaged GGUF file: {reason}")

    def take(self, n_bytes: int) -> int:
        """Step over n_bytes and return where they start."""
        start = self.offset
        if n_bytes > len(self.data) - start:
            raise SparseMMError(
                f"{self.path}: the file is cut short or damaged: its header goes on after byte"
                f" {len(self.data)}, where the file ends"
            )
        self.offset += n_bytes
        return start

    def number(self, dtype: npt.DTypeLike) -> Any:
        start = self.take(np.dtype(dtype).itemsize)
        return np.frombuffer(self.data, dtype, 1, start)[0].item()

    def text(self, errors: str = "replace") -> str:
        length = self.number("<u8")
        start = self.take(length)
        return self.data[start : start + length].decode("utf-8", errors)

    def name(self, of: str, known: Container[str]) -> str:
        """A name that is not known yet; bytes that are not UTF-8 are kept distinct."""
        name = self.text("surrogateescape")
        if name in known:
            raise self.damaged(f"the {of} {shown(name)} is there twice")
        return name

    def type(self, key: str) -> GGUFValueType:
        number = self.number("<u4")
        try:
            return GGUFValueType(number)
        except ValueError as error:
            raise self.damaged(f"the key {shown(key)} has the unknown type {number}") from error

    def field(self, kind: GGUFValueType) -> GGUFField:
        if kind in DTYPES:
            return GGUFField(kind, None, self.number(DTYPES[kind]))
        if kind == GGUFValueType.STRING:
            return GGUFField(kind, None, self.text())
        item_type = self.type("array")
        length = self.number("<u8")
        if item_type in DTYPES:
            dtype = DTYPES[item_type]
            start = self.take(length * dtype().itemsize)
            return GGUFField(kind, item_type, np.frombuffer(self.data, dtype, length, start).copy())
        if item_type != GGUFValueType.STRING:
            raise SparseMMError(f"{self.path}: arrays of arrays in GGUF keys are not supported")
        unpack = struct.Struct("<Q").unpack_from  # a vocabulary has a hundred thousand, and numpy is slow
        for _ in range(length):
            self.take(unpack(self.data, self.take(8))[0])
        return GGUFField(kind, item_type, None)

    def tensor(self, name: str, entry: int) -> GGUFTensor:
        """An entry of the tensor list, which starts at `entry`; start and end count from the data section."""
        n_dims = self.number("<u4")
        if n_dims > _MAX_DIMS:
            raise self.damaged(f"the tensor {shown(name)} has {n_dims} dimensions")
        shape = tuple(self.number("<u8") for _ in range(n_dims))
        number = self.number("<u4")
        listed = slice(entry, self.offset)
        offset = self.number("<u8")
        if number not in list(GGMLQuantizationType):
            raise SparseMMError(
                f"{self.path}: the tensor {shown(name)} has type {number}, which the installed gguf does not"
                " know"
            )
        kind = GGMLQuantizationType(number)
        end = offset + bytes_of(kind, prod(shape))
        return GGUFTensor(self.path, listed, shape, kind, offset, end)
