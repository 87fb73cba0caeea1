import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

UNBIASED = ["gaussian", "rademacher", "sphere", "coordinate", "rank_one"]
COUNT = 100_000


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def directions(fwdgrad, name, n, count=COUNT):
    V = fwdgrad.DIRECTIONS[name](count, n, random())
    assert V.shape == (count, n)
    return V.double()


def off(samples, expected, absolute=1e-6):
    """Return the worst |mean − expected| in standard errors."""
    error = samples.std(0) / math.sqrt(len(samples)) + absolute
    return ((samples.mean(0) - expected).abs() / error).max()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 20), st.integers(0, 1000))
def test_forward_gradient_is_slope_times_direction(fwdgrad, n, seed):
    theta, v, a = torch.randn(3, n, generator=random(seed)).double()
    value, g = fwdgrad.forward_gradient(
        lambda x: (a * x.sin()).sum(), theta, v
    )
    assert torch.allclose(value, (a * theta.sin()).sum())
    assert torch.allclose(g, (a * theta.cos()).dot(v) * v)


@pytest.mark.parametrize("name", UNBIASED)
@pytest.mark.parametrize("n", [2, 7, 12])
def test_direction_has_identity_second_moment(fwdgrad, name, n):
    V = directions(fwdgrad, name, n)
    assert off(V[:, :, None] * V[:, None, :], torch.eye(n)) < 5


@pytest.mark.parametrize("name", UNBIASED)
def test_forward_gradient_is_unbiased(fwdgrad, name):
    V = directions(fwdgrad, name, 12)
    theta = torch.linspace(-1, 2, 12).double()
    g = fwdgrad.forward_gradients(fwdgrad.wave, theta, V)
    assert off(g, theta.cos()) < 5


@pytest.mark.parametrize("name", UNBIASED)
@pytest.mark.parametrize("n", [1, 5, 30])
def test_second_moment_is_n_and_n_plus_two_for_gaussian(fwdgrad, name, n):
    V = directions(fwdgrad, name, n)
    slopes = torch.linspace(1, 2, n).double()
    squares = (V @ slopes) ** 2 * V.square().sum(1) / slopes.dot(slopes)
    expected = n + 2 if name == "gaussian" else n
    assert off(squares, expected) < 5


@pytest.mark.parametrize(
    "name", ["rademacher", "sphere", "rank_one", "coordinate"]
)
def test_every_direction_has_length_root_n(fwdgrad, name):
    V = directions(fwdgrad, name, 12, 100)
    assert torch.allclose(V.square().sum(1), torch.tensor(12.0).double())


def test_rank_one_directions_have_rank_one(fwdgrad):
    V = directions(fwdgrad, "rank_one", 12, 50).view(50, 3, 4)
    assert (torch.linalg.matrix_rank(V) == 1).all()


def test_biased_directions_have_the_stated_bias(fwdgrad):
    n, slopes = 6, torch.linspace(-1, 2, 6).double()
    means = {
        "uniform": slopes / 12 + slopes.sum() / 4,
        "normalised": slopes / n,
    }
    for name, mean in means.items():
        V = directions(fwdgrad, name, n)
        assert off((V @ slopes)[:, None] * V, mean) < 5
        assert off((V @ slopes)[:, None] * V, slopes) > 50


def test_gaussian_component_variance(fwdgrad):
    V = directions(fwdgrad, "gaussian", 5)
    slopes = torch.linspace(0, 1, 5).double()
    squares = ((V @ slopes)[:, None] * V - slopes) ** 2
    assert off(squares, slopes**2 + slopes.dot(slopes)) < 5


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.integers(0, 1000))
def test_projection_is_exact_for_n_directions(fwdgrad, n, seed):
    theta, *V = torch.randn(n + 1, n, generator=random(seed)).double()
    V = torch.linalg.qr(torch.stack(V))[0] * torch.arange(1, n + 1)
    exact = theta.cos()
    assert torch.allclose(fwdgrad.project(fwdgrad.wave, theta, V), exact)


