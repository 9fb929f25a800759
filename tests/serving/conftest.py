"""What tests of the server share."""

import pytest
from small_generator import make


@pytest.fixture(scope="package")
def generator():
    return make()
