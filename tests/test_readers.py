"""Both notebooks as readers see them: in JupyterLab, and as a web page.

Debian's chromium, or any other, is driven by playwright.  Where there is no
browser the tests skip and say so.
"""

import contextlib
import functools
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import nbformat
import pytest
from conftest import NAMES, ROOT, copy_data, read
from nbconvert import HTMLExporter
from playwright.sync_api import sync_playwright
from test_notebooks import figures, formulas, markdown

BROWSERS = ["chromium", "chromium-browser", "google-chrome", "chrome"]
QUIET = ["--no-sandbox", "--disable-background-networking", "--disable-sync"]
QUIET += ["--disable-component-update", "--disable-gpu", "--no-first-run"]
SETTINGS = {  # every cell stands in the page, and nothing asks for news
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false"},
}
WIDTHS = {"phone": 390, "desktop": 1280}
both = pytest.mark.parametrize("name", NAMES)

# What a reader would stumble over in a page, as a list of sentences.  An
# unknown command is no error for MathJax: it prints it, in red.
FAULTS = r"""() => {
    const found = [], all = (css, root = document) =>
        [...root.querySelectorAll(css)];
    for (const e of all('[data-mime-type$="jupyter.stderr"]'))
        found.push(`error: ${e.innerText.slice(0, 500)}`);
    for (const e of all('mjx-merror, mjx-container [style*="red"]'))
        found.push(`formula: ${e.closest("mjx-container").outerHTML}`);
    for (const e of all(".jp-RenderedMarkdown")) {
        const copy = e.cloneNode(true);
        all("code, pre, mjx-container", copy).forEach(x => x.remove());
        const rest = copy.textContent.match(/.{0,30}(\$|\\\w).{0,30}/);
        if (rest) found.push(`left over: ${rest[0]}`);
    }
    for (const e of all(".jp-OutputArea-output img")) {
        const below = e.closest(".jp-Cell").nextElementSibling;
        const caption = below?.innerText.includes("Figure:");
        if (!e.naturalWidth || !(e.alt.trim() || caption))
            found.push(`image: ${e.alt}, ${e.naturalWidth} pixels wide`);
    }
    return found;
}"""
FINISHED = r"""() => {  // the last cell has a number, or one has failed
    const cells = document.querySelectorAll(".jp-CodeCell .jp-InputPrompt");
    return /\d/.test([...cells].at(-1).innerText) ||
        !!document.querySelector('[data-mime-type$="jupyter.stderr"]');
}"""
COUNTS = """() => [".jp-OutputArea-output img", "mjx-container"].map(
    css => document.querySelectorAll(`.jp-Notebook ${css}`).length)"""
WIDER = """() => {  // the page, and what would be cut off or scroll it
    const page = document.documentElement, found = [];
    if (page.scrollWidth > page.clientWidth)
        found.push(`page: ${page.scrollWidth} of ${page.clientWidth}`);
    for (const e of document.querySelectorAll("img, p, li, h1, h2, h3"))
        if (e.getBoundingClientRect().right > page.clientWidth)
            found.push(`${e.tagName}: ${e.alt ?? e.innerText.slice(0, 60)}`);
    return found;
}"""


