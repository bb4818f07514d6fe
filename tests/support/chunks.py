"""Small chunks, with which Triton's interpreter is fast."""

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch

from lightning_lars.optim.backends import triton_table
from tests.support.interpreter import prepare_once


@contextmanager
def small_chunks():
    """Chunks of 64 elements in blocks of 32, added up one by one: small layers have several, and cut ones.

    Triton's interpreter takes its time for every block. A GPU keeps the chunks that it has.
    """
    if torch.cuda.is_available():
        yield
        return
    from lightning_lars.optim.backends import triton

    prepare_once()
    sizes = [(triton_table, "CHUNK", 64), (triton, "CHUNK", 64), (triton, "BLOCK", 32)]
    with ExitStack() as patches:
        for size in (*sizes, (triton, "_CHUNKS_AT_ONCE", 1)):
            patches.enter_context(patch.object(*size))
        yield
