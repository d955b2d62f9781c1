"""Sphinx settings; name, version and links come from settings.ini."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from docutils import nodes

from reader import CFG, SITE

project, author, release = CFG.title, CFG.author, CFG.version
copyright = CFG.copyright
html_title, html_baseurl = CFG.title, SITE
html_theme = "sphinx_book_theme"
html_static_path, html_css_files, html_js_files = ["static"], ["site.css"], ["site.js"]
html_logo = html_favicon = "static/logo.svg"
html_copy_source = html_show_sourcelink = html_use_index = False
html_theme_options = {
    "logo": {"text": CFG.title, "alt_text": f"{CFG.title}: home"},
    "repository_url": CFG.git_url, "use_repository_button": True,
    "use_download_button": False, "use_fullscreen_button": False,
    "navbar_persistent": [],  # the sidebar has the search field already
    "show_toc_level": 2, "pygments_light_style": "a11y-light", "pygments_dark_style": "a11y-dark",
}
html_context = {"default_mode": "auto"}  # light or dark as the reader's system is
extensions = ["myst_nb", "sphinx.ext.mathjax"]
mathjax_path = "mathjax/tex-chtml-full.js"  # build.py puts it there: the site works offline
# A command that MathJax does not know is an error, which tests/test_site.py finds, not red text.
mathjax3_config = {"options": {"enableMenu": False}, "tex": {"packages": {"[-]": ["noundefined"]}}}
nb_execution_mode = "off"  # outputs are those committed with the notebooks
nb_code_prompt_show, nb_code_prompt_hide = "Show {type}", "Hide {type}"
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "attrs_inline", "attrs_block", "deflist", "html_image"]
myst_dmath_double_inline = True  # $$...$$ need not stand in a paragraph of its own, as in Jupyter
myst_heading_anchors, myst_heading_slug_func = 4, "reader.slug"
suppress_warnings = ["myst.header"]  # nbdev documents a symbol at level 3 wherever it stands


def anchors(app, doctree):
    "Make each section's slug its first id, so that nbdev's links (entropy.html#hill_number) arrive from anywhere."
    for section in doctree.findall(nodes.section):
        if slug := section.get("slug"):
            section["ids"] = [slug, *(i for i in section["ids"] if i != slug)]


def setup(app):
    "Run before Sphinx collects the table of contents (priority 500)."
    app.connect("doctree-read", anchors, priority=400)
