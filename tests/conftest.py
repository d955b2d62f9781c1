"""What all tests share: figures need no display, generated examples are the same on every run, data sets are found or named as missing."""
import os
import sys
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "agg")

import pytest
from hypothesis import settings

settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("steady")


@pytest.fixture(autouse=True)
def close_figures():
    "No test leaves a figure open for the next."
    yield
    if "matplotlib.pyplot" in sys.modules: sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture(scope="session")
def root() -> Path:
    "The checkout."
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_root() -> Path:
    "The folder with mnist/ and fashion_mnist/; tests that need it are skipped where SUPERPOSITION_LC_DATA does not name one."
    folder = os.environ.get("SUPERPOSITION_LC_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("SUPERPOSITION_LC_DATA does not name a folder with mnist/ and fashion_mnist/: tests on real images do not run")
    return Path(folder)
