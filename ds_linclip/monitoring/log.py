"""A log that keeps its first error, for all ranks to act on together."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Log"]


class Log:
    """A log of one rank, which raises no error while it is written: the other ranks would wait.

    Attributes:
        failure: The first error, for all ranks to act on together; None: there was none.
    """

    failure: Exception | None = None

    @contextmanager
    def keeping_failure(self, name: object) -> Iterator[None]:
        """Keep what the body raises; an OSError as one of ``name``, which cannot be written."""
        try:
            yield
        except OSError as error:
            self.failure = self.failure or ValueError(f"{name} cannot be written: {error}")
        except Exception as error:  # noqa: BLE001 - trackers raise what they like
            self.failure = self.failure or error
