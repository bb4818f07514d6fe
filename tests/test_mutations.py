"""The lines that ``python -m tests.mutations`` breaks are there to be broken."""

from pathlib import Path

import pytest

from tests.mutations import MUTATIONS

PACKAGE = Path(__file__).parents[1] / "lightning_lars"


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: f"{mutation.file}: {mutation.right}")
def test_the_line_is_there_once(mutation):
    assert (PACKAGE / mutation.file).read_text().count(mutation.right) == 1
    for test in mutation.tests.split():
        assert not test.endswith(".py") or (PACKAGE.parent / test).exists(), test
