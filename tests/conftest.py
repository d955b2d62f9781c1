"""What all tests share: figures need no display, generated examples are the same on every run, data sets are found or named as missing."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "agg")
if "PYTEST_XDIST_WORKER" in os.environ: os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process a core: threads would wait for each other

import pytest
from hypothesis import settings

SOURCES = "setup.py settings.ini pyproject.toml MANIFEST.in constraints.txt LICENSE README.md CHANGELOG.md CITATION.cff".split()  # what a source archive holds beside the package

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


@pytest.fixture(scope="session")
def built(root, tmp_path_factory):
    "(wheel, source archive), built as pip would build them, without a network; any warning of the build fails."
    folder = tmp_path_factory.mktemp("build")
    for name in SOURCES: shutil.copy(root / name, folder)
    for name in ("superposition_lc", "tests"): shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "dist").mkdir()
    code = "from setuptools import build_meta as b; b.build_wheel('dist'); b.build_sdist('dist')"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=folder, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    warnings = [line for line in said.splitlines() if "warn" in line.lower() and "byte-compiling is disabled" not in line]
    assert not warnings, warnings
    return [next((folder / "dist").glob(kind)) for kind in ("*.whl", "*.tar.gz")]
