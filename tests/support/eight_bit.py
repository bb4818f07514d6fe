"""Where there can be optimizer state in 8 bits."""

import pytest

from lightning_lars.optim.state.torchao import import_eight_bit_tensor


def needs_torchao() -> None:
    """Skip a test, or the rest of a file, where torchao is missing or does not work with this torch."""
    try:
        import_eight_bit_tensor()
    except ImportError as error:
        pytest.skip(str(error), allow_module_level=True)
