"""Run notebooks top to bottom and store their outputs: python docs/execute.py [NOTEBOOK ...] (default: all)."""
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # a progress bar in a committed output is debris

from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from nbdev.clean import process_write, clean_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob

ROOT = Path(__file__).resolve().parent.parent


def execute(path: Path) -> None:
    "Run every cell of the notebook at `path`, store the outputs; an exception in a cell stops the run with exit status 1."
    nb, start = read_nb(path), time.time()
    shell = CaptureShell(path.parent)
    shell.run_all(nb, exc_stop=True)
    if shell.exc:
        sys.exit(f"{path.relative_to(ROOT)} failed:\n{shell.prettytb(path)}")
    write_nb(nb, path)
    process_write(warn_msg=f"cannot clean {path}", proc_nb=clean_nb, f_in=path)
    print(f"{path.relative_to(ROOT)}: {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    os.chdir(ROOT)
    names = [Path(n).resolve() for n in sys.argv[1:]] or [Path(n).resolve() for n in nbglob(get_config().nbs_path)]
    if len(names) == 1:
        execute(names[0])
    else:  # one process a notebook: no state passes from one to the next
        import subprocess
        sys.exit(max(subprocess.run([sys.executable, __file__, str(n)]).returncode for n in names))
