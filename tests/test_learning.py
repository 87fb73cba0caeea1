"""Section 6: fair starts, layer probabilities, divergence, clipping."""

import math

import numpy as np
import pytest
import torch
from test_steps import (
    a_batch,
    assert_mean,
    flat,
    gradient,
    small_digits,
    small_network,
    weighted,
)
from torch import nn


def tiny(fwdgrad):
    return lambda: fwdgrad.Network(nn.Flatten(), nn.Linear(784, 10))


def test_runs_start_alike_and_see_the_same_batches(fwdgrad):
    data, seen = small_digits(fwdgrad), []
    for draws in 0, 3:  # a method may draw random numbers of its own

        def step(model, images, labels, learning_rate, draws=draws):
            torch.rand(draws)
            seen.append((flat(model), images, learning_rate))
            return torch.tensor(1.0)

        fwdgrad.run(tiny(fwdgrad), step, 0.1, 80, 5, data, 0)
    half = len(seen) // 2
    assert half > 1
    for ours, theirs in zip(seen[:half], seen[half:], strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
        assert ours[2] == theirs[2]


def test_a_diverging_run_counts_as_infinite_in_the_search(
    fwdgrad, monkeypatch
):
    monkeypatch.setattr(
        fwdgrad, "held_out", small_digits(fwdgrad), raising=False
    )
    losses = [
        fwdgrad.held_out_loss(tiny(fwdgrad), fwdgrad.backprop_step, rate, 80)
        for rate in (1e-3, 1e38)
    ]
    assert math.isfinite(losses[0]) and losses[1] == math.inf


@pytest.mark.parametrize("power", [0, 0.5, 1])
def test_fixed_shares_are_powers_of_the_layer_sizes(
    fwdgrad, monkeypatch, power
):
    seen = []
    monkeypatch.setattr(
        fwdgrad,
        "one_of",
        lambda model, layers, shares, *rest: (
            seen.append(dict(zip(layers, shares, strict=True)))
            or [(layers[0], fwdgrad.draw(model[layers[0]]))]
        ),
    )
    model, images, labels = small_network()
    fwdgrad.fixed_shares(power)(model, images, labels, 0)
    sizes = {i: model[i].weight.numel() for i in weighted(model)}
    assert seen == [{i: size**power for i, size in sizes.items()}]


def test_the_adaptive_step_is_unbiased_and_moves_one_layer(fwdgrad):
    model, images, labels = small_network()
    start, exact = flat(model), gradient(model, images, labels)
    torch.manual_seed(9)
    step, samples = fwdgrad.adaptive_step(), []
    for _ in range(3000):
        step(model, images, labels, 1.0)
        samples.append(start - flat(model))
        nn.utils.vector_to_parameters(start.clone(), model.parameters())
    samples = torch.stack(samples)
    assert_mean(samples, exact)
    sizes = [
        sum(p.numel() for p in model[i].parameters()) for i in weighted(model)
    ]
    moved = [part.abs().amax(1) > 1e-9 for part in samples.split(sizes, 1)]
    assert (torch.stack(moved).sum(0) <= 1).all()
    assert all(which.float().mean() > 0.02 for which in moved)


def test_the_adaptive_step_prefers_the_layer_with_the_larger_slopes(fwdgrad):
    torch.manual_seed(10)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model.double()
    nn.init.normal_(model[2].weight, std=1e-4)  # little below it
    images, labels = a_batch(16, (6,), 6)
    step, start, counts = fwdgrad.adaptive_step(), flat(model), [0, 0]
    for _ in range(300):
        step(model, images, labels, 1.0)
        change = (flat(model) != start).split([42, 42])
        counts = [
            c + x.any().item() for c, x in zip(counts, change, strict=True)
        ]
        nn.utils.vector_to_parameters(start.clone(), model.parameters())
    assert counts[1] > 3 * counts[0] > 0


def test_moments_are_relative_to_the_smallest(fwdgrad, monkeypatch):
    d, norms = torch.tensor([4.0, 1.0, 9.0]), torch.tensor([1.0, 4.0, 9.0])
    monkeypatch.setattr(
        fwdgrad, "layer_norms", lambda *batch: (None, d, norms)
    )
    data = small_digits(fwdgrad)
    monkeypatch.setattr(fwdgrad, "digits", data, raising=False)
    row = fwdgrad.moments(None)
    smallest = (2 + 2 + 9) ** 2
    assert row["uniform"] == pytest.approx(3 * (4 + 4 + 81) / smallest)
    assert row["d"] == pytest.approx(14 * (1 + 4 + 9) / smallest)
    assert 1 <= row["adaptive"] < row["uniform"]


@pytest.mark.parametrize("limit", [0.5, 1.0, 2.0])
def test_clipping_shortens_the_mean_and_keeps_its_direction(fwdgrad, limit):
    slopes = torch.linspace(0.1, 1, 6).double()
    noise = torch.Generator().manual_seed(11)
    v = fwdgrad.gaussian(200_000, 6, noise).double()
    c = limit * slopes.norm()
    clipped = (v @ slopes).clamp(-c, c)[:, None] * v
    assert_mean(clipped, math.erf(limit / math.sqrt(2)) * slopes)
    assert clipped.mean(0) @ slopes < slopes @ slopes


def test_watched_slopes_are_clipped_only_in_the_update(fwdgrad, monkeypatch):
    monkeypatch.setattr(fwdgrad, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(
        fwdgrad, "digits", small_digits(fwdgrad), raising=False
    )
    _, free = fwdgrad.watch_slopes(0.0, math.inf, 5)
    _, still = fwdgrad.watch_slopes(10.0, 0.0, 5)
    np.testing.assert_allclose(free, still, rtol=1e-6)
    losses, _ = fwdgrad.watch_slopes(1e9, math.inf, 50)
    assert len(losses) < 50 and np.isfinite(losses).all()
