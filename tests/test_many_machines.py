"""Section 8: workers that exchange a seed and a scalar."""

import ast
import json
import os
import socket
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import read
from hypothesis import given, settings
from hypothesis import strategies as st


def sources(name):
    """Return the text of every function of a notebook, by its name."""
    found = {}
    for cell in read(name).cells:
        if cell.cell_type == "code":
            for node in ast.parse(cell.source).body:
                if isinstance(node, ast.FunctionDef):
                    text = ast.get_source_segment(cell.source, node)
                    found[node.name] = text
    return found


@pytest.fixture(scope="module")
def digits():
    source = torch.Generator().manual_seed(0)
    images = 0.3 * torch.randn(1024, 1, 28, 28, generator=source)
    return images, torch.randint(10, (1024,), generator=source)


@pytest.fixture(scope="module")
def folder(fwdgrad, digits, tmp_path_factory):
    """Write the script as the notebook does; `lift` keeps no sources."""
    text = sources("fwdgrad")
    folder = tmp_path_factory.mktemp("workers")
    with pytest.MonkeyPatch.context() as patch:
        by_name = types.SimpleNamespace(getsource=lambda f: text[f.__name__])
        patch.setattr(fwdgrad, "inspect", by_name)
        fwdgrad.write_script(folder, *digits)
    return folder


@pytest.fixture(scope="module")
def two(fwdgrad, folder):
    """Return the results and the log of a run of two processes."""
    code, results, errors = fwdgrad.launch(
        folder, 2, seed=3, rate=2e-4, steps=40
    )
    assert code == 0, errors
    return results, (folder / "log0.bin").read_bytes()


def one_process_run(fwdgrad, digits, seed, steps, workers):
    """Train with the mean of dense forward gradients, without workers."""
    images, labels = digits
    model = fwdgrad.make_worker_model(seed)
    losses, slopes = [], []
    for step in range(steps):
        update = [torch.zeros_like(p) for p in model.parameters()]
        for rank in range(workers):
            start = 64 * ((step * workers + rank) % 16)
            part = slice(start, start + 64)
            loss = F.cross_entropy(model(images[part]), labels[part])
            gradient = torch.autograd.grad(loss, list(model.parameters()))
            source = fwdgrad.direction_seed(seed, step, rank)
            v = []
            for u, w in fwdgrad.worker_direction(model, source):
                v += [torch.outer(u, w), u]
            slope = sum(
                (g * t).sum() for g, t in zip(gradient, v, strict=True)
            )
            losses.append(loss.item())
            slopes.append(slope.item())
            for total, t in zip(update, v, strict=True):
                total += slope * t / workers
        with torch.no_grad():
            for p, total in zip(model.parameters(), update, strict=True):
                p -= 1e-4 * workers * total
    return model, np.array(losses), np.array(slopes)


def test_two_processes_equal_one_to_rounding(fwdgrad, digits, two):
    records = np.frombuffer(two[1], fwdgrad.RECORD)
    _, losses, slopes = one_process_run(fwdgrad, digits, 3, 40, 2)
    assert len(records) == 80
    np.testing.assert_allclose(records["loss"], losses, rtol=1e-3)
    largest = np.abs(slopes).max()
    off = np.abs(records["slope"] - slopes) / largest
    assert off[:10].max() < 1e-5
    # Later, rounding may switch a ReLU, and the slope jumps a little.
    assert off.max() < 0.02


def test_workers_keep_identical_logs(folder, two):
    assert (folder / "log1.bin").read_bytes() == two[1]


def test_replay_is_bit_identical(fwdgrad, tmp_path, two):
    (tmp_path / "log.bin").write_bytes(two[1])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    late = fwdgrad.make_worker_model(3)
    steps = sum(1 for _ in fwdgrad.replay(late, tmp_path / "log.bin", 2))
    torch.set_num_threads(threads)
    assert steps == 40
    assert fwdgrad.fingerprint(late) == two[0]["fingerprint"]


def test_a_record_has_16_bytes_and_a_log_nothing_else(fwdgrad, two):
    assert len(two[1]) == 16 * 2 * 40


def test_seeds_in_the_log_belong_to_step_and_rank(fwdgrad, two):
    seeds = np.frombuffer(two[1], fwdgrad.RECORD)["seed"].tolist()
    pairs = [(step, rank) for step in range(40) for rank in range(2)]
    assert seeds == [fwdgrad.direction_seed(3, *pair) for pair in pairs]
    assert len(set(seeds)) == 80


def test_bytes_counted_equal_the_formula(fwdgrad, two):
    one, many = two[0]["gather"]
    if not many:
        pytest.skip("the system does not count the bytes of a connection")
    size = sum(p.numel() for p in fwdgrad.make_worker_model(0).parameters())
    assert round((many - one) / 10_000, 1) == 8
    assert 1 <= two[0]["backprop"]["bytes"] / (4 * size) < 1.001
    assert 8 <= two[0]["scalar"]["bytes"] < 1000


