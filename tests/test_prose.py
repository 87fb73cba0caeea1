"""What the notebooks and the README say is what their cells computed."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import NAMES, ROOT, outputs_text, read
from test_notebooks import code_cells, formulas

README = (ROOT / "README.md").read_text("utf-8")
RESULTS = README.partition("\n## Results\n")[2].partition("\n## ")[0]
PAPERS = {  # arXiv id: what must stand before it in a list of references
    "2202.08587": "Baydin, Pearlmutter, Syme, Wood, Torr, "
    "Gradients without Backpropagation",
    "2209.06302": "Belouze",
    "2210.03310": "Ren, Kornblith, Liao, Hinton",
    "2305.17333": "Malladi",
    "2306.06968": "Fournier",
    "2309.15001": "Bos, Schmidt-Hieber",
    "2310.14168": "Shukla, Shin",
    "2312.04709": "Singhal",
    "2410.17764": "Flügel",
    "2506.21833": "Panchal",
    "2511.16652": "EGGROLL",
}
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?")
STEP_TIMES = "fast step / backprop step, time"
ACCURACY = "test accuracy, "  # and the method
both = pytest.mark.parametrize("name", NAMES)


def prose(name):
    """Return the text of all of a notebook's Markdown cells."""
    cells = read(name).cells
    return "\n\n".join(c.source for c in cells if c.cell_type == "markdown")


def code(name):
    return "\n\n".join(cell.source for _, cell in code_cells(name))


def references(text):
    """Return the entries of a text's list of references."""
    found = re.search(r"^#+ References\n(.*?)(?=^#|\Z)", text, re.M | re.S)
    return re.split(r"^(?:\d+\.|-) ", found[1], flags=re.M)[1:]


def table(text, first):
    """Return the rows of the Markdown table whose first heading is first.

    A row is a dict from heading to text.
    """
    lines = text.partition(f"| {first} |")[2].split("\n\n")[0].splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines]
    headings = [first, *cells[0]]
    return [dict(zip(headings, row, strict=True)) for row in cells[2:]]


def printed(name, start):
    """Return the head of a table that a notebook printed, and its rows.

    start: the beginning of the head.
    """
    text = outputs_text(read(name))
    head, *rows = text[text.index(f"\n{start}") + 1 :].splitlines()
    return head, rows


def number(text):
    """Return the number in a text; a percentage as a share of 1."""
    value = float(NUMBER.search(text)[0].replace(",", ""))
    return value / 100 if "%" in text else value


def results():
    """Return the README's results by network, a dict of dicts."""
    return {
        row["network"].replace(" ", "").lower(): row
        for row in table(RESULTS, "network")
    }


def test_readme_has_the_three_networks():
    assert {*results()} == {"logisticregression", "mlp", "cnn"}


def test_readme_parameters_are_the_printed_ones():
    text = outputs_text(read("fwdgrad"))
    for network, size in re.findall(r"(\w+): ([\d,]+) parameters", text):
        assert results()[network.lower()]["parameters"] == size


def test_readme_step_times_are_the_printed_ones():
    """Each row of the printed table has a 0.50 (0.48-0.52) per network."""
    head, rows = printed("fwdgrad", "step / backprop")
    networks = [name.lower() for name in head.split()[3:]]
    printed_ratios = {
        row[:12].strip(): re.findall(r"(\d+\.\d+) ?\(", row)
        for row in rows[:7]
    }
    textbook = re.search(
        r"textbook[\w\s-]+takes ([\d.,\s]+)and (\S+)", RESULTS
    )
    textbook = re.findall(r"\d+\.\d+", " ".join(textbook.groups()))
    assert textbook == printed_ratios["textbook"]
    fast = [results()[network][STEP_TIMES] for network in networks]
    assert len(fast) == 3 and fast == printed_ratios["fast"]


def test_readme_accuracies_are_the_printed_ones():
    _, rows = printed("fwdgrad", "network  ")
    for row in rows[:6]:
        network, *method, _, accuracy, _, _ = row.split()
        start = ACCURACY + " ".join(method)
        shown = [
            number(text)
            for heading, text in results()[network.lower()].items()
            if heading.startswith(start)
        ]
        assert shown == pytest.approx([float(accuracy)]), row


def test_readme_steps_are_those_of_the_code():
    said = re.search(r"takes (\d+) steps on the MLP and (\d+)", RESULTS)
    for network, steps in zip(["MLP", "CNN"], said.groups(), strict=True):
        lengths = f"compare_methods({network}, ({8 * int(steps)}, {steps})"
        assert lengths in code("fwdgrad")  # eight times as many


