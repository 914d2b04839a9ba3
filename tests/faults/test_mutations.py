"""15. Without any one of the safeguards, a test fails."""

import pytest

from tests.faults.mutations import main


@pytest.mark.faults
def test_every_safeguard_is_guarded():
    assert main() == 0
