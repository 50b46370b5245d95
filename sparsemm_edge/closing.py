"""A base class of what has to be closed."""

from abc import ABC, abstractmethod
from typing import TypeVar

_T = TypeVar("_T", bound="Closing")


class Closing(ABC):
    """A context manager that calls close(). Closing twice is no mistake."""

    @abstractmethod
    def close(self) -> None:
        """Free what is held."""

    def __enter__(self: _T) -> _T:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
