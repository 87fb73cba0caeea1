"""Sections 1, 2 and 4 of fwdgrad: forward gradients and their noise."""

import itertools
import math
from functools import partial

import pytest
import torch
from conftest import seeded
from hypothesis import given, settings
from hypothesis import strategies as st


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def close_mean(samples, expected):
    """Say whether the mean lies within five standard errors everywhere."""
    error = samples.std(0) / math.sqrt(len(samples)) + 1e-9
    return ((samples.mean(0) - expected).abs() < 5 * error).all()


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 20), st.integers(0, 1000))
def test_forward_gradient_is_the_slope_times_the_direction(fwdgrad, n, seed):
    theta, v, a = normal(3, n, seed=seed)
    f = lambda x: (a * x.sin()).sum()  # noqa: E731
    value, g = fwdgrad.forward_gradient(f, theta, v)
    assert value == f(theta)
    assert torch.allclose(g, (a * theta.cos()).dot(v) * v)
    rows = fwdgrad.forward_gradients(f, theta, torch.stack([v, 2 * v]))
    assert torch.allclose(rows, torch.stack([g, 4 * g]))


def test_bowl_is_the_bowl_of_the_first_notebook(fwdgrad, prerequisites):
    x = normal(2)
    assert math.isclose(fwdgrad.bowl(x), prerequisites.bowl(x.numpy()))


@pytest.mark.parametrize("name", ["Gaussian", "signs", "rank one"])
def test_sampler_keeps_what_its_row_says(fwdgrad, name):
    sampler, excess, fourth = fwdgrad.SAMPLERS[name]
    V, a = sampler(50_000, 24, seeded()), torch.linspace(1, 2, 24)
    assert close_mean((V[:, :, None] * V[:, None])[:20_000], torch.eye(24))
    squares = (V @ a) ** 2 * V.square().sum(1) / a.dot(a)
    assert close_mean(squares, 24 + excess)
    assert close_mean(V.sum(1) ** 4 / 24**2, fourth)
    assert torch.equal(V, sampler(50_000, 24, seeded()))
    rank = torch.linalg.matrix_rank(V[:50].view(50, 4, 6))
    assert (rank == 1).all() == (name == "rank one")


def test_signs_are_signs_where_a_normal_number_is_zero(fwdgrad, monkeypatch):
    monkeypatch.setattr(fwdgrad, "gaussian", lambda *inputs: torch.zeros(4))
    assert (fwdgrad.rademacher(1, 4, None).abs() == 1).all()


def test_cases_start_and_end_where_they_say(fwdgrad):
    for f, start, least, lowest, *_ in fwdgrad.CASES:
        least = torch.tensor(least).double()
        assert f(least) == lowest
        assert torch.func.grad(f)(least).abs().max() < 1e-12
        near = least + 0.01 * normal(100, 2)
        assert (torch.vmap(f)(near) > lowest).all()
        assert f(torch.tensor(start)) > lowest + 1


FORMULAS = {
    "sum_of_squares": lambda x, y: x**2 + 2 * y**2,
    "trid": lambda x, y: (x - 1) ** 2 + (y - 1) ** 2 - x * y,
    "rosenbrock": lambda x, y: 100 * (y - x**2) ** 2 + (1 - x) ** 2,
    "beale": lambda x, y: sum(
        (c - x + x * y**k) ** 2 for k, c in enumerate((1.5, 2.25, 2.625), 1)
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_function_is_its_formula(fwdgrad, name):
    for x in normal(5, 2):
        ours, formula = getattr(fwdgrad, name)(x), FORMULAS[name](*x.tolist())
        assert math.isclose(ours, formula, rel_tol=1e-9)
    x = normal(3)
    parts = fwdgrad.rosenbrock(x[:2]) + fwdgrad.rosenbrock(x[1:])
    assert torch.allclose(fwdgrad.rosenbrock(x), parts)


@pytest.mark.parametrize("random", [False, True])
def test_a_walk_is_descent_along_gradients_or_forward_gradients(fwdgrad, random):
    f, x = fwdgrad.rosenbrock, torch.tensor([-1.0, 0.0]).double()
    rates, draw, again = torch.tensor([1e-3, 2e-3]).double(), seeded(), seeded()
    sample = partial(fwdgrad.gaussian, generator=draw) if random else None
    value, path = fwdgrad.walk(f, x, rates, 20, sample, 0.1)
    theta = x.expand(2, 2)
    for i in range(20):
        g = torch.vmap(torch.func.grad(f))(theta)
        if random:
            v = fwdgrad.gaussian(2, 2, again).double()
            g = (g * v).sum(1, keepdim=True) * v
        assert torch.allclose(value[i], torch.vmap(f)(theta))
        assert torch.allclose(path[i], theta)
        theta = theta - rates[:, None] * math.exp(-0.1 * i) * g


@pytest.mark.parametrize("n", [1, 3, 6])
def test_step_has_the_second_moments_of_the_recursion(fwdgrad, n):
    x, eigenvalues = normal(n, seed=n), torch.linspace(0.2, 2, n).double()
    f = fwdgrad.quadratic(eigenvalues)
    assert torch.allclose(torch.func.hessian(f)(x), eigenvalues.diag())
    step = 0.3 * eigenvalues
    signs = torch.tensor([*itertools.product((-1.0, 1.0), repeat=n)])
    g = fwdgrad.forward_gradients(f, x, signs.double())  # all of them
    exact = (x - 0.3 * g).square().mean(0)
    assert torch.allclose(fwdgrad.second_moments(x**2, step, 0), exact)
    g = fwdgrad.forward_gradients(f, x, normal(50_000, n))
    expected = fwdgrad.second_moments(x**2, step)
    assert close_mean((x - 0.3 * g).square(), expected)


@pytest.mark.parametrize("excess", [0, 2])
@pytest.mark.parametrize("spectrum", [[1.0] * 5, [1, 0.5, 0.2], [3, 0.1, 0.0]])
def test_largest_rate_has_spectral_radius_one(fwdgrad, spectrum, excess):
    eigenvalues = torch.tensor(spectrum).double()
    eta = fwdgrad.largest_rate(eigenvalues, excess)
    curved = eigenvalues[eigenvalues > 0]  # a flat direction keeps its m
    for factor, shrinks in (0.995, True), (1.005, False):
        step = factor * eta * curved
        matrix = fwdgrad.second_moments(torch.eye(len(step)), step, excess)
        radius = torch.linalg.eigvals(matrix.double()).abs().max()
        assert (radius < 1) == shrinks


def test_cosine_is_the_mean_over_the_sphere(fwdgrad):
    assert math.isclose(fwdgrad.mean_cosine(3), 1 / 2)  # Archimedes
    assert math.isclose(fwdgrad.mean_cosine(10**6), 0.000797885, rel_tol=1e-5)


def test_curvature_is_the_hessians(fwdgrad):
    H = normal(6, 6) @ normal(6, 6).T

    def f(theta):
        x = torch.cat([theta["a"], theta["b"].flatten()])
        return x @ H @ x / 2 + x.sum()

    theta = {"a": normal(2), "b": normal(2, 2, seed=1)}
    traces, largest = fwdgrad.curvature(f, theta, seeded(), 200)
    assert traces.shape == (200,) and close_mean(traces, H.trace())
    assert math.isclose(largest, torch.linalg.eigvalsh(H)[-1], rel_tol=1e-3)
