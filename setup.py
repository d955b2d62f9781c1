"""Packaging: everything is read from settings.ini, the one source of name, version and requirements."""
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(root / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
extras = {extra: cfg[f"{extra}_requirements"].split() for extra in ("language", "cluster", "llc", "dev")}
extras["dev"] += extras["language"] + extras["cluster"]
# Where the package is listed, links into the repository lead nowhere unless they are whole.
readme = re.sub(r"\]\((?![a-z]+:|#)", f"]({cfg['git_url']}/raw/{cfg['branch']}/", (root / "README.md").read_text(encoding="utf-8"))

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme,
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    license=cfg["license"].upper(),
    url=cfg["git_url"],
    project_urls={"Documentation": cfg["doc_host"] + cfg["doc_baseurl"], "Changes": f"{cfg['git_url']}/blob/{cfg['branch']}/CHANGELOG.md"},
    classifiers=["Intended Audience :: Science/Research", "Programming Language :: Python :: 3 :: Only", "Typing :: Typed",
                 *(f"Programming Language :: Python :: {v}" for v in cfg["pythons"].split())],
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    include_package_data=True,
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
