"""What a reader sees of a notebook: nbdev's filters applied, exported source moved under its documentation. The site and the README start here."""
import ast
import os
import re
import sys
import warnings
from pathlib import Path
from textwrap import indent, wrap

ROOT = Path(__file__).resolve().parent.parent
os.chdir(ROOT)  # nbdev looks for settings.ini from the working directory upwards
sys.path.insert(0, str(ROOT))
os.environ["IN_TEST"] = "1"  # an nbdev_export() inside a notebook stays quiet while its imports are run for show_doc

from execnb.nbio import mk_cell, read_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.process import Processor
from nbdev.processors import FilterDefaults, add_fold, add_show_docs, mv_exports, rm_export

CFG = get_config()
SITE = CFG.doc_host + CFG.doc_baseurl + "/"
BLOB = f"{CFG.git_url}/blob/{CFG.branch}/"
BADGE = re.compile(r"\[!\[Open in Colab\]\(\S+?\)\]\((\S+?)\)")  # the Colab badge that every notebook carries under its title
LINK = re.compile(r"```.*?```|`[^`\n]*`|(\]\()([^)\s]+)", re.DOTALL)  # a code block, a code span, or the target of a link
warnings.filterwarnings("error", message="Found cells containing imports")  # such a cell would run in full during the build


def notebooks() -> list[Path]:
    "All notebooks in reading order: the index, then each folder by its files' number prefix."
    paths = [Path(p).resolve() for p in nbglob(CFG.nbs_path)]
    return sorted(paths, key=lambda p: (p.parent != CFG.nbs_path, p))


def page(path: Path) -> str:
    "The page of the notebook at `path`, without suffix: nbs/core/00_entropy.ipynb is core/entropy."
    rel = path.relative_to(CFG.nbs_path)
    return rel.with_name(re.sub(r"^\d+[a-z]?_", "", rel.stem)).as_posix()


def slug(title: str) -> str:
    "The anchor of a heading, as nbdev links to it: lower case, hyphens for spaces, dots and underscores kept."
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", title).strip().lower())


def only_imports(source: str) -> bool:
    "Whether a cell does nothing but import."
    return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(source).body)


class SourceUnderDocs(Processor):
    "Exported source stays, after its documentation and folded (`#| exports`: open); hidden cells and exported imports go."

    def begin(self):
        cells = self.nb.cells
        for cell in [c for c in cells if c.cell_type == "code"]:
            flags = cell.directives_.keys()
            if flags & {"hide", "default_exp"} or (flags & {"export", "exporti"} and only_imports(cell.source)):
                cell.source = None
            elif flags & {"export", "exporti", "exports"}:
                place = next(i for i, c in enumerate(cells) if c is cell)
                end = next((i for i in range(place + 1, len(cells)) if not getattr(cells[i], "has_sd", False)), len(cells))
                cells[place:end] = [*reversed(cells[place + 1:end]), cell]  # nbdev documents the last symbol first


class MethodDocs(Processor):
    "Each exported class is followed by the documentation of its public methods too; nbdev itself adds only those made with @patch."

    def begin(self):
        sources = "\n".join(c.source for c in self.nb.cells)
        for i, cell in reversed([*enumerate(self.nb.cells)]):
            name = re.fullmatch(r"show_doc\((\w+)\)", cell.source)
            if getattr(cell, "has_sd", False) and name:
                shown = [mk_cell(f"show_doc({m})") for m in methods(self.nb, name[1]) if f"show_doc({m})" not in sources]
                for new in shown:
                    new.has_sd = True
                self.nb.cells[i:i] = shown[::-1]  # the order is turned round in SourceUnderDocs


def definitions(nb, name: str) -> list:
    "(source, node) of the exported function or class `name`; for a class also those of its private bases, whose methods are its own."
    found = [(c.source, node) for c in nb.cells for node in c.parsed_() or [] if getattr(node, "name", "") == name]
    bases = [b.id for _, node in found for b in getattr(node, "bases", []) if isinstance(b, ast.Name) and b.id.startswith("_")]
    return found + [d for base in bases for d in definitions(nb, base)]


def functions(nb, name: str) -> dict[str, tuple]:
    "{name: (source, node)} of all methods of the class `name`."
    return {node.name: (source, node) for source, owner in reversed(definitions(nb, name)) for node in owner.body if isinstance(node, ast.FunctionDef)}


def methods(nb, name: str) -> list[str]:
    "Public methods with a docstring of the class `name`."
    if not any(isinstance(node, ast.ClassDef) for _, node in definitions(nb, name)):
        return []
    return [f"{name}.{m}" for m, (_, node) in functions(nb, name).items() if m[0] != "_" and ast.get_docstring(node)]


