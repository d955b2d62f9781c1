"""Build the documentation site from the notebooks: python docs/build.py [FOLDER] (default: _docs). Needs neither Quarto nor a network."""
import re
import shutil
import sys
import tempfile
from collections import Counter
from importlib.metadata import distribution
from pathlib import Path
from urllib.parse import urldefrag

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from sphinx.cmd.build import main as sphinx

from superposition_lc import _modidx

from reader import BADGE, BLOB, CFG, ROOT, SITE, alt, code, load, notebooks, options, outputs, page, relink, signature, slug

GROUPS = {"tutorials": "Tutorials", "experiments": "The paper, section by section", "core": "The measure, bottom up", "about": "About"}
# nbdev's show_doc starts with a rule, a source link and a heading; each gets its place on the page.
SHOW_DOC = re.compile(r"^---\s+(?:\[source\]\((?P<source>[^)]+)\)\{[^}]*\}\s+)?#+ \S+\s+", re.MULTILINE)
# Its signature gives way to the source's own, and it sets the docstring in italics, which its own stars would end.
SIGNATURE, CODE_LINK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL), re.compile(r"\[`([^`\n]+)`\]\([^)\s]*\)")
AMBIGUOUS = {name for name, n in Counter(symbol.removeprefix(f"{module}.") for module, symbols in _modidx.d["syms"].items() for symbol in symbols).items() if n > 1}  # nbdev would link to any
DOCSTRING, STAR = re.compile(r"^\*([^*\n].*)\*$", re.MULTILINE), re.compile(r"(`[^`]*`)|\*")


class Page:
    "One notebook on its way to a page: links, images and cells translated to what Sphinx (MyST) reads."

    def __init__(self, path: Path, site: Path):
        self.path, self.site, self.name, self.nb = path, site, page(path), load(path)

    def target(self, url: str) -> str:
        "Where a link or image of the notebook leads on the site: to a page, a copied image, or the repository."
        if url.startswith(SITE):
            url, anchor = urldefrag(url[len(SITE):] or "index.html")
            return "/" + url.replace(".html", ".ipynb") + (f"#{anchor}" if anchor else "")
        if re.match(r"[a-z]+:", url):
            return url
        name, anchor = urldefrag(url)
        anchor = f"#{slug(anchor)}" if anchor else ""
        file = (self.path.parent / name).resolve() if name else self.path
        if file.suffix == ".ipynb":
            return (f"/{page(file)}.ipynb" if name else "") + anchor
        return self.copy(file) if file.suffix in {".png", ".svg", ".jpg"} else BLOB + file.relative_to(ROOT).as_posix() + anchor

    def copy(self, image: Path) -> str:
        "Copy an image of the repository beside the pages."
        place = self.site / "images" / image.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(image, place)
        return "/" + place.relative_to(self.site).as_posix()

    def markdown(self, source: str):
        "A markdown cell; the Colab badge becomes a plain link, since a page loads nothing from elsewhere."
        notebook = BLOB + self.path.relative_to(ROOT).as_posix()
        if BADGE.search(source):
            links = BADGE.sub(r"[Open in Colab](\1)", source)
            return new_markdown_cell("{.notebook-links}\n" + links + f" [Notebook on GitHub]({notebook})")
        return new_markdown_cell(self.relinked(source))

    def relinked(self, source: str) -> str:
        "Links translated; nbdev's links to a name that several modules have are dropped."
        source = CODE_LINK.sub(lambda m: f"`{m[1]}`" if m[1].strip("()") in AMBIGUOUS else m[0], source)
        return relink(source, self.target)

    def show_doc(self, cell):
        "nbdev's documentation of one symbol: heading, source link, signature, docstring."
        source = "".join("".join(out.data["text/markdown"]) for out in outputs(cell) if "text/markdown" in out.get("data", {}))
        name = code(cell).removeprefix("show_doc(").removesuffix(")")
        def heading(m):
            link = f"[source]({m['source']}){{.source-link}}\n\n" if m["source"] else ""
            return f"{'####' if '.' in name else '###'} {name}\n\n{link}"
        source = SIGNATURE.sub(lambda m: f"```python\n{signature(self.nb, name)}\n```", SHOW_DOC.sub(heading, source), count=1)
        return new_markdown_cell(self.relinked(DOCSTRING.sub(lambda m: STAR.sub(lambda star: star[1] or r"\*", m[1]), source)))

    def code(self, cell):
        "A code cell with its outputs, shown as its flags say."
        opts, outs = options(cell), outputs(cell)
        tags = ["hide-input"] * bool(opts.keys() & {"export", "exporti"})
        tags += ["remove-input"] * (opts.get("echo") == "false") + ["remove-cell"] * (opts.get("include") == "false")
        meta = {"tags": tags, "mystnb": {"image": {"alt": alt(cell)}}}
        return new_code_cell(code(cell), outputs=[nbformat.from_dict(dict(out)) for out in outs], metadata=meta)

    def cell(self, cell):
        "Any cell."
        if cell.cell_type == "markdown":
            return self.markdown(cell.source)
        return self.show_doc(cell) if code(cell).startswith("show_doc") else self.code(cell)

    def write(self, tail: str = "") -> None:
        "Write the page's notebook into the site's source folder; `tail` is appended as markdown."
        head = self.nb.frontmatter_
        lead = "{.lead}\n" + head["description"] if "description" in head else ""
        cells = [new_markdown_cell(f"# {head['title']}\n\n{lead}")]
        cells += [self.cell(c) for c in self.nb.cells if code(c)] + [new_markdown_cell(tail)] * bool(tail)
        for i, cell in enumerate(cells):
            cell.id = f"cell-{i}"  # the same site from the same notebooks
        place = self.site / f"{self.name}.ipynb"
        place.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"},
                                                           "language_info": {"name": "python"}}), place)


