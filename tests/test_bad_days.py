"""Bad days: no data, no right to write, sections again, other machines.

Whole notebooks run here in quick mode, two at a time, with one thread each.
"""

import itertools
import os
import random
import shutil
import subprocess
import sys
import venv
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import nbformat
import pytest
import torch
from conftest import NAMES, ROOT, copy_data, lift, read, run, sections, seeded
from nbclient.exceptions import CellExecutionError
from test_notebooks import bad_outputs
from torch import nn

NOWHERE = "http://127.0.0.1:9/"  # refuses every connection
OFFLINE = {"http_proxy": NOWHERE, "https_proxy": NOWHERE, "no_proxy": ""}
QUICK = {"QUICK": "1", "OMP_NUM_THREADS": "1"} | OFFLINE
SETPRIV = shutil.which("setpriv")
STEPS = ["forward_gradient_step", "backprop_step"]
STEPS += ["rank_one_step", "one_layer_step"]
METHODS = getattr(lift("fwdgrad"), "METHODS", {})
slow, seeds = pytest.mark.slow, pytest.mark.seeds


def shown(command, **options):
    """Return a finished process with what it printed."""
    return subprocess.run(command, capture_output=True, text=True, **options)


def again(folder, name):
    """Run a notebook, then its sections once more in a shuffled order."""
    copy_data(folder)
    parts = [*sections(name).values()]
    parts += random.Random(0).sample(parts, len(parts))
    notebook, sources = read(name), itertools.chain(*parts)
    notebook.cells = [nbformat.v4.new_code_cell(s) for s in sources]
    return run(notebook, folder, env=os.environ | QUICK)


def empty(folder, name):
    """Run a notebook where there is no data; return how it ends."""
    with pytest.raises(CellExecutionError) as caught:
        run(read(name), folder, env=os.environ | QUICK)
    return caught.value


def command(folder, name, seed=0, threads=1, guard=None, python=sys.executable):
    """Run a notebook by the README's command; return the finished process.

    guard: is called with the folder, and returns what starts the command.
    """
    if not (folder / "data").exists():
        copy_data(folder)
    notebook = read(name)
    (cell,) = (c for c in notebook.cells if "\nSEED = 0" in c.source)
    lines = f"\ntorch.set_num_threads({threads})\nSEED = {seed}"
    cell.source = cell.source.replace("\nSEED = 0", lines)
    nbformat.write(notebook, folder / f"{name}.ipynb")
    start = guard(folder) if guard else []
    jupyter = [*start, python, "-m", "jupyter", "execute", f"{name}.ipynb"]
    return shown(jupyter, cwd=folder, env=os.environ | QUICK)


def read_only(folder):
    """Forbid to write in a folder; return what makes root obey, too."""
    for path in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        path.chmod(0o555)
    if not hasattr(os, "geteuid") or os.geteuid() or not SETPRIV:
        return []
    drop = "-dac_override,-dac_read_search"
    return [SETPRIV, f"--bounding-set={drop}", f"--inh-caps={drop}"]


def versions(folder, which):
    """Run both notebooks with the lowest or the newest releases allowed.

    Skips where the package index lacks one of them for this Python.
    """
    lines = (ROOT / "requirements.txt").read_text("utf-8").split()
    pip = ["-m", "pip", "install", "--only-binary=:all:"]
    newest = [sys.executable, *pip, "--upgrade", "--dry-run", *lines]
    if which == "lowest":
        lines = [line.replace(">=", "==") for line in lines]
    elif "Would install" not in shown(newest).stdout:
        return [command(folder, name) for name in NAMES]
    scripts = "Scripts" if os.name == "nt" else "bin"
    python = str(folder / "environment" / scripts / "python")
    venv.create(folder / "environment", with_pip=True)
    done = shown([python, *pip, "--quiet", *lines])
    if "No matching distribution" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    runs = [command(folder, name, python=python) for name in NAMES]
    shutil.rmtree(folder / "environment")
    return runs


def days(function, *details):
    """Give a test runs of a function, one for each tuple of arguments."""
    ids = ["-".join(map(str, detail)) for detail in details]
    chosen = [(function, *detail) for detail in details]
    return pytest.mark.parametrize("day", chosen, ids=ids)


@pytest.fixture(scope="module")
def result(request, tmp_path_factory):
    """Run all the days that were asked for, two at a time.

    Returns a function that waits for the result of a day.
    """
    items = [i for i in request.session.items if hasattr(i, "callspec")]
    asked = [item.callspec.params.get("day") for item in items]
    with ThreadPoolExecutor(2) as pool:
        futures = {
            day: pool.submit(day[0], tmp_path_factory.mktemp("day"), *day[1:])
            for day in filter(None, asked)
        }
        yield lambda day: futures[day].result()
        pool.shutdown(cancel_futures=True)


@slow
@days(again, *zip(NAMES, strict=True))
def test_any_section_can_be_run_again_after_the_whole(result, day):
    assert bad_outputs(result(day)) == []


@slow
@days(empty, ["fwdgrad"])
def test_no_data_and_no_network_is_one_sentence(result, day):
    error = result(day)
    _, text = error.traceback.rsplit("------------------\n", 1)
    assert text.strip() == f"DataError: {error.evalue}"
    assert "\n" not in error.evalue
    assert "connect to the internet" in error.evalue


@slow
@days(partial(command, guard=read_only), *zip(NAMES, strict=True))
def test_a_folder_where_nobody_can_write_is_enough(result, day):
    assert result(day).returncode == 0, result(day).stderr


@slow
@seeds
@days(
    command,
    *itertools.product(NAMES, range(1, 11)),
    ("prerequisites", 0, 16),
    ("fwdgrad", 0, 4),  # sixteen take far too long where there are two cores
)
def test_other_seeds_and_more_threads_raise_nothing(result, day):
    assert result(day).returncode == 0, result(day).stderr


@slow
@seeds
@days(versions, ["lowest"], ["newest"])
def test_the_releases_allowed_run_both(result, day):
    for done in result(day):
        assert done.returncode == 0, done.stderr


def check_devices(fwdgrad, move):
    """Check that move(model, digits) does the same on any default device.

    A tensor made without an explicit device would be on "meta" here, where
    it meets no other: as on a GPU, but on any machine.
    """
    images = torch.randn(32, 1, 28, 28, generator=seeded())
    labels = torch.randint(10, (32,), generator=seeded(1))
    digits = fwdgrad.Digits(images, labels, images, labels)
    ends = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        model = fwdgrad.SmallCNN()
        with torch.device(device):
            move(model, digits)
        ends.append(nn.utils.parameters_to_vector(model.parameters()))
    assert torch.allclose(*ends) and ends[0].isfinite().all()


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("name", STEPS)
def test_a_step_names_its_devices(fwdgrad, name):
    step = getattr(fwdgrad, name)
    check_devices(fwdgrad, lambda model, d: step(model, *d[:2], 1e-3))


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("name", METHODS)
def test_an_estimate_and_the_loop_name_their_devices(fwdgrad, name):
    def move(model, digits):
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        estimate = fwdgrad.METHODS[name].make(model)
        fwdgrad.train(model, estimate, optimizer, digits, 3)

    check_devices(fwdgrad, move)
