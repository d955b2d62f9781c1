"""The oldest versions that settings.ini allows, as pip constraints: python .github/minimal.py > minimal.txt"""
import re
from configparser import ConfigParser
from pathlib import Path

parser = ConfigParser(delimiters=["="])
parser.read(Path(__file__).resolve().parent.parent / "settings.ini", encoding="utf-8")
for requirement in parser["DEFAULT"]["requirements"].split():
    name, _, oldest = re.match(r"([\w.-]+)(>=([\w.]+))?", requirement).groups()
    if oldest: print(f"{name}=={oldest}")
