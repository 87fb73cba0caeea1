"""Both notebooks as readers see them: in JupyterLab, and as a web page.

Debian's chromium, or any other, is driven by playwright.  Where there is no
browser the tests skip and say so.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys

import nbformat
import pytest
from conftest import NAMES, both, read
from nbconvert import HTMLExporter
from playwright.sync_api import Error, sync_playwright
from test_notebooks import figures, formulas, markdown

BROWSERS = ["chromium", "chromium-browser", "google-chrome", "chrome"]
QUIET = ["--no-sandbox", "--disable-background-networking", "--disable-gpu"]
QUIET += ["--disable-sync", "--disable-component-update", "--no-first-run"]
TEX = {"inlineMath": [["$", "$"]], "processEscapes": True}
pytestmark = pytest.mark.slow

# What a reader would stumble over in a page, as a list of sentences.  An
# unknown command is no error for MathJax: it prints it, in red.  Only code
# and tables may be wider than the page.
FAULTS = r"""() => {
    const all = css => [...document.querySelectorAll(css)], found = [
        ...all('[data-mime-type$="jupyter.stderr"]').map(e => e.innerText),
        ...all('mjx-merror, mjx-container [style*="red"]')
            .map(e => e.closest("mjx-container").outerHTML)];
    for (const e of all(".jp-RenderedMarkdown")) {
        const copy = e.cloneNode(true);
        copy.querySelectorAll("code, pre, mjx-container")
            .forEach(part => part.remove());
        const rest = copy.textContent.match(/.{0,30}(\$|\\\w).{0,30}/);
        if (rest) found.push(`left over: ${rest[0]}`);
    }
    for (const e of all(".jp-OutputArea-output img"))
        if (!e.naturalWidth || !e.closest(".jp-Cell").nextElementSibling
                ?.innerText.includes("Figure:"))
            found.push(`image: ${e.alt}, ${e.naturalWidth} pixels wide`);
    const page = document.documentElement;
    if (page.scrollWidth > page.clientWidth)
        found.push(`page: ${page.scrollWidth} of ${page.clientWidth}`);
    for (const e of all(".jp-Cell :is(img, p, li, h1, h2, mjx-container)"))
        if (e.getBoundingClientRect().right > page.clientWidth)
            found.push(`too wide: ${e.alt ?? e.innerText.slice(0, 60)}`);
    return found;
}"""
COUNTS = """() => [".jp-OutputArea-output img", "mjx-container"].map(
    css => document.querySelectorAll(css).length)"""


@pytest.fixture(scope="module")
def browser():
    found = [path for name in BROWSERS if (path := shutil.which(name))]
    if not found:
        pytest.skip(f"no browser here: none of {', '.join(BROWSERS)}")
    with sync_playwright() as playwright:
        launch = playwright.chromium.launch
        with launch(executable_path=found[0], args=QUIET) as opened:
            yield opened


def expected(name):
    """Return how many figures and formulas a reader should see."""
    parts = [formulas(source) for _, source in markdown(name)]
    return [len(figures(name)), sum(map(len, parts))]


def planted():
    """Return a notebook with one fault of every kind."""
    new, wide = nbformat.v4, "m" * 200
    text = rf"A ${wide}$, a $\frac$, a $\nonsense$, a \alpha, a lone $."
    cells = [new.new_markdown_cell(text), new.new_code_cell("0")]
    cells[1].outputs = [
        new.new_output("display_data", {"image/png": "bm8gaW1hZ2U="}),
        new.new_output("stream", name="stderr", text="aside"),
    ]
    return new.new_notebook(cells=cells)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Write notebooks, also as HTML, and MathJax; return the folder."""
    folder, npm = tmp_path_factory.mktemp("site"), shutil.which("npm")
    if not npm:
        pytest.skip("no npm here to get MathJax with")
    subprocess.run([npm, "install", "mathjax@3"], cwd=folder, check=True)
    exporter = HTMLExporter(require_js_url="")
    exporter.mathjax_url = "node_modules/mathjax/es5/tex-chtml.js"
    shown = {name: read(name) for name in NAMES} | {"planted": planted()}
    for name, notebook in shown.items():
        nbformat.write(notebook, folder / f"{name}.ipynb")
        text, _ = exporter.from_notebook_node(notebook)
        (folder / f"{name}.html").write_text(text, "utf-8")
    return folder


@contextlib.contextmanager
def html(browser, site, name, width):
    """Open a notebook's page, with all its formulas typeset."""
    page = browser.new_page(viewport={"width": width, "height": 800})
    with contextlib.closing(page):
        page.add_init_script(f"window.MathJax = {{tex: {json.dumps(TEX)}}}")
        page.route(re.compile("^http"), lambda route: route.abort())
        page.goto((site / f"{name}.html").as_uri())
        page.evaluate("() => MathJax.startup.promise")
        yield page


@both
@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "desktop"])
def test_the_web_page_is_whole_and_fits(browser, site, name, width):
    with html(browser, site, name, width) as page:
        assert page.evaluate(FAULTS) == []
        assert page.evaluate(COUNTS) == expected(name)


def test_planted_faults_are_found(browser, site):
    with html(browser, site, "planted", 390) as page:
        found = "\n".join(page.evaluate(FAULTS))
    for fault in ("aside", "image", "nonsense", "left", "merror", "wide"):
        assert fault in found


@pytest.fixture(scope="module")
def lab(site, tmp_path_factory):
    """Start JupyterLab on loopback; yield its URL."""
    home = tmp_path_factory.mktemp("home")
    plugin = home / "@jupyterlab" / "notebook-extension"
    plugin.mkdir(parents=True)  # so that every cell stands in the page
    settings = plugin / "tracker.jupyterlab-settings"
    settings.write_text('{"windowingMode": "none"}')
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser"]
    command += ["--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--IdentityProvider.token=", f"--ServerApp.root_dir={site}"]
    places = ["JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR"]
    places += ["JUPYTER_CONFIG_DIR", "IPYTHONDIR"]
    environment = os.environ | dict.fromkeys(places, str(home))
    with subprocess.Popen(command, env=environment) as server:
        yield f"http://127.0.0.1:{port}/lab/workspaces"
        server.terminate()


@both
def test_jupyterlab_shows_everything(browser, lab, name):
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    with contextlib.closing(page):
        for _ in range(60):  # seconds, until the server answers
            with contextlib.suppress(Error):
                page.goto(f"{lab}/{name}/tree/{name}.ipynb")
                break
            page.wait_for_timeout(1000)
        page.get_by_text("| Idle").wait_for(timeout=120_000)  # the kernel
        page.wait_for_timeout(3000)  # the last formulas and images
        assert page.evaluate(FAULTS) == []
        assert page.evaluate(COUNTS) == expected(name)
