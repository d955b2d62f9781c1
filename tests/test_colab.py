"""Colab: every notebook runs top to bottom where nothing of this project is but the wheel that its own install cell brings.

Takes minutes and a package index, so it is asked for: SUPERPOSITION_LC_COLAB=1 runs all notebooks, SUPERPOSITION_LC_COLAB=entropy,parity those
whose names hold one of the words.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ASKED = os.environ.get("SUPERPOSITION_LC_COLAB", "")
NAMES = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
THERE = ["torch", "numpy", "requests", "ipython"]  # what Colab has and must keep as it is
RUN = """
import json, sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for i, cell in enumerate(json.load(open(sys.argv[1], encoding="utf-8"))["cells"]):
    source = "".join(cell["source"])
    flags = [line.split()[1] for line in source.splitlines() if line.startswith("#|")]
    if cell["cell_type"] != "code" or "slow" in flags or ("eval:" in flags and "%pip" not in source): continue
    if not shell.run_cell(source).success: sys.exit(f"cell {i} failed")
"""


def versions(python) -> dict:
    "What is installed beside a Python: name -> version."
    listing = subprocess.run([python, "-m", "pip", "list", "--format", "json"], capture_output=True, text=True, check=True).stdout
    return {p["name"].lower(): p["version"] for p in json.loads(listing)}


@pytest.fixture(scope="module")
def colab(request, tmp_path_factory):
    "(Python of a new environment that has what Colab has, folder with the wheel, versions before)."
    if not ASKED: pytest.skip("SUPERPOSITION_LC_COLAB is not set: notebooks are NOT run in a fresh environment")
    folder = tmp_path_factory.mktemp("colab")
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", *THERE], check=True)
    return python, request.getfixturevalue("built")[0].parent, versions(python)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_in_a_fresh_environment(name, colab, tmp_path):
    "In an empty folder, its fast cells; what was there before is there afterwards, in the same version."
    python, wheels, before = colab
    if ASKED != "1" and not any(word in name for word in ASKED.split(",")): pytest.skip(f"not among {ASKED}")
    place = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONWARNINGS")} | dict(PIP_FIND_LINKS=f"{os.environ.get('PIP_FIND_LINKS', '')} {wheels}", PIP_DISABLE_PIP_VERSION_CHECK="1", MPLBACKEND="agg", TQDM_DISABLE="1")
    run = subprocess.run([python, "-c", RUN, ROOT / name], cwd=tmp_path, env=place, capture_output=True, text=True, timeout=900)
    if run.returncode and "<urlopen error" in run.stdout: pytest.skip(f"{run.stderr.strip()}: it downloads, which does not work here; its cells from there on are NOT run")
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
    after = versions(python)
    assert {k: after.get(k) for k in before} == before, "the install cell changed what was there"
    assert (Path(subprocess.run([python, "-c", "import superposition_lc; print(superposition_lc.__file__)"], cwd=tmp_path, env=place, capture_output=True, text=True, check=True).stdout.strip())
            .is_relative_to(python.parent.parent)), "not the installed package"
