"""Tables that one test goes through: a test a row costs more than most rows do."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def row(name: object) -> Iterator[None]:
    """What fails inside names the row in its report."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in the row {name}")
        raise
