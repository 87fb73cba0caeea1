"""What the tests share: definitions lifted out of the notebooks, and runs.

The notebooks are the only source of their code. `lift` executes what defines
something in a notebook, and nothing else; `executed` runs both in full.
"""

import ast
import functools
import os
import re
import shutil
import types
from pathlib import Path

import matplotlib
import nbformat
import pytest
import torch
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NAMES = ["prerequisites", "fwdgrad"]
both = pytest.mark.parametrize("name", NAMES)
matplotlib.use("Agg")


def read(name):
    """Return the committed notebook called name."""
    return nbformat.read(ROOT / f"{name}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def sections(name):
    """Return a notebook's code, lists of sources by number of the section.

    The opening cells are section "0".
    """
    found, number = {"0": []}, "0"
    for cell in read(name).cells:
        heading = re.search(r"^## (\d+)\.", cell.source, re.M)
        if cell.cell_type == "markdown" and heading:
            number = heading[1]
        elif cell.cell_type == "code":
            found.setdefault(number, []).append(cell.source)
    return found


def assigned(node):
    """Return the names that an assignment gives a value, "" for others."""
    targets = getattr(node, "targets", None) or [node.target]
    flat = [getattr(target, "elts", [target]) for target in targets]
    return [getattr(name, "id", "") for names in flat for name in names]


def defines(node):
    """Say whether a statement is an import, a definition or a Constant."""
    if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
        return all(name[:1].isupper() for name in assigned(node))
    kinds = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef
    return isinstance(node, kinds)


@functools.cache
def lift(name):
    """Return a module of a notebook's imports, definitions and Constants."""
    module = types.ModuleType(name)
    module.display = lambda *args, **kwargs: None
    for cell in code_cells(read(name)):
        tree = ast.parse(cell.source)
        tree.body = [node for node in tree.body if defines(node)]
        exec(compile(tree, f"{name}.ipynb", "exec"), vars(module))
    return module


@pytest.fixture(scope="session")
def prerequisites():
    return lift("prerequisites")


@pytest.fixture(scope="session")
def fwdgrad():
    return lift("fwdgrad")


@pytest.fixture(scope="module")
def on_the_cpu(fwdgrad):
    """Let the notebook's definitions use the CPU, also where a GPU is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fwdgrad, "DEVICE", torch.device("cpu"))
        yield


def seeded(seed=0):
    """Return a random generator on the CPU."""
    return torch.Generator().manual_seed(seed)


def assert_mean(samples, expected, errors=5):
    """Check the mean of samples (count, ...) to so many standard errors."""
    samples = torch.as_tensor(samples).detach().double()
    expected = torch.as_tensor(expected).detach().double()
    rounding = 1e-6 * samples.abs().amax(0)
    error = samples.std(0) / len(samples) ** 0.5 + rounding / errors
    off = (samples.mean(0) - expected).abs() / error.clamp(min=1e-300)
    assert (off <= errors).all(), f"{off.max():.1f} standard errors off"


def run(notebook, folder, env=None):
    """Run a notebook in folder and return it with its outputs.

    env: the kernel's environment, if not this one without QUICK.
    """
    if not env:
        env = {k: v for k, v in os.environ.items() if k != "QUICK"}
    where = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=1200, resources=where)
    client.execute(env=env)
    return notebook


def copy_data(folder):
    """Copy the four committed archives to folder, as a clone has them."""
    raw = Path(folder) / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for archive in (ROOT / "data" / "MNIST" / "raw").glob("*.gz"):
        shutil.copy(archive, raw)
    return raw


def outputs_text(notebook):
    """Return all the text that a notebook's cells printed."""
    outputs = [o for cell in code_cells(notebook) for o in cell.outputs]
    return "".join(output.get("text", "") for output in outputs)


@pytest.fixture(scope="session")
def executed(tmp_path_factory):
    """Return what runs a notebook in full, once, when first asked for it."""
    folder = tmp_path_factory.mktemp("clone")
    copy_data(folder)
    return functools.cache(lambda name: run(read(name), folder))
