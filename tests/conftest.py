import os
from pathlib import Path

import pytest
from hypothesis import settings

# the same examples in every run; to look further: pytest --hypothesis-profile=explore --hypothesis-seed=1
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile("fixed")


@pytest.fixture
def data():
    folder = os.environ.get("CONVEXPRUNE_DATA")
    if not folder:
        pytest.skip("CONVEXPRUNE_DATA is not set")
    return Path(folder)