def test_rows_of_the_readme_scoreboard_are_printed_rows():
    """Accuracy and seconds of a method stand together in a line."""
    _, lines = printed("fwdgrad", "method  ")
    for row in table(RESULTS, "method"):
        accuracy, seconds = (number(row[k]) for k in [*row][1:])
        start = f"{100 * accuracy:.2f}%{seconds:9.1f} "
        assert any(start in line for line in lines), row


def test_every_decimal_of_the_readme_results_was_printed():
    """A decimal number stands in fwdgrad's outputs, % as a share of 1."""
    form = NUMBER.pattern + r"(?: ?%)?"
    outputs = outputs_text(read("fwdgrad"))
    known = [number(found) for found in re.findall(form, outputs)]
    for found in re.findall(form, RESULTS):
        if "." in found:
            assert pytest.approx(number(found)) in known, found


def test_arxiv_numbers_are_those_of_the_known_papers():
    for text in [README, *map(prose, NAMES), *map(code, NAMES)]:
        found = re.findall(r"arxiv\S*[\s/]+(\d{4}\.\d{4,5})", text, re.I)
        assert {*found} <= {*PAPERS}


@pytest.mark.parametrize("text", [README, *map(prose, NAMES)], ids=range(3))
def test_references_name_the_authors_of_their_papers(text):
    assert references(text)
    for entry in references(text):
        for paper in re.findall(r"\d{4}\.\d{4,5}", entry):
            missing = [w for w in PAPERS[paper].split(", ") if w not in entry]
            assert not missing, entry


@both
def test_cited_references_and_sections_exist(name):
    text = prose(name)
    sections = [int(n) for n in re.findall(r"^## (\d+)\.", text, re.M)]
    assert sections == list(range(1, len(sections) + 1))
    for kind, count in (
        ("reference", len(references(text))),
        ("section", len(sections)),
    ):
        cited = rf"\b{kind}s? (\d+)(?:(?:,| and| to) (\d+))*"
        for found in re.findall(cited, text):
            assert all(1 <= int(n) <= count for n in found if n), found


@both
def test_opening_cell_lists_the_sections(name):
    opening = read(name).cells[0].source.partition("**Contents**")[2]
    for heading in re.findall(r"^## (\d+\. .+)$", prose(name), re.M):
        assert heading in opening


@both
def test_reading_time_is_measured(name):
    """At 200 words a minute and 20 seconds a code cell, to 5 minutes."""
    minutes = len(prose(name).split()) / 200 + len(code_cells(name)) / 3
    found = re.search(
        r"\*\*Reading time\*\*: about (\d+) minutes", prose(name)
    )
    assert found, f"no reading time, should be {minutes:.0f}"
    assert int(found[1]) == 5 * round(minutes / 5)


@both
def test_every_definition_has_a_docstring(name):
    kinds = ast.FunctionDef | ast.ClassDef
    nodes = [n for n in ast.parse(code(name)).body if isinstance(n, kinds)]
    assert nodes
    assert [n.name for n in nodes if not ast.get_docstring(n)] == []


@both
def test_notation_is_used_in_text_and_code(name):
    rows = table(prose(name), "symbol")
    before, _, after = prose(name).partition("| symbol |")
    rest = before + after.partition("\n\n")[2]
    used = [found[0] for found in formulas(rest)]
    names = {
        getattr(node, attribute, None)
        for node in ast.walk(ast.parse(code(name)))
        for attribute in ("id", "arg", "attr", "name")
    }
    for row in rows:
        for symbol in re.findall(r"\$(.+?)\$", row["symbol"]):
            symbol = symbol.partition(" = ")[0]
            whole = r"\s*".join(map(re.escape, symbol.split()))
            whole = rf"(?<![A-Za-z]){whole}(?![A-Za-z])"
            assert any(re.search(whole, formula) for formula in used), symbol
        for example in re.findall(r"`(.+?)`", row["name in code"]):
            assert {*re.findall(r"[A-Za-z_]\w*", example)} <= names, example


def test_spelling():
    """Of all words and names that readers see; nin is one of NumPy's."""
    text = "\n".join([README, *map(prose, NAMES), *map(code, NAMES)])
    done = subprocess.run(
        [sys.executable, "-m", "codespell_lib", "-L", "nin", "-"],
        input=text,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
