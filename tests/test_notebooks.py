"""Both notebooks: tidy as committed, readable on GitHub, and they run."""

import ast
import base64
import hashlib
import io
import itertools
import json
import re
import subprocess
import symtable
import sys
import warnings

import matplotlib.image
import nbformat
import pytest
import torchvision
from conftest import (
    ROOT,
    assigned,
    both,
    code_cells,
    defines,
    outputs_text,
    read,
)
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin

PNG = "image/png"
PLACES = "home|root|work|tmp|usr|opt|mnt|var|content|Users|private"
ABSOLUTE = re.compile(
    rf"(?<![\w./:~-])/(?:{PLACES})\b|\b[A-Z]:\\+\w|file://|site-packages"
)
PACKAGES = ["torch", "torchvision", "numpy", "matplotlib", "jupyter"]
ENVIRONMENTS = {"aligned", "cases", "pmatrix", "bmatrix", "array"}
DIFFERS = "differs on this machine: "
PLAIN = MarkdownIt("commonmark").enable("table")  # knows no maths
MATHS = MarkdownIt("commonmark").enable("table")
MATHS.use(
    dollarmath_plugin,
    allow_labels=False,
    allow_space=False,
    allow_blank_lines=False,
    double_inline=True,
)


def cells_of(name, kind):
    """Return (index among all cells, cell) of every cell of a kind."""
    cells = enumerate(read(name).cells)
    return [(i, cell) for i, cell in cells if cell.cell_type == kind]


def markdown(name):
    """Return (index, source) of every Markdown cell."""
    return [(i, cell.source) for i, cell in cells_of(name, "markdown")]


def parsed(source, parser=MATHS):
    """Return the tokens of a Markdown text that have no parts."""
    tokens = [[t, *(t.children or [])] for t in parser.parse(source)]
    return [t for t in itertools.chain(*tokens) if t.type != "inline"]


def formulas(source):
    """Return (text, is display maths) of every formula."""
    found = [t for t in parsed(source) if t.type.startswith("math")]
    return [(t.content, t.type != "math_inline") for t in found]


def bad_outputs(notebook):
    """Return the errors, the warnings and what went to stderr, by cell."""
    return [
        (i, output.get("text") or output.get("evalue"))
        for i, cell in enumerate(notebook.cells)
        for output in cell.get("outputs", [])
        if output.output_type == "error"
        or output.get("name") == "stderr"
        or re.search(r"\b\w*Warning:", output.get("text", ""))
    ]


def figures(name):
    """Return (index of the cell, output) of every output with an image."""
    return [
        (i, output)
        for i, cell in cells_of(name, "code")
        for output in cell.outputs
        if any(key.startswith("image/") for key in output.get("data", {}))
    ]


def pictures(name):
    """Return the bytes of every figure of a notebook."""
    return [base64.b64decode(o.data[PNG]) for _, o in figures(name)]


def defined(node):
    """Return the names of a definition, or of the Constants assigned."""
    if isinstance(node, ast.Import | ast.ImportFrom | ast.AugAssign):
        return []
    return [node.name] if hasattr(node, "name") else assigned(node)


def symbols(nodes):
    """Return the symbols at the top level of some statements."""
    source = ast.unparse(ast.Module(nodes, type_ignores=[]))
    return symtable.symtable(source, "cell", "exec").get_symbols()