def row(line: str, width: int = 88) -> str:
    "A parameter or field on a line of its own; its comment goes on below where it is long."
    name, mark, comment = re.sub(r"\s*# ", " # ", line.strip(), count=1).partition(" # ")
    first, *more = wrap(comment, width, initial_indent=" " * (len(name) + 7), subsequent_indent="        # ", break_long_words=False) or [""]
    return "\n".join([f"    {name}{mark}{first.strip()}", *more])


def header(source: str, node) -> str:
    "What stands before the body of a function or class, a parameter a line as it is written."
    lines, body = source.splitlines(), node.body[0]
    decorators = ["@" + ast.unparse(d) for d in node.decorator_list]
    before = [*lines[node.lineno - 1:body.lineno - 1], lines[body.lineno - 1].encode()[:body.col_offset].decode()]
    text = re.sub(r"\((self|cls)(,\s*|(?=\)))", "(", "\n".join(line.strip() for line in before).strip(), count=1)
    if "\n" not in text:
        return "\n".join([*decorators, row(text).removeprefix("    ")])
    start, _, rest = text.partition("(")
    return "\n".join([*decorators, start + "(", *(row(line).removeprefix("    " * (line[0] == ")")) for line in rest.splitlines() if line)])


def fields(nb, name: str) -> dict[str, str]:
    "{name: line} of a dataclass, those of its bases in the notebook first."
    found = {}
    for source, node in definitions(nb, name)[:1]:
        for base in node.bases:
            found |= fields(nb, base.id) if isinstance(base, ast.Name) else {}
        own = [n for n in node.body if isinstance(n, ast.AnnAssign)]
        found |= {n.target.id: "\n".join(source.splitlines()[n.lineno - 1:n.end_lineno]) for n in own}
    return found


def signature(nb, name: str) -> str:
    "How `name` or `Class.method` is made or called, with the comments on its parameters or fields; nbdev's own loses those of fields and of `**kwargs`."
    owner, _, method = name.partition(".")
    if method:
        return header(*functions(nb, owner)[method])
    source, node = definitions(nb, name)[0]
    if isinstance(node, ast.FunctionDef):
        return header(source, node)
    init = functions(nb, name).get("__init__")
    inside = [indent(header(*init), "    ")] if init else [row(line) for line in fields(nb, name).values()]
    return "\n".join([re.sub(r"^(class \w+)\(_\w+\)", r"\1", header(source, node), flags=re.MULTILINE), *inside])


class ReaderFilter(FilterDefaults):
    "nbdev's processors for docs, with exported source kept."

    def base_procs(self):
        kept = [p for p in super().base_procs() if p not in (add_fold, mv_exports)]
        kept.insert(kept.index(add_show_docs) + 1, MethodDocs)
        return [SourceUnderDocs if p is rm_export else p for p in kept]


def options(cell) -> dict[str, str]:
    "The cell's `#| name: value` lines and flags, as nbdev read them."
    return {name.rstrip(":"): " ".join(value) for name, value in (cell.get("directives_") or {}).items()}


def alt(cell) -> str:
    "The text that stands for the cell's figures: its `#| fig-alt:` line."
    return options(cell).get("fig-alt", "Figure")


def code(cell) -> str:
    "The cell's source without `#|` lines."
    return "\n".join(line for line in cell.source.splitlines() if not line.lstrip().startswith("#|")).strip()


def outputs(cell) -> list[dict]:
    "The cell's outputs without stderr and widgets, which mean nothing on a page."
    def shown(out):
        return out.get("name") != "stderr" and not any("widget" in kind for kind in out.get("data", {}))
    return [] if options(cell).get("output") == "false" else [out for out in cell.get("outputs", []) if shown(out)]


def relink(markdown: str, target) -> str:
    "Replace the target of every link and image outside code: `target(url)` returns the new one."
    return LINK.sub(lambda m: m[1] + target(m[2]) if m[1] else m[0], markdown)


def load(path: Path):
    "The notebook at `path` as the reader sees it; its title and subtitle are in `.frontmatter_`."
    nb = read_nb(path)
    head, *intro = re.split(r"\n\s*\n", nb.cells[0].source, maxsplit=2)
    nb.cells[0].set_source("\n\n".join([head, *intro[:1]]))  # nbdev takes title and subtitle from this cell and drops the rest
    nb.cells[2:2] = [mk_cell(text, "markdown") for text in intro[1:]]
    ReaderFilter()(nb)
    nb.cells = [c for c in nb.cells if c.cell_type != "raw" and "AUTOGENERATED" not in c.source]
    return nb
