"""README.md is generated from nbs/index.ipynb; what it shows works."""
import re
import subprocess
import sys



def test_readme_is_fresh(root):
    "Nothing changed in the index since README.md was written."
    run = subprocess.run([sys.executable, "docs/readme.py", "--check"], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_snippets_run(root, tmp_path, monkeypatch):
    "All python snippets, one after the other in one namespace, as a reader would paste them."
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for snippet in re.findall(r"^```python\n(.*?)^```", (root / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        exec(compile(snippet, "README.md", "exec"), namespace)


def test_relative_links_exist(root):
    "Links and images that point into the repository."
    text = re.sub(r"^```.*?^```", "", (root / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    targets = [t.split("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:|#", t)]
    assert not [t for t in targets if not (root / t).exists()]