@both
def test_format_ids_and_kernel_are_those_of_today(name):
    notebook = json.loads((ROOT / f"{name}.ipynb").read_text("utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) >= (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    nbformat.validate(notebook)  # it would repair ids
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert (ROOT / f"{name}.ipynb").stat().st_size < 1_000_000


@both
def test_outputs_are_those_of_a_clean_full_run(name):
    """Viewers show printed pieces on lines of their own: there is but one."""
    counts = [c.execution_count for _, c in cells_of(name, "code")]
    assert counts == list(range(1, len(counts) + 1))
    assert bad_outputs(read(name)) == []
    text = outputs_text(read(name))
    assert "quick mode True" not in text and DIFFERS not in text
    for i, cell in cells_of(name, "code"):
        for a, b in itertools.pairwise(cell.outputs):
            assert not a.get("name") or a.name != b.get("name"), i


@both
def test_no_widgets_and_no_absolute_path(name):
    notebook = read(name)
    for cell in code_cells(notebook):
        for output in cell.outputs:
            output.get("data", {}).pop(PNG, None)
    text = json.dumps(notebook).replace(r"\n", "\n")
    assert "widget" not in text.lower()
    assert not ABSOLUTE.search(text), ABSOLUTE.search(text)


@both
def test_every_figure_is_an_opaque_png_on_white_with_words(name):
    cells = [*read(name).cells, nbformat.v4.new_markdown_cell()]
    assert figures(name)
    for i, output in figures(name):
        assert set(output.data) <= {PNG, "text/plain"}, i
        assert output.metadata.get(PNG, {}).get("alt", "").strip(), i
        assert cells[i + 1].source.startswith("*Figure"), i
        data = io.BytesIO(base64.b64decode(output.data[PNG]))
        pixels = matplotlib.image.imread(data)
        assert (pixels[0, 0, :3] == 1).all(), i
        assert (pixels[..., 3:] == 1).all(), i


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff_finds_nothing(command):
    ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "."]
    done = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@both
def test_formulas_are_what_github_finds_and_knows(name):
    """No dollar is left over, and no formula is a part of a word."""
    for i, source in markdown(name):
        for a, b in itertools.pairwise(parsed(source)):
            assert a.type != "text" or "$" not in a.content, (i, a.content)
            if (a.type, b.type) == ("math_inline", "text"):
                assert not re.match(r"\w", b.content), (i, a.content)
            if (a.type, b.type) == ("text", "math_inline"):
                assert not re.search(r"\w$", a.content), (i, b.content)
        lines = [line for line in source.splitlines() if "$$" in line]
        assert all(line.strip() == "$$" for line in lines), i
        for text, display in formulas(source):
            begun = re.findall(r"\\begin\{(.*?)\}", text)
            assert {*begun} <= (ENVIRONMENTS if display else set()), i
            assert display or r"\\" not in text, (i, text)
            wrong = r"\\(re)?newcommand|\\def\b|<[A-Za-z]"
            assert not re.search(wrong, text), (i, text)


@both
def test_markdown_leaves_formulas_alone(name):
    r"""What knows no maths changes no character of a formula.

    It would pair _ and *, drop the backslash of \, and \{, and see links,
    lists and headings.  The \\ that ends a line is safe.
    """
    for i, source in markdown(name):
        tokens = parsed(source.replace(r"\\", "&&"), PLAIN)
        rest = "".join("".join(t.content for t in tokens).split())
        for text, _ in formulas(source):
            text = "".join(text.replace(r"\\", "&&").split())
            _, found, rest = rest.partition(text)
            assert found, (i, text)


@both
def test_markdown_has_no_ragged_table_html_or_link_to_an_anchor(name):
    """A bar inside a formula or code would open another cell."""
    for i, source in markdown(name):
        for token in parsed(source):
            assert not token.type.startswith("html"), (i, token.content)
            assert not str(token.attrGet("href")).startswith("#"), i
        for table in re.findall(r"(?:^\|.*\|$\n?){2,}", source, re.M):
            assert len({row.count("|") for row in table.splitlines()}) == 1, i


@both
def test_imports_are_installed_in_colab(name):
    allowed = {*PACKAGES[:4], *sys.stdlib_module_names}
    for i, cell in cells_of(name, "code"):
        for node in ast.walk(ast.parse(cell.source)):
            modules = [getattr(node, "module", None)]
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            roots = {m.partition(".")[0] for m in modules if m}
            assert roots <= allowed, i


@both
def test_no_definition_is_replaced_by_another_or_by_a_variable(name):
    """Else a section would fail when it is run again after a later one."""
    where, body = {}, []
    for i, cell in cells_of(name, "code"):
        body += ast.parse(cell.source).body
        for node in filter(defines, ast.parse(cell.source).body):
            for one in defined(node):
                assert where.setdefault(one, i) == i, (one, i)
    imported = {s.get_name() for s in symbols(body) if s.is_imported()}
    rest = symbols([node for node in body if not defines(node)])
    variables = {s.get_name() for s in rest if s.is_assigned()}
    assert variables & (where.keys() | imported) == set()


def test_requirements_are_five_lower_bounds():
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    names, bounds = zip(*(line.split(">=") for line in lines), strict=True)
    assert sorted(names) == sorted(PACKAGES)
    assert all(re.fullmatch(r"\d+(\.\d+)*", bound) for bound in bounds)


def test_archives_are_the_original_four():
    files = (ROOT / "data" / "MNIST" / "raw").glob("*.gz")
    found = {f.name: hashlib.md5(f.read_bytes()).hexdigest() for f in files}
    assert found == dict(torchvision.datasets.MNIST.resources)


@pytest.mark.slow
@both
def test_full_run_is_clean(executed, name):
    """A claim that differs on this machine is reported, and no failure."""
    assert bad_outputs(executed(name)) == []
    for line in outputs_text(executed(name)).splitlines():
        if line.startswith(DIFFERS):
            warnings.warn(f"{name}: {line}", stacklevel=1)
