"""The package's one exception for mistakes that its user can mend."""


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
