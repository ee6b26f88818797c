import os
from pathlib import Path

import pytest


@pytest.fixture
def data():
    folder = os.environ.get("CONVEXPRUNE_DATA")
    if not folder:
        pytest.skip("CONVEXPRUNE_DATA is not set")
    return Path(folder)
