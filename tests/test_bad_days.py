"""Bad days: no network, no data, no right to write, cells run twice or alone.

Whole notebooks run here in quick mode, two at a time, with one thread each.
"""

import ast
import builtins
import os
import re
import shutil
import subprocess
import symtable
import sys
from concurrent.futures import ThreadPoolExecutor

import nbformat
import pytest
import torch
import torchvision
from conftest import NAMES, copy_data, defines, read, run
from nbclient.exceptions import CellExecutionError
from test_notebooks import PNG, bad_outputs

NOWHERE = "http://127.0.0.1:9/"  # refuses every connection
QUICK = {"QUICK": "1", "OMP_NUM_THREADS": "1"}
SETPRIV = shutil.which("setpriv")
OFFLINE = {"http_proxy": NOWHERE, "https_proxy": NOWHERE, "no_proxy": ""}
SEEDS = range(1, 11)
DATA = {"digits", "held_out"}  # what sections share besides definitions
CLOCKS = re.compile(
    r"\btime(it)?\.|seconds|\b(race\w*|launch|peak\w*|timed|score)\b|plot_runs"
)
PROGRESS = re.compile(r" +iteration .*\n")


def sections(name):
    """Return a notebook's code cells by section, a dict in order.

    The opening cells are section "0".
    """
    found, number = {"0": []}, "0"
    for cell in read(name).cells:
        heading = re.match(r"## (\d+)\.", cell.source)
        if cell.cell_type == "markdown" and heading:
            number = heading[1]
        elif cell.cell_type == "code":
            found.setdefault(number, []).append(cell.source)
    return found


def statements(source):
    """Yield (text, node) of each top-level statement, with decorators."""
    lines = source.splitlines()
    for node in ast.parse(source).body:
        first = [d.lineno for d in getattr(node, "decorator_list", [])]
        start = min([node.lineno, *first])
        yield "\n".join(lines[start - 1 : node.end_lineno]), node


def bound(source):
    """Return the names that a source's top level gives a value."""
    symbols = symtable.symtable(source, "cell", "exec").get_symbols()
    return {
        symbol.get_name()
        for symbol in symbols
        if symbol.is_assigned() or symbol.is_imported()
    }


def used(source):
    """Return the global names that a source refers to."""

    def walk(table):
        for symbol in table.get_symbols():
            outside = symbol.is_global() and not symbol.is_local()
            outside |= table.get_type() == "module"
            if outside and symbol.is_referenced():
                yield symbol.get_name()
        for child in table.get_children():
            yield from walk(child)

    table = symtable.symtable(source, "cell", "exec")
    return {*walk(table)} - {*dir(builtins)}


def definitions(name, number):
    """Return the definitions of other sections that a section names.

    These are imports, functions, classes and Constants, and the cells that
    load the data, with what they name themselves, in the notebook's order.
    """
    found = sections(name)
    wanted = set().union(*map(used, found.pop(number)))
    opening = "\n".join(found.pop("0"))
    known = bound(opening)
    others = []
    for cell in (cell for cells in found.values() for cell in cells):
        if bound(cell) & DATA:
            others.append((cell, bound(cell) & DATA))
            continue
        parts = [text for text, n in statements(cell) if defines(n)]
        others += [(text, bound(text)) for text in parts]
    chosen = set()
    while more := {
        i
        for i, (_, names) in enumerate(others)
        if i not in chosen and (names - known) & wanted
    }:
        chosen |= more
        wanted |= set().union(*(used(others[i][0]) for i in more))
    return "\n\n\n".join(others[i][0] for i in sorted(chosen))


def notebook_of(name, sources):
    """Return a notebook of code cells, with the metadata of the original."""
    notebook = nbformat.v4.new_notebook(metadata=read(name).metadata)
    notebook.cells = [nbformat.v4.new_code_cell(s) for s in sources if s]
    return notebook


def loads_data(source):
    return "load_mnist(train" in source


def alone(folder, name, number, data=True):
    """Run a section after the opening cells and the definitions it names."""
    found, lifted = sections(name), definitions(name, number)
    cells = [*found["0"], lifted, *found[number]]
    if data and any(map(loads_data, cells)):
        copy_data(folder)
    environment = os.environ | QUICK | OFFLINE
    return run(notebook_of(name, cells), folder, env=environment)


def offline(folder, name, number):
    """Run a section in an empty folder; return the notebook and its error."""
    with pytest.raises(CellExecutionError) as caught:
        alone(folder, name, number, data=False)
    return caught.value


def twice(folder, name):
    """Run every cell of a notebook two times in a row."""
    copy_data(folder)
    sources = [s for cells in sections(name).values() for s in cells]
    notebook = notebook_of(name, [s for s in sources for _ in range(2)])
    return run(notebook, folder, env=os.environ | QUICK | OFFLINE)