def test_backprop_learns_more_in_equally_many_steps(two):
    assert two[0]["backprop"]["loss"] < two[0]["scalar"]["loss"]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_variance_of_n_workers_is_an_nth_of_one(fwdgrad, digits, workers):
    model = fwdgrad.make_worker_model(3)
    images, labels = (part[:16] for part in digits)
    loss = F.cross_entropy(model(images), labels)
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    gradient = torch.cat([g.flatten() for g in gradient])
    unit = (len(gradient) - 1) * gradient.square().sum()
    samples = []
    for step in range(200 // workers):
        seeds = [fwdgrad.direction_seed(3, step, r) for r in range(workers)]
        records = []
        for seed in seeds:
            direction = fwdgrad.worker_direction(model, seed)
            pair = fwdgrad.shard_slope(model, images, labels, direction)
            records.append((seed, *pair))
        records = np.array(records, fwdgrad.RECORD)
        update = fwdgrad.mean_update(model, records)
        samples.append((update - gradient).square().sum() / unit)
    samples = torch.stack(samples)
    error = samples.std() / len(samples) ** 0.5
    assert abs(samples.mean() - 1 / workers) < 5 * error < 0.6 / workers


def test_a_killed_rank_ends_the_run_and_is_named(fwdgrad, folder):
    code, results, errors = fwdgrad.launch(folder, 2, seed=3, die=1)
    assert code != 0
    assert set(results) == {"died"}
    verdict = errors[errors.index("Root Cause") :]
    assert "rank      : 1" in verdict
    assert "SIGKILL" in verdict


def test_a_planted_difference_stops_all_workers(fwdgrad, folder):
    code, results, errors = fwdgrad.launch(folder, 2, seed=3, sabotage=1)
    assert code != 0 and not results
    assert "stopped at step 20: parameters differ: rank 0 has" in errors


def launch_two_hosts(folder, port, timeout):
    """Run two launchers side by side, as on two hosts; return the output."""
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += ["--rdzv-backend=c10d", "--nnodes=2"]
    command += [f"--rdzv-endpoint=localhost:{port}", "--nproc-per-node=1"]
    command += [str(folder / "workers.py"), "--seed=3", "--rate=2e-4"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    hosts = [
        subprocess.Popen(command, env=environment, text=True, **pipes)
        for _ in range(2)
    ]
    try:
        rows = [host.communicate(timeout=timeout)[0] for host in hosts]
    finally:
        for host in hosts:
            host.terminate()
            host.wait()
    assert [host.returncode for host in hosts] == [0, 0]
    return "".join(rows)


def test_only_two_options_change_for_several_hosts(
    fwdgrad, folder, two, tmp_path
):
    for name in "workers.py", "digits.pt":
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    for patience in 120, 240:  # somebody may take the port that was free
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        try:
            rows = launch_two_hosts(tmp_path, port, patience).splitlines()
            break
        except subprocess.TimeoutExpired:
            rows = []
    results = json.loads(next(row for row in rows if row.startswith("{")))
    assert results["fingerprint"] == two[0]["fingerprint"]


@settings(deadline=None, max_examples=5)
@given(st.integers(0, 2**31), st.integers(0, 10**6), st.integers(1, 64))
def test_step_is_the_mean_of_dense_updates(fwdgrad, seed, step, count):
    records = np.zeros(count, fwdgrad.RECORD)
    ranks = range(count)
    seeds = [fwdgrad.direction_seed(seed, step, r) for r in ranks]
    records["seed"], records["slope"] = seeds, np.linspace(-1, 2, count)
    model = fwdgrad.make_worker_model(0)
    weight, bias = (p.detach().clone() for p in model[5].parameters())
    fwdgrad.apply_records(model, records, 0.5)
    for source, _, slope in records.tolist():
        u, w = fwdgrad.worker_direction(model, source)[-1]
        weight -= 0.5 * slope * torch.outer(u, w) / count
        bias -= 0.5 * slope * u / count
    assert torch.allclose(model[5].weight, weight, atol=1e-5)
    assert torch.allclose(model[5].bias, bias, atol=1e-5)


def test_directions_have_identity_second_moment(fwdgrad):
    model = fwdgrad.make_worker_model(0)
    rows = []
    for step in range(4000):
        seed = fwdgrad.direction_seed(0, step, 0)
        u, w = fwdgrad.worker_direction(model, seed)[-1]
        weights = torch.outer(u[:4], w[-4:]).flatten()
        rows.append(torch.cat([weights, u[:4]]))
    v = torch.stack(rows)
    moment = v.T @ v / len(v)
    assert torch.allclose(moment, torch.eye(20), atol=5 / len(v) ** 0.5)


def test_slope_includes_every_layer_and_its_bias(fwdgrad, digits):
    """Central differences in float64 along a direction in one layer."""
    model = fwdgrad.make_worker_model(1).double()
    images, labels = digits[0][:8].double(), digits[1][:8]
    seed = fwdgrad.direction_seed(1, 0, 0)
    whole = fwdgrad.worker_direction(model, seed)
    for layer, (u, w) in zip(model[1::2], whole, strict=True):
        v = [(u.double(), w.double()) for u, w in whole]
        v = [
            pair if other is layer else (0 * pair[0], pair[1])
            for other, pair in zip(model[1::2], v, strict=True)
        ]
        _, slope = fwdgrad.shard_slope(model, images, labels, v)
        losses = []
        for h in 1e-6, -2e-6:
            layer.weight.data += h * torch.outer(u, w)
            layer.bias.data += h * u
            losses.append(F.cross_entropy(model(images), labels).item())
        layer.weight.data += 1e-6 * torch.outer(u, w)
        layer.bias.data += 1e-6 * u
        expected = (losses[0] - losses[1]) / 2e-6
        assert slope.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
