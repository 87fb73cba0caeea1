"""Both notebooks: tidy as committed, readable on GitHub, and they run."""

import ast
import base64
import hashlib
import io
import itertools
import json
import re
import statistics
import subprocess
import sys

import matplotlib.image
import nbformat
import pytest
import torchvision
from conftest import NAMES, ROOT, defines, read

PNG = "image/png"
PLACES = "home|root|work|tmp|usr|opt|mnt|var|content|Users|private"
ABSOLUTE = re.compile(
    rf"(?<![\w./:~-])/(?:{PLACES})\b|\b[A-Z]:\\\w|file://|site-packages"
)
PACKAGES = ["torch", "torchvision", "numpy", "matplotlib", "jupyter"]
both = pytest.mark.parametrize("name", NAMES)


def load(name):
    """Return the committed file as it is, without nbformat's repairs."""
    return json.loads((ROOT / f"{name}.ipynb").read_text("utf-8"))


def is_code(cell):
    return cell.cell_type == "code"


def code_cells(name):
    return [(i, c) for i, c in enumerate(read(name).cells) if is_code(c)]


def markdown(name):
    """Yield (index, source without code) of every Markdown cell."""
    fence = re.compile(r"^ *```.*?^ *```", re.M | re.S)
    for i, cell in enumerate(read(name).cells):
        if cell.cell_type == "markdown":
            yield i, re.sub(r"(`+).+?\1", "code", fence.sub("", cell.source))


def formulas(source):
    """Return a list of matches, display math and inline math."""
    return list(re.finditer(r"\$\$.*?\$\$|\$.+?\$", source, re.S))


def emphasised(source):
    """Return where Markdown pairs a _ or * that belongs to a formula.

    A delimiter opens or closes emphasis by what stands on its two sides
    (https://spec.commonmark.org/0.31.2/#emphasis-and-strong-emphasis).
    """
    math = {i for found in formulas(source) for i in range(*found.span())}
    found, openers = [], {"_": [], "*": []}
    for mark in re.finditer(r"(?<!\\)[_*]+|\n\n", source):
        if mark[0] == "\n\n":
            openers = {"_": [], "*": []}
            continue
        before = source[: mark.start()][-1:] or " "
        after = source[mark.end() :][:1] or " "
        b, a = (re.match(r"(\s)?(\w)?", c) for c in (before, after))
        left = not a[1] and bool(a[2] or not b[2])
        right = not b[1] and bool(b[2] or not a[2])
        if mark[0][0] == "_":
            left, right = left and not b[2], right and not a[2]
        stack = openers[mark[0][0]]
        if right and stack:
            start = stack.pop()
            if start in math or mark.start() in math:
                found.append(source[start : mark.end()])
        elif left:
            stack.append(mark.start())
    return found


def bad_outputs(notebook):
    """Return the errors, the warnings and what went to stderr, by cell."""
    found = []
    for i, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            text = output.get("text", "")
            if (
                output.output_type == "error"
                or output.get("name") == "stderr"
                or re.search(r"\b\w*Warning:", text)
            ):
                found.append((i, text or output.get("ename")))
    return found


def figures(name):
    """Return (index of the cell, output) of every output with an image."""
    return [
        (i, output)
        for i, cell in code_cells(name)
        for output in cell.outputs
        if any(key.startswith("image/") for key in output.get("data", {}))
    ]


