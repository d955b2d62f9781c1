"""Run notebooks top to bottom and store their outputs: python docs/execute.py [--check] [NOTEBOOK ...] (default: all).

An exception or a warning in a cell is a failure and leaves the notebook as it was. With --check nothing is stored
and cells marked `#| slow` are not run. Cells marked `#| eval: false` are never run and keep their outputs.
"""
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What makes two runs differ or leaves debris: hash seeds, progress bars, a display.
STEADY = {"PYTHONHASHSEED": "0", "TQDM_DISABLE": "1", "MPLBACKEND": "agg", "IN_TEST": "1"}


def skipped(cell, flags) -> bool:
    "Whether the cell is left alone: not code, `#| eval: false`, or marked with one of `flags`."
    marks = cell.directives_ if cell.cell_type == "code" else {}
    return cell.cell_type != "code" or marks.get("eval:", [""])[0].lower() == "false" or bool(set(flags) & marks.keys())


def run_cells(nb, folder: Path, flags=()) -> str:
    "Run the cells of `nb` in `folder`, which is where Jupyter runs them; return what went wrong, or nothing."
    from execnb.shell import CaptureShell
    from nbdev.process import extract_directives

    os.chdir(folder)
    sys.path.insert(0, str(ROOT))
    shell = CaptureShell(mpl_format="png")
    shell.run("import matplotlib, pandas; matplotlib.rcParams['figure.dpi'] = 100; pandas.set_option('display.max_colwidth', None)")
    for cell in nb.cells:
        cell.directives_ = extract_directives(cell, remove=False)
        if skipped(cell, flags):
            continue
        cell.outputs = []  # a cell that has fallen silent keeps no old output
        shell.cell(cell)
        if shell.exc:
            return shell.prettytb(nb.path_)
        if noise := "".join("".join(out.text) for out in cell.outputs if out.get("name") == "stderr"):
            return f"{nb.path_}: a cell wrote to stderr:\n\n{cell.source}\n\n{noise}"
    return ""


def execute(path: Path, check: bool) -> None:
    "Run the notebook at `path`; unless `check`, store it with its outputs, cleaned."
    from execnb.nbio import read_nb, write_nb
    from nbdev.clean import clean_nb
    from nbdev.config import get_config

    nb, start = read_nb(path), time.time()
    if failure := run_cells(nb, path.parent, get_config(path=ROOT).tst_flags.split() if check else ()):
        sys.exit(failure)
    if not check:
        clean_nb(nb)
        write_nb(nb, path)
    print(f"{path.relative_to(ROOT)}: {time.time() - start:.0f} s", flush=True)


def main(args: list[str]) -> int:
    "One process a notebook: no state passes from one to the next."
    check, names = "--check" in args, [a for a in args if not a.startswith("--")]
    paths = [Path(n).resolve() for n in names] or sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    mode = ["--one"] + ["--check"] * check
    return max(subprocess.run([sys.executable, __file__, *mode, str(p)], env=os.environ | STEADY).returncode for p in paths)


if __name__ == "__main__":
    if "--one" in sys.argv:
        execute(Path(sys.argv[-1]), "--check" in sys.argv)
    else:
        sys.exit(main(sys.argv[1:]))
