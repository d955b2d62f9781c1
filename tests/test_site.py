"""The documentation site: built once, checked as files, then read in a browser where Chromium is installed."""
import copy
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from bs4 import BeautifulSoup

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
           --disable-component-update --disable-sync --disable-dev-shm-usage""".split()
PHONE = 390


@pytest.fixture(scope="module")
def site(root, tmp_path_factory) -> Path:
    "The folder of the built site; the build itself fails on any warning."
    out = tmp_path_factory.mktemp("site") / "html"
    run = subprocess.run([sys.executable, "docs/build.py", str(out)], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return out


@pytest.fixture(scope="module")
def pages(site) -> dict[str, BeautifulSoup]:
    "Every page that a reader can open: name -> parsed HTML."
    names = [p.relative_to(site).as_posix() for p in sorted(site.rglob("*.html")) if "_static" not in p.parts]
    return {name: BeautifulSoup((site / name).read_text(encoding="utf-8"), "html.parser") for name in names}


@pytest.fixture(scope="module")
def notebook_pages(pages) -> dict[str, BeautifulSoup]:
    "The pages made from notebooks."
    return {name: soup for name, soup in pages.items() if name != "search.html"}


def test_one_page_a_notebook(root, notebook_pages):
    "Nothing is left out, and two notebooks never share a page."
    notebooks = [p for p in (root / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]
    assert len(notebook_pages) == len(notebooks)


def test_sidebar_leads_everywhere(notebook_pages):
    "From every page to every page, in groups by purpose: start, tutorials, the paper, the modules, the rest."
    for name, soup in notebook_pages.items():
        folder = Path(name).parent
        links = [a["href"].partition("#")[0] or Path(name).name for a in soup.select("nav.bd-links a[href]")]
        reached = {os.path.normpath(folder / href) for href in links}
        assert reached == {*notebook_pages}, f"{name}: {sorted({*notebook_pages} ^ reached)}"
        captions = [c.get_text(strip=True) for c in soup.select("nav.bd-links .caption-text")]
        assert captions == ["Getting started", "Tutorials", "The paper, section by section", "The measure, bottom up", "About"], f"{name}: {captions}"


def test_links_lead_somewhere(site, pages):
    "Pages, files and anchors within the site."
    anchors = {name: {tag["id"] for tag in soup.find_all(id=True)} for name, soup in pages.items()}
    broken = []
    for name, soup in pages.items():
        for href in {a["href"] for a in soup.find_all("a", href=True) if not re.match(r"[a-z]+:", a["href"])}:
            path, anchor = urldefrag(href)
            file = ((site / name).parent / unquote(path)).resolve() if path else site / name
            known = anchors.get(file.relative_to(site.resolve()).as_posix() if path else name, set())
            if not file.is_file() or (anchor and unquote(anchor) not in known):
                broken.append(f"{name}: {href}")
    assert not broken, broken


def test_links_into_the_repository_exist(root, notebook_pages):
    "Source links, the notebook on GitHub, and the Colab link, which every page has: each names a file of this checkout."
    for name, soup in notebook_pages.items():
        urls = [a["href"] for a in soup.find_all("a", href=True)]
        files = {m[2] for url in urls if (m := re.match(r"https://(github\.com|colab\.research\.google\.com/github)/[^/]+/[^/]+/blob/[^/]+/([^#]+)", url))}
        colab = [url for url in urls if url.startswith("https://colab")]
        assert len(colab) == 1 and colab[0].endswith(".ipynb"), f"{name}: {colab}"
        assert not [f for f in files if not (root / f).is_file()], name


def test_symbols_link_to_their_source(notebook_pages):
    "Every documented symbol has a link to the line that defines it."
    for name, soup in notebook_pages.items():
        for link in soup.select("a.source-link"):
            assert re.search(r"\.py#L\d+$", link["href"]), f"{name}: {link['href']}"


def test_links_to_a_symbol_arrive_at_its_entry(notebook_pages):
    "A symbol's name is its anchor, which no heading of prose has before it; a class and a function whose names differ in case share one."
    for name, soup in notebook_pages.items():
        ids = {link.find_parent("section")["id"] for link in soup.select("a.source-link")}
        twins = {i for i in ids if re.fullmatch(r".+-\d", i) and i[:-2] not in ids}
        assert not twins, f"{name}: {twins}"


def test_symbols_are_documented_as_they_are_written(notebook_pages):
    "Comments on parameters, on `**kwargs` and on a dataclass's fields, defaults by name, methods, also those of a private base."
    def entry(page, anchor):
        return notebook_pages[f"core/{page}.html"].find("section", id=anchor).get_text()
    assert "def provenance(\n    **settings # anything that describes the run" in entry("runs", "provenance")
    assert "**kwargs): # passed to matplotlib's subplots" in entry("plotting", "figure")
    config = entry("sae", "saeconfig")
    assert "@dataclass(frozen=True)\nclass SAEConfig:" in config and "tolerance: float = 0.03 # converged" in config and "prefixes: tuple = PREFIXES #" in config
    assert "class SparseAutoencoder(nn.Module):\n    def __init__(\n        n_neurons:int, # N" in entry("sae", "sparseautoencoder")
    assert "k: int" in entry("kinds", "batchtopk")  # a base's field
    assert "def update(\n    codes:Tensor, #" in entry("entropy", "shareaccumulator.update")
    assert "@classmethod\ndef load(path:str|Path)" in entry("text", "textmeasurement.load")


def test_titles_and_alternative_texts(pages):
    "For search engines, screen readers and tabs."
    for name, soup in pages.items():
        assert soup.title.get_text(strip=True) and soup.find("h1"), name
        assert not [str(img)[:200] for img in soup.find_all("img") if not img.get("alt", "").strip()], name


def test_loads_nothing_from_elsewhere(site, pages):
    "Scripts, styles, images and fonts lie beside the pages: the site works offline."
    for name, soup in pages.items():
        loaded = [tag.get("src") for tag in soup.find_all(["script", "img", "iframe", "source", "video", "audio"])]
        loaded += [tag.get("href") for tag in soup.find_all("link") if "canonical" not in tag.get("rel", [])]
        assert not [url for url in loaded if url and re.match(r"(https?:)?//", url)], name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name


def test_no_debris(notebook_pages):
    "nbdev's directives, warnings and widgets do not reach the reader."
    for name, soup in notebook_pages.items():
        assert not soup.select(".stderr, .output.widget_view"), name
        assert not re.search(r"^#\|", soup.get_text(), re.MULTILINE), name


@pytest.fixture(scope="module")
def url(site):
    "Serve the site on this machine."
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            "Requests are not worth a line."

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    "A headless Chromium with a profile of its own."
    if not (CHROMIUM and DRIVER):
        pytest.skip("chromium and chromedriver are not installed: the site is not checked in a browser")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def wait(browser, script: str):
    "The value of a script as soon as it is true, within ten seconds."
    from selenium.webdriver.support.ui import WebDriverWait
    return WebDriverWait(browser, 10, poll_frequency=0.1).until(lambda b: b.execute_script(f"return {script}"), script)


def resize(browser, width: int) -> None:
    "Set the page's width, also below what a window allows."
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": False})


# Equations that MathJax did not set, set as an error, or set with no size; those in a folded block have none until it opens.
BAD_MATH = """[...document.querySelectorAll('.math')].filter(m => !m.closest('details:not([open])')).filter(m => {
    const set = m.querySelector('mjx-container'), box = set && set.getBoundingClientRect();
    return !box || !box.width || !box.height || m.querySelector('mjx-merror, [data-mml-node=merror]');
}).map(m => m.textContent.slice(0, 80))"""
TOO_WIDE = """document.documentElement.scrollWidth <= document.documentElement.clientWidth ? [] : ['the page',
    ...[...document.querySelectorAll('article *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1).slice(0, 3).map(e => e.outerHTML.slice(0, 120))]"""


UNSIGNED = """[...document.querySelectorAll('div.math mjx-container, .cell_output .text_html')].filter(e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).backgroundImage == 'none')
    .map(e => e.parentElement.id || e.textContent.slice(0, 40))"""
UNWARNED = """[...document.querySelectorAll('table.measurement')].filter(t => [...t.querySelectorAll('th')].find(th => th.textContent == 'warning')
    .getBoundingClientRect().right > t.parentElement.getBoundingClientRect().right).map(t => t.textContent.slice(0, 80))"""


def test_no_markdown_is_left_raw(notebook_pages):
    "Links are links, in prose and in signatures; code that is about links may show them."
    raw = re.compile(r"\[[^\]\n]*\]\((?:https?:|/)[^)\n]*\)")
    left = []
    for name, soup in notebook_pages.items():
        article = copy.copy(soup.article)
        for cell in article.select(".cell"):
            cell.decompose()
        left += [f"{name}: {m[0]}" for m in raw.finditer(article.get_text())]
    assert not left, "\n".join(left)


def test_pages_in_a_browser(browser, url, notebook_pages):
    "No errors in the console, equations drawn, figures loaded, nothing wider than a desktop's window or a phone, warnings in sight."
    problems = []
    for name, soup in notebook_pages.items():
        resize(browser, 1280)
        browser.get(url + name)
        if soup.select(".math"):
            wait(browser, "window.MathJax && MathJax.startup && MathJax.startup.promise && document.querySelector('mjx-container')")
            browser.execute_async_script("MathJax.startup.promise.then(arguments[0])")
            problems += [f"{name}: equation {tex}" for tex in browser.execute_script(f"return {BAD_MATH}")]
        empty = "[...document.querySelectorAll('article img')].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
        problems += [f"{name}: image {src}" for src in browser.execute_script(f"return {empty}")]
        loose = "[...document.querySelectorAll('article img')].filter(i => !i.closest('a')).map(i => i.src)"
        problems += [f"{name}: figure that does not open at full size: {src}" for src in browser.execute_script(f"return {loose}")]
        problems += [f"{name}: too wide for a desktop: {what}" for what in browser.execute_script(f"return {TOO_WIDE}")]
        problems += [f"{name}: a warning that is seen by scrolling only: {what}" for what in browser.execute_script(f"return {UNWARNED}")]
        resize(browser, PHONE)
        problems += [f"{name}: too wide: {what}" for what in browser.execute_script(f"return {TOO_WIDE}")]
        problems += [f"{name}: a formula or table that scrolls without a sign: {what}" for what in browser.execute_script(f"return {UNSIGNED}")]
        problems += [f"{name}: {entry['message']}" for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not problems, "\n".join(problems)


def test_search_finds_a_symbol(browser, url):
    "Offline, with what the site carries."
    browser.get(f"{url}search.html?q=effective_features")
    results = "[...document.querySelectorAll('#search-results li a')].map(a => a.href)"  # they come one by one
    browser.get(wait(browser, f"{results}.find(href => href.includes('core/entropy.html'))"))
    assert wait(browser, "document.querySelector('h1') && document.body.innerText.includes('effective_features')")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("page", ["index.html", "core/entropy.html", "about/limits.html"])
def test_follows_the_readers_theme(browser, url, theme, page):
    "Text and ground differ enough in both."
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]})
    browser.get(url + page)
    sums = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color].map(c => c.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0))"
    wait(browser, f"(([ground, text]) => {'ground - text' if theme == 'light' else 'text - ground'} > 300)({sums})")  # colours fade in
