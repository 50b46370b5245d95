"""Reading text and paths as people have them, and writing files so that no failure leaves half of one."""

import hashlib
import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from sparsemm_edge.errors import SparseMMError, os_errors


def read_text(path: Path) -> str:
    """The content of a text file, in UTF-8, UTF-16 or UTF-32, without its byte order mark.

    Line ends are as in the file.

    Raises:
        SparseMMError: the file cannot be read, or is not text.
    """
    return decode_text(read_bytes(path), str(path))


def read_bytes(path: Path) -> bytes:
    """The content of a file.

    Raises:
        SparseMMError: the file cannot be read.
    """
    try:
        with os_errors(f"read {path}"):
            return path.read_bytes()
    except ValueError as error:  # a zero byte in the name
        raise SparseMMError(f"cannot read {str(path)!r}: {error}") from error


def decode_text(data: bytes, where: str) -> str:
    """The text of bytes, as read_text; `where` names them in an error."""
    encoding = json.detect_encoding(data)  # by the mark, or by where the zeros of the first characters are
    try:
        text = data.decode(encoding)
    except ValueError as error:
        kind = encoding.upper().removesuffix("-SIG")
        raise SparseMMError(f"{where}: not a text file ({kind} was expected: {error})") from error
    return text.removeprefix("\ufeff")


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        SparseMMError: as read_text and parse_json.
    """
    return parse_json(read_text(path), str(path))


def parse_json(text: str, where: str, what: str = "a JSON file") -> Any:
    """The value of a JSON text; its strings may hold control characters, as some programs write them.

    Raises:
        SparseMMError: it is not JSON; `where` and `what` it should be are named.
    """
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        raise SparseMMError(f"{where}: not {what} ({error})") from error


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The values of a JSON Lines file, each with the number of its line.

    A line ends at \\n, and at nothing else: JSON allows the other line ends of Unicode within a text.

    Raises:
        SparseMMError: as read_text and parse_json.
    """
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield number, parse_json(line, f"{path}, line {number}", "JSON")


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file.

    Raises:
        SparseMMError: pyarrow is not installed, or cannot read the file.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise SparseMMError(f"{path}: Parquet files are read with pyarrow: pip install pyarrow") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=16):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SparseMMError(f"{path}: cannot be read as Parquet ({reason})") from error


def check_text(text: str, what: str) -> None:
    """Raise SparseMMError, naming `what` it is, if a text holds what UTF-8 cannot hold.

    Python stands such characters, half of a pair, in for bytes of an argument or a line that are no UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SparseMMError(
            f"{what} is not UTF-8: {text[error.start : error.start + 1]!r} at character {error.start + 1}"
        ) from error


def pasted_path(text: str) -> Path:
    """The path that a user means who pasted or dropped it: as it is, quoted, escaped, or a file: address.

    A file of exactly this name comes first, whatever quotes or backslashes the name holds.
    """
    text = text.strip()
    plain = os.path.expanduser(text)  # which leaves the ~ of an unknown user alone
    if os.path.exists(plain):
        return Path(plain)
    if text.lower().startswith("file:"):
        return Path(url2pathname(urlsplit(text).path))
    if os.name == "nt":  # where a backslash is no escape
        return Path(plain.strip('"'))
    try:
        words = shlex.split(text)
    except ValueError:  # a quote that does not end
        return Path(plain)
    return Path(os.path.expanduser(words[0])) if len(words) == 1 else Path(plain)


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; it becomes `target` on success and is removed on failure.

    A reader sees the old file or the new one, never a part of it. `target` is replaced if it exists:
    whether it may be is the caller's decision.

    Raises:
        SparseMMError: the directory does not exist, or the operating system refuses to write (no space,
            no permission).
    """
    if not target.parent.is_dir():
        raise SparseMMError(f"cannot write {target}: there is no directory {target.parent}")
    if not target.name or target.is_dir():
        raise SparseMMError(f"cannot write {target}: it is a directory")
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with os_errors(f"write {target}"):
            yield part
            os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


_FINGERPRINT_SAMPLE = 2**20  # bytes


def fingerprint(model: Path) -> str:
    """A hash of a model file's size and of samples of its content: its keys, and numbers all over it."""
    size = model.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with model.open("rb") as file:
        for start in (*(size * part // 8 for part in range(8)), max(size - _FINGERPRINT_SAMPLE, 0)):
            file.seek(start)
            digest.update(file.read(_FINGERPRINT_SAMPLE))
    return digest.hexdigest()