def strings(value):
    """Yield every string inside a notebook, but no image."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        if all(isinstance(part, str) for part in value):
            value = ["".join(value)]
        for part in value:
            yield from strings(part)
    elif isinstance(value, dict):
        for key, part in value.items():
            if not key.startswith("image/") or isinstance(part, dict):
                yield from strings(part)


def keys(value):
    """Yield every key of the objects inside a notebook."""
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from keys(part)


@both
def test_format_is_valid(name):
    notebook = load(name)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) >= (4, 5)
    nbformat.validate(notebook)


@both
def test_cell_ids_are_unique(name):
    ids = [cell.get("id") for cell in load(name)["cells"]]
    assert None not in ids
    assert len(set(ids)) == len(ids)


@both
def test_kernel_is_python3(name):
    assert load(name)["metadata"]["kernelspec"]["name"] == "python3"


@both
def test_cells_were_executed_in_order(name):
    counts = [cell.execution_count for _, cell in code_cells(name)]
    assert counts == list(range(1, len(counts) + 1))


@both
def test_no_output_is_an_error_or_a_warning(name):
    assert bad_outputs(read(name)) == []


@both
def test_printed_text_is_in_one_piece(name):
    """Viewers show every piece on lines of its own, which breaks tables."""
    for index, cell in code_cells(name):
        kinds = [(o.output_type, o.get("name")) for o in cell.outputs]
        pairs = zip(kinds, kinds[1:], strict=False)
        assert all(x != y for x, y in pairs if x[0] == "stream"), index


@both
def test_no_widgets(name):
    assert not [key for key in keys(load(name)) if "widget" in key.lower()]


@both
def test_no_absolute_path(name):
    hits = [
        text[max(0, hit.start() - 30) : hit.end() + 30]
        for text in strings(load(name))
        for hit in ABSOLUTE.finditer(text)
    ]
    assert hits == []


@both
def test_no_cell_is_empty(name):
    cells = read(name).cells
    assert [i for i, c in enumerate(cells) if not c.source.strip()] == []


@both
def test_every_figure_is_a_png_with_alternative_text(name):
    found = figures(name)
    assert found
    for i, output in found:
        alt = output.metadata.get(PNG, {}).get("alt", "")
        assert alt.strip(), i
        assert set(output.data) <= {PNG, "text/plain"}, i


@both
def test_every_figure_has_a_caption_below(name):
    cells = [*read(name).cells, nbformat.v4.new_markdown_cell()]
    wrong = [
        i for i, _ in figures(name) if "*Figure" not in cells[i + 1].source
    ]
    assert wrong == []


@both
def test_figures_are_opaque_and_on_white(name):
    for i, output in figures(name):
        data = io.BytesIO(base64.b64decode(output.data[PNG]))
        pixels = matplotlib.image.imread(data)
        assert (pixels[0, 0, :3] == 1).all(), i
        assert (pixels[..., 3:] == 1).all(), i


@both
def test_file_is_under_a_megabyte(name):
    assert (ROOT / f"{name}.ipynb").stat().st_size < 1_000_000


@both
def test_words_stand_before_every_code_cell(name):
    pairs = enumerate(itertools.pairwise(read(name).cells), start=1)
    assert [i for i, (a, b) in pairs if is_code(a) and is_code(b)] == []
    assert not is_code(read(name).cells[0])


def code_lines(cell):
    return sum(bool(line.strip()) for line in cell.source.splitlines())


@both
def test_no_code_cell_is_long(name):
    sizes = {i: code_lines(cell) for i, cell in code_cells(name)}
    assert {i: size for i, size in sizes.items() if size > 25} == {}


@pytest.mark.parametrize(
    ("name", "lines"), [("prerequisites", 6), ("fwdgrad", 15)]
)
def test_half_of_the_code_cells_are_short(name, lines):
    sizes = [code_lines(cell) for _, cell in code_cells(name)]
    assert statistics.median(sizes) <= lines


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff_finds_nothing(command):
    ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "."]
    done = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@both
def test_display_math_has_its_dollars_on_lines_of_their_own(name):
    for i, source in markdown(name):
        lines = [line for line in source.splitlines() if "$$" in line]
        assert all(line.strip() == "$$" for line in lines), i
        assert len(lines) % 2 == 0, i


@both
def test_inline_math_touches_its_dollars(name):
    for i, source in markdown(name):
        source = re.sub(r"\$\$.*?\$\$", "", source, flags=re.S)
        for line in source.replace(r"\$", "").splitlines():
            parts = line.split("$")
            assert len(parts) % 2 == 1, (i, line)
            for formula in parts[1::2]:
                assert formula and formula == formula.strip(), (i, line)


@both
def test_math_has_nothing_that_github_spoils(name):
    for i, source in markdown(name):
        assert not re.search(r"\\(re)?newcommand|\\def\b", source), i
        for formula in formulas(source):
            spoilt = r"(?<!\\)\\[,;:!{}|_*%]|<[A-Za-z]"
            assert not re.search(spoilt, formula[0]), (i, formula[0])


@both
def test_environments_stand_inside_display_math(name):
    inner = {"aligned", "cases", "pmatrix", "bmatrix", "array"}
    for i, source in markdown(name):
        outside = re.sub(r"\$\$.*?\$\$", "", source, flags=re.S)
        assert r"\begin" not in outside, i
        assert {*re.findall(r"\\begin\{(.*?)\}", source)} <= inner, i


@both
def test_no_line_of_display_math_looks_like_markdown(name):
    """No list, heading, quotation or paragraph begins inside a formula."""
    for i, source in markdown(name):
        for formula in re.findall(r"\$\$\n(.*?)\n\$\$", source, re.S):
            for line in formula.splitlines():
                assert not re.match(r"\s*([-+*=>#]|\d+\.|$)", line), (i, line)


@both
def test_inline_math_is_no_part_of_a_word(name):
    for i, source in markdown(name):
        for found in formulas(source.replace(r"\$", "  ")):
            around = source[: found.start()][-1:] + source[found.end() :][:1]
            assert not re.search(r"\w", around), (i, found[0])


@both
def test_table_rows_have_as_many_cells_as_their_heading(name):
    """A bar inside a formula or code would open another cell."""
    for i, source in enumerate(c.source for c in read(name).cells):
        for table in re.findall(r"(?:^\|.*\|$\n?){2,}", source, re.M):
            assert len({row.count("|") for row in table.splitlines()}) == 1, i


@both
def test_markdown_does_not_pair_characters_of_formulas(name):
    found = {i: emphasised(source) for i, source in markdown(name)}
    assert {i: pairs for i, pairs in found.items() if pairs} == {}


@both
def test_markdown_has_no_html_and_no_link_to_an_anchor(name):
    for i, source in markdown(name):
        assert not re.search(r"</?(?!https?:)[A-Za-z!][^<>]*>", source), i
        assert "](#" not in source, i


@both
def test_imports_are_installed_in_colab(name):
    allowed = {*PACKAGES[:4], *sys.stdlib_module_names}
    for i, cell in code_cells(name):
        modules = set()
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add(node.module)
        assert {m.partition(".")[0] for m in modules} <= allowed, i


@both
def test_no_definition_replaces_another(name):
    defined = {}
    for i, cell in code_cells(name):
        for node in filter(defines, ast.parse(cell.source).body):
            if isinstance(node, ast.Assign):
                found = {target.id for target in node.targets}
            else:
                found = {getattr(node, "name", None)} - {None}
            for one in found:
                assert defined.setdefault(one, i) == i, (one, i)


def test_requirements_are_five_lower_bounds():
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    names, bounds = zip(*(line.split(">=") for line in lines), strict=True)
    assert sorted(names) == sorted(PACKAGES)
    assert all(re.fullmatch(r"\d+(\.\d+)*", bound) for bound in bounds)


def test_archives_are_the_original_four():
    raw = ROOT / "data" / "MNIST" / "raw"
    found = {
        file.name: hashlib.md5(file.read_bytes()).hexdigest()
        for file in raw.glob("*.gz")
    }
    assert found == dict(torchvision.datasets.MNIST.resources)


@pytest.mark.slow
@both
def test_full_run_is_clean(executed, name):
    assert bad_outputs(executed[name]) == []
    cells = [cell for cell in executed[name].cells if is_code(cell)]
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1))
