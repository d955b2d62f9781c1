"""What is published: wheel and source archive build without a warning, hold the package and nothing else, and say what they need."""
import re
import subprocess
import sys
import tarfile
from configparser import ConfigParser
from email import message_from_string
from pathlib import Path
from zipfile import ZipFile

import pytest
from conftest import SOURCES

ROOT = Path(__file__).resolve().parent.parent
parser = ConfigParser(delimiters=["="])
parser.read(ROOT / "settings.ini", encoding="utf-8")
CFG = parser["DEFAULT"]


def package_files() -> set[str]:
    "Every file of the package, as the checkout has it."
    return {p.relative_to(ROOT).as_posix() for p in (ROOT / CFG["lib_path"]).rglob("*") if p.is_file() and "__pycache__" not in p.parts}


@pytest.fixture(scope="module")
def about(built):
    "The wheel's metadata."
    with ZipFile(built[0]) as z: return message_from_string(z.read(next(n for n in z.namelist() if n.endswith("METADATA"))).decode())


def test_the_wheel_holds_the_package_and_nothing_else(built):
    names = set(ZipFile(built[0]).namelist())
    info = {n for n in names if ".dist-info/" in n}
    assert names - info == package_files() and {Path(n).name for n in info} == {"METADATA", "WHEEL", "RECORD", "LICENSE", "entry_points.txt", "top_level.txt"}
    assert {Path(n).name for n in names - info if not n.endswith(".py")} == {"py.typed", "reverse.npz", "sort.npz", "README.md", "LICENSE"}


def test_the_source_archive_holds_what_the_wheel_is_built_from(built):
    with tarfile.open(built[1]) as t: names = {n.partition("/")[2] for n in t.getnames() if t.getmember(n).isfile()}
    assert {n for n in names if "egg-info" not in n} == {*SOURCES, "PKG-INFO", "setup.cfg"} | package_files()


def test_the_wheel_alone_works(built, tmp_path):
    "Unpacked where nothing else of the project is: every module imports, data files are found, the command answers."
    ZipFile(built[0]).extractall(tmp_path / "site")
    code = ("import sys; sys.path.insert(0, 'site'); from superposition_lc import cli, measure; from superposition_lc.experiments.algorithmic import load_compiled; import superposition_lc\n"
            "assert 'site' in superposition_lc.__file__; print(load_compiled('sort').width); sys.exit(cli.main(['reproduce', '--list']))")
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("50\n") and "adversarial" in done.stdout


def test_metadata(about):
    assert about["Version"] == CFG["version"] and about["Requires-Python"] == f">={CFG['min_python']}" and {"language", "llc", "cluster", "dev"} == {*about.get_all("Provides-Extra")}
    stated = [c.rpartition(" ")[2] for c in about.get_all("Classifier") if re.search(r":: 3\.\d+$", c)]
    assert stated == CFG["pythons"].split() and stated[0] == CFG["min_python"] and "Typing :: Typed" in about.get_all("Classifier")
    assert len(about.get_all("Requires-Dist")) == sum(len(CFG[f"{k}requirements"].split()) for k in ("", "language_", "language_", "llc_", "cluster_", "cluster_", "dev_"))  # dev has language and cluster, too
    links = re.findall(r"\]\(([^)\s]+)\)", about.get_payload())
    assert len(links) > 5 and not [url for url in links if not url.startswith(("https://", "#"))]


def test_every_requirement_has_an_oldest_version_which_one_job_installs():
    oldest = subprocess.run([sys.executable, ".github/minimal.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert [o.replace("==", ">=") for o in oldest] == [r.partition(",")[0] for r in CFG["requirements"].split()]
    workflow = (ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8")
    assert f'python: [{", ".join(repr(v) for v in CFG["pythons"].split())}]'.replace("'", '"') in workflow and "minimal.py" in workflow


def test_an_extra_stands_once():
    "No requirement in two of dev, language, llc, cluster and the package itself, but joblib, which a cluster runs through."
    names = [re.match(r"[\w.-]+", r)[0] for k in ("", "language_", "llc_", "cluster_", "dev_") for r in CFG[f"{k}requirements"].split()]
    assert [n for n in names if names.count(n) > 1] in ([], ["joblib"] * 2)


def test_tested_versions_are_allowed_and_complete():
    "constraints.txt pins what settings.ini asks for."
    pins = {re.match(r"[\w.-]+", line)[0] for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")}
    asked = {re.match(r"[\w.-]+", r)[0] for k in ("", "language_", "cluster_", "dev_") for r in CFG[f"{k}requirements"].split()}
    assert not {n for n in asked - pins if n != "ipykernel"}