@pytest.fixture(scope="module")
def browser():
    found = [path for name in BROWSERS if (path := shutil.which(name))]
    if not found:
        pytest.skip(f"no browser here: none of {', '.join(BROWSERS)}")
    with sync_playwright() as playwright:
        chromium = playwright.chromium
        with chromium.launch(executable_path=found[0], args=QUIET) as opened:
            yield opened


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def planted():
    """Return a notebook with one fault of every kind."""
    cell = nbformat.v4.new_markdown_cell
    code = nbformat.v4.new_code_cell
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [
        cell(r"A $\frac$, a $\nonsense$, a lone \alpha, and 5 $."),
        code("from IPython.display import Image"),
        code("Image(b'no image', format='png')"),
        cell("no caption"),
        code("import warnings; warnings.warn('aside')"),
        code("raise ValueError('planted')"),
    ]
    return notebook


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Start JupyterLab on loopback; yield its URL.

    It shows a copy of a clone, the notebooks without outputs, and beside
    them one that is nearly empty and one that is full of faults.
    """
    folder = tmp_path_factory.mktemp("lab")
    home = tmp_path_factory.mktemp("home")
    copy_data(folder)
    notebooks = {name: read(name) for name in NAMES}
    cell = nbformat.v4.new_code_cell("0")
    notebooks["empty"] = nbformat.v4.new_notebook(cells=[cell])
    notebooks["planted"] = planted()
    for name, notebook in notebooks.items():
        notebook.metadata = read(NAMES[0]).metadata
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.update(outputs=[], execution_count=None)
        nbformat.write(notebook, folder / f"{name}.ipynb")
    for plugin, settings in SETTINGS.items():
        file = home / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser"]
    command += ["--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--IdentityProvider.token=", f"--ServerApp.root_dir={folder}"]
    places = ("JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    places += ("JUPYTER_CONFIG_DIR", "IPYTHONDIR")
    environment = os.environ | dict.fromkeys(places, str(home))
    environment["QUICK"] = "1"
    with open(home / "log", "w") as log:
        server = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log
        )
    try:
        for _ in range(120):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/api").close()
                break
            assert server.poll() is None, (home / "log").read_text()
            time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait()


def run_all(browser, lab, name, seconds=900):
    """Open a notebook, run all its cells through the menu, and wait.

    Returns the page, and what the browser's console called an error.
    """
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "console",
        lambda line: line.type == "error" and errors.append(line.text),
    )
    page.goto(f"{lab}/lab/workspaces/{name}/tree/{name}.ipynb")
    page.get_by_text("| Idle").wait_for(timeout=120_000)  # the kernel
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    end = time.monotonic() + seconds
    while not page.evaluate(FINISHED):
        assert time.monotonic() < end, f"not finished after {seconds} s"
        page.wait_for_timeout(500)
    page.wait_for_timeout(2000)  # the last formulas and images
    return page, errors


@pytest.mark.slow
@both
def test_jupyterlab_runs_and_shows_everything(browser, lab, name):
    page, usual = run_all(browser, lab, "empty")
    page.close()
    page, errors = run_all(browser, lab, name)
    with contextlib.closing(page):
        assert page.evaluate(FAULTS) == []
        assert [error for error in errors if error not in usual] == []
        sources = [source for _, source in markdown(name)]
        expected = [len(figures(name)), sum(map(count_formulas, sources))]
        assert page.evaluate(COUNTS) == expected


def count_formulas(source):
    return len(formulas(source.replace(r"\$", "")))


@pytest.mark.slow
def test_planted_faults_are_found(browser, lab):
    page, _ = run_all(browser, lab, "planted")
    with contextlib.closing(page):
        found = "\n".join(page.evaluate(FAULTS))
    for fault in ("aside", "ValueError", "image: ", r"\nonsense"):
        assert fault in found
    assert "left over" in found and "merror" in found


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Serve both committed notebooks as HTML on loopback; yield the URL."""
    npm = shutil.which("npm")
    if not npm:
        pytest.skip("no npm here to get MathJax with")
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([npm, "install", "mathjax@3"], cwd=folder, check=True)
    for theme in ("light", "dark"):
        exporter = HTMLExporter(
            theme=theme,
            mathjax_url="/node_modules/mathjax/es5/tex-chtml.js",
            require_js_url="",
        )
        for name in NAMES:
            text, _ = exporter.from_filename(ROOT / f"{name}.ipynb")
            (folder / f"{name}-{theme}.html").write_text(text, "utf-8")
    handler = functools.partial(Quiet, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, and logs nothing."""

    def log_message(self, *args):
        pass


def open_html(browser, site, name, theme, width):
    """Return the page of a notebook with all its formulas typeset."""
    page = browser.new_page(viewport={"width": width, "height": 800})
    inline = {"inlineMath": [["$", "$"]], "processEscapes": True}
    page.add_init_script(f"window.MathJax = {{tex: {json.dumps(inline)}}}")
    page.route(lambda url: not url.startswith(site), lambda r: r.abort())
    page.goto(f"{site}/{name}-{theme}.html")
    page.evaluate("() => MathJax.startup.promise")
    return page


@pytest.mark.slow
@both
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_html_fits_the_screen(browser, site, name, theme, width):
    with contextlib.closing(
        open_html(browser, site, name, theme, width)
    ) as page:
        assert page.evaluate(FAULTS) == []
        assert page.evaluate(WIDER) == []
        count = sum(count_formulas(source) for _, source in markdown(name))
        assert page.evaluate(COUNTS) == [len(figures(name)), count]
