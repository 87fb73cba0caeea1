"""What the tests share: definitions lifted out of the notebooks, and runs.

The notebooks are the only source of their code. `lift` executes what defines
something in a notebook, and nothing else; `executed` runs both in full.
"""

import ast
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
matplotlib.use("Agg")


def read(name):
    """Return the committed notebook called name."""
    return nbformat.read(ROOT / f"{name}.ipynb", as_version=4)


def defines(node):
    """Say whether a statement is an import, a definition or a Constant."""
    if isinstance(node, ast.Assign):
        names = [getattr(target, "id", "") for target in node.targets]
        return all(name[:1].isupper() for name in names)
    kinds = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef
    return isinstance(node, kinds)


def lift(name):
    """Return a module of a notebook's imports, definitions and constants."""
    module = types.ModuleType(name)
    module.display = lambda *args, **kwargs: None
    for cell in read(name).cells:
        if cell.cell_type == "code":
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


def run(notebook, folder, env=None, **client):
    """Run a notebook in folder and return it with its outputs.

    env: the kernel's environment, if not this one.
    """
    resources = {"metadata": {"path": str(folder)}}
    options = {"kernel_name": "python3", "timeout": 900} | client
    client = NotebookClient(notebook, resources=resources, **options)
    client.execute(**({"env": env} if env else {}))
    return notebook


def execute(name, folder, replace=None, **client):
    """Execute a notebook in folder and return it with its outputs.

    replace: a dict of source texts to exchange before the run.
    """
    notebook = read(name)
    for old, new in (replace or {}).items():
        assert any(old in cell.source for cell in notebook.cells), old
        for cell in notebook.cells:
            cell.source = cell.source.replace(old, new)
    return run(notebook, folder, **client)


def copy_data(folder):
    """Copy the four committed archives to folder, as a clone has them."""
    raw = Path(folder) / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for archive in (ROOT / "data" / "MNIST" / "raw").glob("*.gz"):
        shutil.copy(archive, raw)
    return raw


def outputs_text(notebook):
    """Return all the text that a notebook's cells printed."""
    outputs = [o for c in notebook.cells for o in c.get("outputs", [])]
    return "".join(o.get("text", "") for o in outputs)


@pytest.fixture(scope="session")
def executed(tmp_path_factory):
    """Execute both notebooks in full, once, from temporary copies."""
    folder = tmp_path_factory.mktemp("clone")
    copy_data(folder)
    return {name: execute(name, folder) for name in NAMES}
