"""Write README.md from nbs/index.ipynb: python docs/readme.py. With --check: exit with 1 if README.md or one of its figures is stale."""
import base64
import re
import sys
from pathlib import Path
from urllib.parse import urldefrag

from reader import CFG, ROOT, SITE, alt, code, load, options, outputs, page, relink, slug

INDEX = CFG.nbs_path / "index.ipynb"
FIGURES = "docs/readme"


def target(url: str) -> str:
    "Where a link of the index leads from GitHub: notebooks to the site, other files into the repository."
    if not url or url.startswith("#") or re.match(r"[a-z]+:", url):
        return url
    name, anchor = urldefrag(url)
    file = (INDEX.parent / name).resolve()
    if file.suffix == ".ipynb":
        return f"{SITE}{page(file)}.html" + (f"#{slug(anchor)}" if anchor else "")
    return file.relative_to(ROOT).as_posix() + (f"#{anchor}" if anchor else "")


def table(html: str) -> str:
    "A DataFrame's HTML as a markdown table, its index without a heading."
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in re.findall(r"<tr.*?</tr>", html, re.DOTALL)]
    rows = [[cell.strip() for cell in row] for row in rows]
    rows.insert(1, ["---"] + ["---:"] * (len(rows[0]) - 1))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def show(out, figures: dict[str, bytes], alt: str) -> str:
    "One output as markdown; a figure goes into `figures` under its file name."
    if out.output_type == "stream":
        return f"```text\n{''.join(out.text).rstrip()}\n```"
    if "image/png" in out.data:
        name = f"{FIGURES}/figure-{len(figures) + 1}.png"
        figures[name] = base64.b64decode(out.data["image/png"])
        return f"![{alt}]({name})"
    if "<table" in (html := "".join(out.data.get("text/html", ""))):
        return table(html)
    if "text/markdown" in out.data:
        return "".join(out.data["text/markdown"])
    return f"```text\n{''.join(out.data['text/plain']).rstrip()}\n```"


def render() -> dict[str, bytes]:
    "README.md and its figures: file name -> content."
    nb, figures = load(INDEX), {}
    parts = [f"# {nb.frontmatter_['title']}", f"> {nb.frontmatter_['description']}"]
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            parts.append(relink(cell.source.strip(), target))
        elif code(cell):
            if options(cell).get("echo") != "false":
                parts.append(f"```python\n{code(cell)}\n```")
            parts += [show(out, figures, alt(cell)) for out in outputs(cell)]
    return {"README.md": ("\n\n".join(parts) + "\n").encode()} | figures


def main() -> int:
    "Write the files, or with --check compare them with those in the repository."
    files = render()
    old = {p.relative_to(ROOT).as_posix() for p in (ROOT / FIGURES).glob("*.png")}
    stale = [name for name, new in files.items() if not (ROOT / name).exists() or (ROOT / name).read_bytes() != new]
    stale += sorted(old - files.keys())
    if "--check" in sys.argv:
        print(f"stale, run `make export`: {' '.join(stale)}" if stale else "README.md is fresh")
        return bool(stale)
    for name in old - files.keys():
        (ROOT / name).unlink()
    for name, new in files.items():
        (ROOT / name).parent.mkdir(exist_ok=True)
        (ROOT / name).write_bytes(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
