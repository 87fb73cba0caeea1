"""What the notebooks and the README say is what their cells computed."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import NAMES, ROOT, both, code_cells, outputs_text, read
from test_notebooks import markdown, parsed, pictures

README = (ROOT / "README.md").read_text("utf-8")
COMMANDS = """
    pip install -r requirements.txt && jupyter execute prerequisites.ipynb fwdgrad.ipynb
    pip install -r tests/requirements.txt && pytest
"""  # noqa: E501
BORDER = "--- for the README ---\n"  # stands before and after what is copied
SHARED = ["scale", "show", "doubles", "compare", "compare_mean", "claim", "check"]
KNOWN = """
1803.04386 Wen: Flipout
1906.00889 Lansdell, Prakash, Kording: Learning to solve the credit assignment
2202.08587 Baydin, Pearlmutter, Syme, Wood, Torr: Gradients without Backprop
2209.06302 Belouze: Optimization without Backpropagation
2210.03310 Ren, Kornblith, Liao, Hinton: Scaling Forward Gradient With Local
2212.07282 Bacho, Chu: Low-Variance Forward Gradients
2305.17333 Malladi: Fine-Tuning Language Models with Just Forward Passes
2306.06968 Fournier: Can Forward Gradient Match Backpropagation?
2309.15001 Bos, Schmidt-Hieber: Convergence guarantees for forward gradient
2310.14168 Shukla, Shin: Randomized Forward Mode of Automatic Differentiation
2312.04709 Singhal: How to Guess a Gradient
2410.17764 Flügel: Multi-Tangent Forward Gradients
2506.21833 Panchal: The Cost of Avoiding Backpropagation
2511.16652 Sarkar: Evolution Strategies at the Hyperscale
"""  # arXiv id, authors, title as far as it was known or fits
PAPERS = {line[:10]: line[11:] for line in KNOWN.split("\n")}
NUMBER = re.compile(r"\d+").findall


def prose(name):
    """Return the text of all of a notebook's Markdown cells."""
    return "\n\n".join(source for _, source in markdown(name))


def code(name):
    return "\n\n".join(cell.source for cell in code_cells(read(name)))


def references(text):
    """Return the entries of a text's list of references."""
    found = re.search(r"^#+ References\n(.*?)(?=^#|\Z)", text, re.M | re.S)
    return re.split(r"^(?:\d+\.|-) ", found[1], flags=re.M)[1:]


def numbers(pattern, text):
    """Return the numbers in all the matches of a pattern."""
    return {int(n) for m in re.findall(pattern, text) for n in NUMBER(m)}


def test_what_is_printed_for_the_readme_stands_there():
    parts = outputs_text(read("fwdgrad")).split(BORDER)[1::2]
    assert parts
    for part in parts:
        assert "\n| --- " in part and part in README


def test_every_decimal_of_the_readme_was_printed():
    text = re.sub(r"\[.*?\]\(.*?\)|`.*?`", "", README, flags=re.S)
    printed = outputs_text(read("fwdgrad"))
    found = re.findall(r"\d+\.\d+", text)
    assert [number for number in found if number not in printed] == []


def test_the_picture_of_the_readme_is_a_figure():
    links = re.findall(r"!\[.+?\]\((\.github/.+?\.png)\)", README)
    assert links and len(links) == README.count("![")
    for path in links:
        assert (ROOT / path).read_bytes() in pictures("fwdgrad")


@pytest.mark.parametrize("line", COMMANDS.splitlines()[1:], ids=range(2))
def test_the_readme_has_the_command(line):
    assert f"\n{line}\n" in README
    for file in re.findall(r"\S+\.(?:txt|ipynb)", line):
        assert (ROOT / file).exists()


@pytest.mark.parametrize("text", [README, *map(prose, NAMES)], ids=range(3))
def test_references_name_authors_and_title(text):
    assert references(text)
    for entry in references(text):
        for paper in re.findall(r"\d{4}\.\d{5}", entry):
            authors, title = PAPERS[paper].split(": ")
            assert title.lower() in entry.lower(), entry
            assert all(a in entry for a in authors.split(", ")), entry


def test_arxiv_ids_are_those_of_known_papers():
    for text in [README, *map(prose, NAMES), *map(code, NAMES)]:
        assert {*re.findall(r"\b\d{4}\.\d{5}\b", text)} <= {*PAPERS}


@both
def test_every_reference_is_cited_and_every_section_is_there(name):
    """In the text, as [3] or [2, 5], and as section 4 or sections 5 to 7."""
    tokens = [t for _, source in markdown(name) for t in parsed(source)]
    text = " ".join(t.content for t in tokens if t.type == "text")
    count = len(references(prose(name)))
    assert numbers(r"\[(\d[\d, ]*)\]", text) == {*range(1, count + 1)}
    headings = re.findall(r"^## (\d+)\. (.+)$", prose(name), re.M)
    there = [int(number) for number, _ in headings]
    assert there == [*range(1, len(there) + 1)]
    lists = r"\b[Ss]ections? (\d[\d, ]*(?:(?:and|to) \d+)?)"
    assert numbers(lists, text) <= {*there}
    opening = read(name).cells[0].source
    assert [title for _, title in headings if title not in opening] == []


def test_helpers_of_both_notebooks_are_the_same():
    for one in SHARED:
        texts = [
            ast.get_source_segment(code(name), node)
            for name in NAMES
            for node in ast.parse(code(name)).body
            if getattr(node, "name", None) == one
        ]
        assert len(texts) == 2 and texts[0] == texts[1], one


@both
def test_the_expectation_is_written_one_way(name):
    letter = r"\\(math\w+|operatorname|text)\s*\{?E\b|𝔼"
    for i, source in markdown(name):
        assert not re.search(letter, source), i


def test_spelling():
    """Of all words and names that readers see; nin is one of NumPy's."""
    text = "\n".join([README, *map(prose, NAMES), *map(code, NAMES)])
    command = [sys.executable, "-m", "codespell_lib", "-L", "nin", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
