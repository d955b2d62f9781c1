"""Files that are whole or untouched, whatever happens; provenance; bars."""
import json
import os
import re
import signal
import stat
import subprocess
import sys

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from superposition_lc import runs
from superposition_lc.plotting import figure
from superposition_lc.runs import atomic_path, progress_bar, provenance, write_results


@pytest.fixture
def old(tmp_path):
    "A file that is already there."
    path = tmp_path / "table.json"
    path.write_text("old")
    return path


def test_written_on_success(old):
    with atomic_path(old) as p:
        assert p.parent == old.parent and p.suffix == ".json" and p != old
        p.write_text("new")
        assert old.read_text() == "old"  # until the end
    assert old.read_text() == "new" and os.listdir(old.parent) == ["table.json"]


def test_folders_are_made_and_str_will_do(tmp_path):
    with atomic_path(str(tmp_path / "a" / "b" / "c.csv")) as p:
        p.write_bytes(b"1")
    assert (tmp_path / "a" / "b" / "c.csv").read_bytes() == b"1"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_exception_leaves_the_old_file_alone(old, error):
    with pytest.raises(error):
        with atomic_path(old) as p:
            p.write_text("half")
            raise error
    assert old.read_text() == "old" and os.listdir(old.parent) == ["table.json"]


def test_move_that_fails_leaves_the_old_file_alone(old, monkeypatch):
    monkeypatch.setattr(runs.os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        with atomic_path(old) as p:
            p.write_text("new")
    assert old.read_text() == "old" and os.listdir(old.parent) == ["table.json"]


def test_results_are_written_and_figures_closed(tmp_path):
    (fig, _), (other, _) = figure(), figure()
    write_results(tmp_path / "a", {"t.csv": (t := pd.DataFrame(dict(n=[1, 2], layer=["x", "y, z"]))), "f.png": fig})
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "a" / "t.csv"), t)
    assert (tmp_path / "a" / "f.png").read_bytes().startswith(b"\x89PNG") and sorted(os.listdir(tmp_path / "a")) == ["f.png", "t.csv"]
    assert plt.get_fignums() == [other.number]


KILLED = """
import os, signal, sys
from superposition_lc.runs import atomic_path
with atomic_path(sys.argv[1]) as p:
    with open(p, "w") as f:
        f.write("half")
        f.flush()
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_in_the_middle_of_a_write(old):
    done = subprocess.run([sys.executable, "-c", KILLED, old])
    assert done.returncode == -signal.SIGKILL and old.read_text() == "old"
    with atomic_path(old) as p:  # what the killed run left is not in the way
        p.write_text("new")
    assert old.read_text() == "new"


def test_permissions_are_those_of_any_new_file(old, tmp_path):
    mask = os.umask(0o027)
    try:
        with atomic_path(old) as p:
            p.write_text("new")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(mask)
    assert stat.S_IMODE(old.stat().st_mode) == 0o640


def test_folder_that_cannot_be_written(old):
    with pytest.raises(OSError):
        with atomic_path(old / "x.json"):  # the folder is a file
            pytest.fail("got a path to write to")
    if os.geteuid() == 0:
        return  # root may write everywhere
    old.parent.chmod(0o500)
    try:
        with pytest.raises(PermissionError):
            with atomic_path(old.parent / "x.json"):
                pytest.fail("got a path to write to")
    finally:
        old.parent.chmod(0o700)
    assert old.read_text() == "old"


def test_target_is_a_folder(old):
    with pytest.raises(OSError):
        with atomic_path(old.parent) as p:
            p.write_text("new")
    assert old.read_text() == "old"


def test_provenance():
    p = provenance(seed=3, config={"l1": .6})
    assert json.loads(json.dumps(p)) == p
    assert p["seed"] == 3 and p["config"] == {"l1": .6} and p["device"] and p["threads"] >= 1
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", p["time"])
    assert set(p["versions"]) == {"python", "superposition_lc", "torch", "numpy"} and all(p["versions"].values())


def test_bars(capsys, monkeypatch):
    assert list(progress_bar(range(3), "quick")) == [0, 1, 2]
    assert capsys.readouterr().err == ""  # over before two seconds
    true = runs.tqdm
    monkeypatch.setattr(runs, "tqdm", lambda *a, **k: true(*a, **k | dict(delay=0)))
    for show in (True, False):
        with progress_bar(desc="slow", show=show, total=3, unit="step") as bar:
            bar.update(2)
        out, err = capsys.readouterr()
        assert out == "" and ("slow" in err and "/3" in err if show else err == "")
