"""Which arguments of a test are left to the slow ones."""

import pytest


def slow_unless(is_enough: bool, *arguments: object):
    """Arguments for ``pytest.mark.parametrize``, which are tested with every commit only if they suffice."""
    return pytest.param(*arguments, marks=[] if is_enough else [pytest.mark.slow])
