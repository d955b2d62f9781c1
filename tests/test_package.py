"""The package as a whole: version, floors, public names, what an import costs, what no committed file may say."""
import ast
import importlib
import json
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIB = ROOT / "superposition_lc"
# A module imports only from floors below its own.
FLOORS = {
    1: {"entropy", "data", "plotting", "runs", "sparse_coding", "kinds", "geometry"},
    2: {"sae", "statistics", "cells", "llc", "merging"},
    3: {"activations", "pretrained", "report"},
    4: {"measurement", "rate_distortion"},
    5: {"text"} | {f"experiments.{name}" for name in ("toy_models", "parity", "algorithmic", "grokking", "adversarial", "crosscoder")},
    6: {"experiments.sweep", "experiments.language"},
    7: {"experiments.resnet"},
    8: {"cli"},
}
FLOOR = {module: floor for floor, modules in FLOORS.items() for module in modules}
PUBLIC = """feature_shares hill_number effective_features ShareAccumulator SAEConfig SparseAutoencoder train_sae
            capture load_sae export_sae local_learning_coefficient measure measure_activations Measurement rate_distortion merge_split_features recurring_features""".split()
HEAVY = "sklearn torchattacks statsmodels IPython scipy.stats seaborn matplotlib.pyplot nbdev fastcore joblib dask huggingface_hub transformers".split()
MODULES = {p.relative_to(LIB).with_suffix("").as_posix().replace("/", "."): p for p in LIB.rglob("*.py") if not p.name.startswith("_")}


def test_version_is_that_of_settings():
    "One source of the version."
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    assert importlib.import_module("superposition_lc").__version__ == parser["DEFAULT"]["version"]


def imported(name: str, path: Path) -> set[str]:
    "The package's modules that the module `name` imports, relative imports resolved, at any depth of its code."
    parents, found = ["superposition_lc", *name.split(".")[:-1]], set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = parents[:len(parents) - node.level + 1] if node.level else []
            base = ".".join([*start, *filter(None, [node.module])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return {m.removeprefix("superposition_lc.") for m in found} & MODULES.keys()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_down(name):
    "A module knows nothing of its own floor or those above."
    assert name in FLOOR, f"{name} is new: give it a floor in FLOORS"
    wrong = sorted(other for other in imported(name, MODULES[name]) if FLOOR[other] >= FLOOR[name])
    assert not wrong, f"{name} (floor {FLOOR[name]}) imports {', '.join(wrong)}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_private_names_stay_at_home(name):
    "What another module needs is public, and documented."
    froms = [n for n in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))) if isinstance(n, ast.ImportFrom) and (n.level or n.module.startswith("superposition_lc"))]
    private = [a.name for n in froms for a in n.names if a.name.startswith("_") and not a.name.startswith("__")]
    assert not private, f"{name} imports {', '.join(private)}"


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name(name):
    "Importable from the package itself, and documented."
    assert getattr(importlib.import_module("superposition_lc"), name).__doc__


def test_import_is_light():
    "Plotting, attacks and statistics are loaded when they are used."
    code = "import superposition_lc, sys, json; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    assert not {*HEAVY} & {*loaded}


def committed() -> list[Path]:
    "Text files that git knows or would take."
    listing = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout: committed files cannot be listed")
    paths = [ROOT / name for name in listing.stdout.splitlines()]
    return [p for p in paths if p.is_file() and p.suffix not in {".png", ".gz", ".safetensors", ".npz", ".parquet"}]


def test_files_name_no_machine_and_no_package_index():
    "Neither a path of the machine it was written on nor where its packages came from."
    machine = re.compile(r"(?<![\w.~-])/(?:root|home|work|Users|mnt)/\w")
    index = re.compile(r"(?:extra-)?index-url\b|PIP_(?:EXTRA_)?INDEX|pythonhosted|https?://[^\s\"')]*/simple\b")
    images = re.compile(r'"image/\w+": "[^"]*"')  # base64 is noise that may spell anything
    wrong = []
    for path in committed():
        text = images.sub("", path.read_text(encoding="utf-8", errors="replace"))
        if path != Path(__file__).resolve() and (found := machine.search(text) or index.search(text)):
            wrong.append(f"{path.relative_to(ROOT)}: {found[0]}")
    assert not wrong, wrong
