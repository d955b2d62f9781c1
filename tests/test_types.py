"""Types of the public face: what users write with every public name passes a strict checker, what is wrong does not."""
import ast
import subprocess
import sys
from importlib.util import find_spec

import pytest

import superposition_lc


def test_use_of_every_public_name_is_typed(root, tmp_path):
    "mypy on tests/typed/use.py; lines that must be refused stand there under `type: ignore`, which is an error where it is not needed."
    if find_spec("mypy") is None: pytest.skip("mypy is not installed (it is in the extra dev): the types of the public names are NOT checked")
    run = subprocess.run([sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path), "tests/typed/use.py"], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_public_name_is_used_there(root):
    "The check above leaves nothing out."
    names = {n.id for n in ast.walk(ast.parse((root / "tests/typed/use.py").read_text(encoding="utf-8"))) if isinstance(n, ast.Name)}
    assert not set(superposition_lc.__all__) - names


def test_every_public_function_says_what_it_takes_and_returns():
    "Parameters (but `ax` and loosely typed batches) and the return value are annotated."
    import inspect
    loose = {"ax", "batches", "self", "cls"}
    for name in superposition_lc.__all__:
        thing = getattr(superposition_lc, name)
        functions = [thing] if inspect.isfunction(thing) else [f for n, f in vars(thing).items() if not n.startswith("_") and inspect.isfunction(f) and n not in ("plot", "extra_repr", "state_dict")]
        for f in functions:
            signature = inspect.signature(f)
            bare = [p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name not in loose]
            assert not bare and signature.return_annotation is not signature.empty, f"{name}.{f.__name__}: {bare or 'return value'}"


def test_the_package_says_that_it_is_typed(root): assert (root / "superposition_lc" / "py.typed").is_file()