def test_projection_keeps_slopes_and_stays_in_the_span(fwdgrad):
    theta, *V = torch.randn(4, 10, generator=random()).double()
    V = torch.stack(V)
    projected = fwdgrad.project(fwdgrad.wave, theta, V)
    assert torch.allclose(V @ projected, V @ theta.cos())
    assert torch.linalg.matrix_rank(torch.vstack([V, projected])) == 3


def test_second_slope_is_the_quadratic_form_of_the_hessian(fwdgrad):
    theta, v = torch.randn(2, 4, generator=random()).double()
    H = torch.func.hessian(fwdgrad.rosenbrock)(theta)
    ours = fwdgrad.second_slope(fwdgrad.rosenbrock, theta, v)
    assert torch.allclose(ours, v @ H @ v)


@pytest.mark.parametrize("eta", [0.05, 0.3])
def test_second_moments_of_a_step_on_a_quadratic(fwdgrad, eta):
    H = torch.tensor([1.0, 0.5, 0.2]).double()
    x = torch.tensor([1.0, -2.0, 3.0]).double()
    V = directions(fwdgrad, "gaussian", 3)
    after = x - eta * fwdgrad.forward_gradients(fwdgrad.quadratic(H), x, V)
    assert off(after**2, fwdgrad.second_moments(x**2, H, eta)) < 5


def test_safe_rate_is_where_the_expected_decrease_ends(fwdgrad):
    H = torch.tensor([2.0, 1.0, 0.5]).double()
    x = torch.tensor([1.0, 0.0, 0.0]).double()
    f = fwdgrad.quadratic(H)
    eta = fwdgrad.safe_rate(H)
    assert math.isclose(eta, 2 / 7.5)
    g = fwdgrad.forward_gradients(f, x, directions(fwdgrad, "gaussian", 3))
    assert off(torch.vmap(f)(x - eta * g), f(x)) < 5