def sidebar(pages: list[Path]) -> str:
    "The table of contents: one group a folder, in the order of GROUPS."
    def tree(caption, entries):
        return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *entries, "```"])
    trees = [tree("Getting started", ["Overview <self>"])]
    for folder in [*GROUPS, *sorted({p.parent.name for p in pages} - {*GROUPS, CFG.nbs_path.name})]:
        if entries := [page(p) for p in pages if p.parent.name == folder]:
            trees.append(tree(GROUPS.get(folder, folder.capitalize()), entries))
    return "\n\n".join(trees)


def bundle_mathjax(static: Path) -> None:
    "Copy MathJax and its fonts from the wheel that carries them, so that equations need no network."
    source = Path(distribution("sphinx-mathjax-offline").locate_file("sphinx-mathjax-offline/static/mathjax"))
    fonts = "output/chtml/fonts/woff-v2"
    shutil.copytree(source / fonts, static / "mathjax" / fonts)
    shutil.copyfile(source / "tex-chtml-full.js", static / "mathjax" / "tex-chtml-full.js")


def build(out: Path) -> int:
    "Build the site in `out`, from scratch; a warning is a failure."
    if out.exists() and any(out.iterdir()) and not (out / ".nojekyll").exists():
        sys.exit(f"{out} holds something else than a site: name an empty folder")
    with tempfile.TemporaryDirectory() as tmp:
        site, pages = Path(tmp) / "pages", notebooks()
        for path in pages:
            Page(path, site).write(sidebar(pages) if path.parent == CFG.nbs_path else "")
        made = Path(tmp) / "site"  # not `out` itself: images are kept beside the folder as well
        status = sphinx(["-q", "-W", "--keep-going", "-c", str(ROOT / "docs"), "-d", f"{tmp}/trees", str(site), str(made)])
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(made, out)
    bundle_mathjax(out / "_static")
    (out / ".nojekyll").touch()  # GitHub Pages hides folders that start with an underscore otherwise
    return status


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / CFG.doc_path
    sys.exit(build(folder.resolve()))
