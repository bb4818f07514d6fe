"""A disk that is full, as far as this process can tell."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

NO_SPACE = "File too large"
"""What the kernel says, in place of 'No space left on device'."""


@contextmanager
def full_disk(bytes_of_a_file: int = 4096) -> Iterator[None]:
    """Let no file grow beyond a few bytes: the kernel refuses to write the rest, which is an ``OSError``."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_of_a_file, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
