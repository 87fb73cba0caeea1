"""Section 10: workers that exchange a seed and a slope."""

import ast
import functools
import linecache
import re
import socket
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_mean, code_cells, defines, read

RUN = {"seed": 3, "steps": 60, "rate": 1e-3}
SOURCE = torch.Generator().manual_seed(0)
IMAGES = 0.3 * torch.randn(1024, 1, 28, 28, generator=SOURCE)
LABELS = torch.randint(10, (1024,), generator=SOURCE)


@pytest.fixture(scope="module")
def cells():
    """Return the definitions, each known to linecache by its own cell."""
    module = types.ModuleType("cells")
    module.display = lambda *args, **kwargs: None
    for number, cell in enumerate(code_cells(read("fwdgrad"))):
        name, lines = f"<cell {number}>", cell.source.splitlines(True)
        linecache.cache[name] = len(cell.source), None, lines, name
        tree = ast.parse(cell.source)
        tree.body = [node for node in tree.body if defines(node)]
        exec(compile(tree, name, "exec"), vars(module))
    module.DEVICE = torch.device("cpu")
    return module


@pytest.fixture(scope="module")
def folder(cells, tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    cells.write_script(folder, IMAGES, LABELS)
    return folder


@pytest.fixture(scope="module")
def two(cells, folder):
    result = cells.launch(folder, 2, **RUN)
    assert not isinstance(result, str), (folder / "printed.txt").read_text()
    return result


def mean_step(cells, messages):
    """Return the mean forward gradient of messages, in a model."""
    blank = cells.worker_model(0)
    for parameter in blank.parameters():
        parameter.data.zero_()
    cells.apply_messages(blank, messages, -1)
    return blank


def direction(cells, seed):
    """Return a seed's direction in each parameter: that of the slope 1."""
    one = torch.ones(()).view(torch.int32).item()
    message = torch.tensor([[seed, one]], dtype=torch.int32)
    return [p.detach() for p in mean_step(cells, message).parameters()]


def one_process_run(cells, log, workers):
    """Train by backprop's slopes along the log's seeds; return the slopes."""
    images, labels = IMAGES.split(64), LABELS.split(64)
    model, slopes = cells.worker_model(RUN["seed"]), []
    for step, messages in enumerate(log):
        update = [torch.zeros_like(p) for p in model.parameters()]
        for rank, (seed, _) in enumerate(messages.tolist()):
            shard = (rank + workers * step) % len(images)
            loss = F.cross_entropy(model(images[shard]), labels[shard])
            gradient = torch.autograd.grad(loss, [*model.parameters()])
            v = direction(cells, seed)
            slope = sum((g * t).sum() for g, t in zip(gradient, v, strict=True))
            slopes.append(slope.item())
            for total, t in zip(update, v, strict=True):
                total += slope * t / workers
        with torch.no_grad():
            for p, total in zip(model.parameters(), update, strict=True):
                p -= RUN["rate"] * workers * total
    return np.array(slopes)


def test_two_processes_equal_one_to_rounding(cells, two):
    ours = two[1][..., 1].contiguous().view(torch.float32).numpy().ravel()
    exact = one_process_run(cells, two[1], 2)
    off = np.abs(ours - exact) / np.abs(exact).max()
    assert off[:20].max() < 1e-5
    assert off.max() < 0.02  # later, rounding may switch a ReLU


def test_replay_is_bit_identical(cells, two):
    late = cells.worker_model(RUN["seed"])
    for messages in two[1]:
        cells.apply_messages(late, messages, RUN["rate"] * 2)
    assert cells.hash_of(late) == two[0]


def test_a_message_is_eight_bytes_and_no_seed_comes_twice(two):
    assert two[1].nbytes == 8 * 2 * RUN["steps"]
    assert len(set(two[1][..., 0].ravel().tolist())) == 2 * RUN["steps"]
    assert two[3] < two[2] < np.log(10)  # exact steps learn more


@pytest.mark.parametrize("workers", [1, 4])
def test_a_step_is_unbiased_with_the_noise_of_the_text(cells, workers):
    model = cells.worker_model(3)
    batch = IMAGES[:16], LABELS[:16]
    model[-1].weight.data.normal_(generator=torch.Generator().manual_seed(1))
    cells.backprop(model, *batch)
    exact = torch.cat([p.grad.flatten() for p in model.parameters()])
    updates = []
    for first in range(0, 240, workers):
        seeds = range(first, first + workers)
        mail = torch.stack([cells.message_of(model, *batch, s) for s in seeds])
        updates.append(cells.weights_of(mean_step(cells, mail)))
    updates = torch.stack(updates)
    assert_mean(updates @ exact / exact.square().sum(), 1)
    noise = (updates - exact).square().sum(1) / exact.square().sum()
    assert_mean(noise, (len(exact) - 1) / workers)


FAULTS = {
    "a killed worker": "rank : 1 .*exitcode : -9",
    "a planted difference": "weights differ at step 60",
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_the_run_and_is_named(cells, folder, fault):
    assert re.match(FAULTS[fault], cells.launch(folder, 2, **RUN, fault=fault))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["no peer", "busy port", "no gloo"])
def test_a_machine_without_means_gets_one_sentence(cells, folder, case):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        end = f"--rdzv-endpoint=127.0.0.1:{busy.getsockname()[1]}"
        options = {
            "no peer": {"network": [*cells.LOCAL, "--nnodes=2"]},
            "busy port": {"network": [end, cells.LOCAL[1]]},
            "no gloo": {"backend": "mpi", "patience": 120},
        }[case]
        said = cells.launch(folder, 1, **{"patience": 20} | RUN | options)
    assert isinstance(said, str) and "\n" not in said and len(said) < 150
    assert re.search("MPI" if case == "no gloo" else "20 seconds|Error", said)


@pytest.mark.slow
def test_only_two_options_change_for_several_hosts(cells, two, tmp_path):
    cells.write_script(tmp_path, IMAGES, LABELS)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        end = f"--rdzv-endpoint=localhost:{free.getsockname()[1]}"
    host = functools.partial(cells.launch, tmp_path, 1, ["--nnodes=2", end])
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(host, **RUN) for _ in range(2)]
    assert [run.result()[0] for run in runs] == [two[0]] * 2