def seed(folder, name, number):
    """Run a notebook with another seed where nobody can write.

    Returns the finished process of a `jupyter execute` like the README's.
    """
    if any(loads_data(cell.source) for cell in read(name).cells):
        copy_data(folder)
        torchvision.datasets.MNIST(folder / "data", download=True)
    notebook = read(name)
    changed = [cell for cell in notebook.cells if "SEED = 0" in cell.source]
    for cell in changed:
        cell.source = cell.source.replace("SEED = 0", f"SEED = {number}")
    assert len(changed) == 1
    nbformat.write(notebook, folder / f"{name}.ipynb")
    jupyter = [sys.executable, "-m", "jupyter", "execute", f"{name}.ipynb"]
    return subprocess.run(
        [*read_only(folder), *jupyter],
        cwd=folder,
        env=os.environ | QUICK | OFFLINE,
        capture_output=True,
        text=True,
    )


def read_only(folder):
    """Forbid to write in a folder; return what makes root obey, too."""
    for path in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        path.chmod(0o555)
    if not hasattr(os, "geteuid") or os.geteuid() or not SETPRIV:
        return []
    drop = "-dac_override,-dac_read_search"
    return [SETPRIV, f"--bounding-set={drop}", f"--inh-caps={drop}"]


DAYS = [("twice", name) for name in NAMES]
DAYS += [("seed", name, seed) for name in NAMES for seed in SEEDS]
for name in NAMES:
    for number, cells in sections(name).items():
        DAYS += [("alone", name, number)] * (number != "0")
        DAYS += [("offline", name, number)] * any(map(loads_data, cells))
KINDS = {"alone": alone, "offline": offline, "twice": twice, "seed": seed}


def days_of(kind):
    chosen = [day for day in DAYS if day[0] == kind]
    ids = ["-".join(map(str, day[1:])) for day in chosen]
    return pytest.mark.parametrize("day", chosen, ids=ids)


@pytest.fixture(scope="module")
def result(request, tmp_path_factory):
    """Run all the days that were asked for, two at a time.

    Returns a function that waits for the result of a day.
    """
    items = [i for i in request.session.items if hasattr(i, "callspec")]
    chosen = [item.callspec.params for item in items]
    days = [params["day"] for params in chosen if "day" in params]
    pool = ThreadPoolExecutor(2)
    futures = {
        day: pool.submit(
            KINDS[day[0]], tmp_path_factory.mktemp("day"), *day[1:]
        )
        for day in days
    }
    yield lambda day: futures[day].result()
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", NAMES)
def test_sections_share_only_definitions_and_data(name):
    opening, *others = sections(name)
    for number in others:
        cells = [*sections(name)[opening], definitions(name, number)]
        cells += sections(name)[number]
        known = set().union({"display", "__file__"}, *map(bound, cells))
        unknown = set().union(*map(used, cells)) - known
        assert not unknown, number


@pytest.mark.slow
@days_of("alone")
def test_section_runs_without_the_others(result, day):
    assert bad_outputs(result(day)) == []


@pytest.mark.slow
@days_of("offline")
def test_no_data_and_no_network_is_one_sentence(result, day):
    error = result(day)
    assert error.ename == "DataError"
    _, shown = error.traceback.rsplit("------------------\n", 1)
    assert shown.strip() == f"DataError: {error.evalue}"
    assert "\n" not in error.evalue
    assert "connect to the internet" in error.evalue


def outcome(cell):
    """Return what a cell showed, less what depends on the clock."""
    timed = CLOCKS.search(cell.source)
    text = "".join(output.get("text", "") for output in cell.outputs)
    text = PROGRESS.sub("", text)
    if timed:
        return re.sub(r"[\d.,]+(e-?\d+)?", "0", text).split()
    return text, [o.data.get(PNG) for o in cell.outputs if "data" in o]


@pytest.mark.slow
@days_of("twice")
def test_any_cell_can_be_run_twice(result, day):
    notebook = result(day)
    assert bad_outputs(notebook) == []
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    pairs = list(zip(cells[::2], cells[1::2], strict=True))
    assert all(first.source == second.source for first, second in pairs)
    different = [a.source for a, b in pairs if outcome(a) != outcome(b)]
    assert different == []


@pytest.mark.slow
@days_of("seed")
def test_every_claim_holds_for_other_seeds(result, day):
    done = result(day)
    assert done.returncode == 0, done.stderr


def test_root_obeys_a_read_only_folder_too(tmp_path):
    touch = [*read_only(tmp_path), "touch", str(tmp_path / "file")]
    done = subprocess.run(touch, capture_output=True, text=True)
    if not SETPRIV and not done.returncode:
        pytest.skip("root writes everywhere, and there is no setpriv here")
    assert done.returncode != 0


def test_the_device_is_one_that_is_there(fwdgrad):
    """CUDA's libraries may be installed where there is no GPU."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    assert fwdgrad.DEVICE.type == kind