FORMULAS = {
    "sum_of_squares": lambda x: sum(
        j * x[j - 1] ** 2 for j in range(1, len(x) + 1)
    ),
    "trid": lambda x: (
        sum((a - 1) ** 2 for a in x)
        - sum(x[j] * x[j - 1] for j in range(1, len(x)))
    ),
    "rosenbrock": lambda x: sum(
        100 * (x[j + 1] - x[j] ** 2) ** 2 + (1 - x[j]) ** 2
        for j in range(len(x) - 1)
    ),
    "beale": lambda x: sum(
        (c - x[0] + x[0] * x[1] ** k) ** 2
        for k, c in ((1, 1.5), (2, 2.25), (3, 2.625))
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("n", [2, 5])
def test_function_and_gradient_match_their_formula(fwdgrad, name, n):
    n = 2 if name == "beale" else n
    x = torch.randn(n, generator=random(n)).double()
    f, formula = getattr(fwdgrad, name), FORMULAS[name]
    assert math.isclose(f(x), formula(x.tolist()), rel_tol=1e-12)
    h, gradient = 1e-30, torch.func.grad(f)(x)
    for j in range(n):
        point = x.tolist()
        point[j] += 1j * h
        assert math.isclose(
            gradient[j], formula(point).imag / h, rel_tol=1e-9
        )


@pytest.mark.parametrize(
    ("name", "minimum", "lowest"),
    [
        ("sum_of_squares", [0.0] * 4, 0),
        ("trid", [2.0, 2.0], -2),
        ("trid", [4.0, 6.0, 6.0, 4.0], -16),
        ("rosenbrock", [1.0] * 4, 0),
        ("beale", [3.0, 0.5], 0),
    ],
)
def test_minimum(fwdgrad, name, minimum, lowest):
    f, x = getattr(fwdgrad, name), torch.tensor(minimum).double()
    assert f(x) == lowest
    assert torch.func.grad(f)(x).abs().max() < 1e-12
    near = x + 0.01 * torch.randn(100, len(x), generator=random()).double()
    assert (torch.vmap(f)(near) > lowest).all()


def test_descent_with_the_exact_gradient_matches_torch_sgd(fwdgrad):
    x = torch.tensor([-1.0, 0.0], dtype=torch.float64, requires_grad=True)
    start, sgd = x.detach().clone()[None], torch.optim.SGD([x], 1e-3)
    run = fwdgrad.descend(
        fwdgrad.exact_gradient,
        fwdgrad.rosenbrock,
        start,
        1e-3,
        20,
        random(),
        0.1,
    )
    for i in range(20):
        sgd.param_groups[0]["lr"] = 1e-3 * math.exp(-0.1 * i)
        sgd.zero_grad()
        value = fwdgrad.rosenbrock(x)
        assert torch.allclose(run.values[i, 0], value)
        assert torch.allclose(run.path[i, 0], x)
        value.backward()
        sgd.step()
    assert torch.allclose(run.theta[0], x)


def test_descent_walks_along_forward_gradients(fwdgrad):
    start = torch.ones(3, 4).double()
    rates = torch.tensor([0.01, 0.02, 0.04])
    f = fwdgrad.sum_of_squares
    run = fwdgrad.descend(
        fwdgrad.forward_gradient, f, start, rates, 1, random(5)
    )
    v = torch.empty_like(start).normal_(generator=random(5))
    gradient = 2 * torch.arange(1, 5) * start
    g = (gradient * v).sum(1, keepdim=True) * v
    assert torch.allclose(run.theta, start - rates[:, None] * g)


def test_divergence_names_iteration_and_rate(fwdgrad):
    start = torch.ones(2, 2).double()
    case = fwdgrad.sum_of_squares, start, torch.tensor([0.01, 9.0]), 2000
    for method in (fwdgrad.forward_gradient, fwdgrad.exact_gradient):
        with pytest.raises(
            FloatingPointError, match=r"iteration \d+ .*9\.0e\+00"
        ):
            fwdgrad.descend(method, *case, random())
        run = fwdgrad.descend(method, *case, random(), strict=False)
        assert run.values[-1, 0] < 1 and not run.values[-1, 1].isfinite()


@pytest.mark.parametrize(("count", "late"), [(200, False), (5, True)])
def test_prediction_and_race_agree_for_gradient_descent(fwdgrad, count, late):
    H = torch.linspace(0.1, 1, 10).double()
    start = torch.ones(10).double()
    rates = torch.tensor([1.0, 0.5, 2.5]).double()
    f, method = fwdgrad.quadratic(H), fwdgrad.exact_gradient
    case = method, f, start, rates, count, random(), 1
    hits = fwdgrad.race_to_goal(*case)
    predicted = fwdgrad.predict(method, H, start**2, rates)
    assert predicted > 5
    assert hits.tolist() == [math.inf if late else predicted]


EXERCISES = {
    "sign_variance": [
        lambda d: d**2 + d.dot(d),
        lambda d: d.dot(d),
        lambda d: d.dot(d) * torch.ones_like(d),
    ],
    "useless": [
        lambda count, n, generator: torch.randn(
            count, n, generator=generator
        ),
        lambda count, n, generator: (
            50 * torch.randn(count, n, generator=generator)
        ),
        lambda count, n, generator: torch.randn(n, generator=generator),
    ],
    "orthogonal": [
        lambda k, n, generator: torch.randn(k, n, generator=generator),
        lambda k, n, generator: n**0.5 * torch.eye(n)[:k],
        lambda k, n, generator: (
            torch.linalg.qr(torch.randn(n, k, generator=generator))[0].T
        ),
    ],
    "best_probabilities": [
        lambda d, norm: d / d.sum(),
        lambda d, norm: d * norm**2 / (d * norm**2).sum(),
        lambda d, norm: d.sqrt() * norm,
    ],
    "repaired": [
        lambda u: (u - 0.5, u.shape[1] + 0.8),
        lambda u: (12**0.5 * (u - 0.5), u.shape[1] + 2),
        lambda u: (12**0.5 * u, u.shape[1] + 0.8),
    ],
}


@pytest.mark.parametrize("name", EXERCISES)
def test_exercise_tells_open_right_and_wrong_apart(fwdgrad, name, capsys):
    check = getattr(fwdgrad, f"check_{name}")
    check(getattr(fwdgrad, name))
    assert capsys.readouterr().out == f"{name}: not attempted yet\n"
    check(getattr(fwdgrad, f"{name}_solution"))
    assert capsys.readouterr().out == f"{name}: correct\n"
    for wrong in EXERCISES[name]:
        with pytest.raises(AssertionError, match="expected"):
            check(wrong)
