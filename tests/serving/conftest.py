"""What tests of the server share."""

import pytest
from small_generator import make


@pytest.fixture(scope="module")
def generator(quick_compilation):
    return make()
