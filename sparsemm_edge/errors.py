"""The package's one exception for mistakes that its user can mend, and what raises it."""

from collections.abc import Iterator
from contextlib import contextmanager

from sparsemm_edge.defaults import RANGES


class SparseMMError(Exception):
    """A user's mistake, or a file that is not what it should be.

    The message is one clear line: what is wrong, where, what was expected, and where it helps what to do.
    The command line prints it as `error: <message>` and exits with status 2, without a traceback.
    """


class ContextFullError(SparseMMError):
    """What was to be read does not fit into what is left of a context."""


def check_within(name: str, value: float, low: float, high: float) -> None:
    """Raise SparseMMError, naming the number, unless it is one from low to high."""
    if not low <= value <= high:  # nor NaN
        raise SparseMMError(f"{name} is {value}: it must be {low} to {high}")


def check_ranges(**values: float | None) -> None:
    """Raise SparseMMError, naming the number, unless each is None or in its range of defaults.RANGES."""
    for name, value in values.items():
        if value is not None:
            check_within(name, value, *RANGES[name])


def check_attributes(options: object) -> None:
    """check_ranges of those attributes of an object that defaults.RANGES names."""
    check_ranges(**{name: value for name, value in vars(options).items() if name in RANGES})


@contextmanager
def os_errors(what: str) -> Iterator[None]:
    """In this `with` an OSError becomes a SparseMMError: "cannot <what>", and why."""
    try:
        yield
    except OSError as error:
        raise SparseMMError(f"cannot {what}: {error.strerror or error}") from error


def one_line(error: object) -> str:
    """What an error says, on one line; the name of its type if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
