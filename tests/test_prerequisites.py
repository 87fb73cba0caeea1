"""The engine, the scalar class and the exercises of prerequisites.ipynb."""

import itertools
import math
import operator
import warnings

import numpy as np
import pytest
import torch
from conftest import lift
from hypothesis import assume, given, settings
from hypothesis import strategies as st

settings.register_profile("notebook", deadline=None, derandomize=True)
settings.load_profile("notebook")
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
P = lift("prerequisites")
D = P.derivative
seeds = st.integers(0, 10**6)
both = pytest.mark.parametrize("derive", [D, P.grad])

# Rules that are no ufunc, and functions composed of rules, as a program for
# the library m (numpy or torch), and its operands' shapes
PROGRAMS = {
    "cbrt": (lambda m, x: cube_root(m, x), [(3,)]),
    "sum": (lambda m, x: x.sum(1), [(2, 3)]),
    "where": (lambda m, a, b: m.where(a * b > 0, a, b), [(3,), (2, 1)]),
    "matmul": (lambda m, a, b: a @ b, [(4, 1, 2, 3), (5, 3, 2)]),
    "reshape": (lambda m, x: x.reshape((3, -1)), [(2, 3)]),
    "moveaxis": (lambda m, x: m.moveaxis(x, 0, -1), [(2, 3, 1)]),
    "broadcast_to": (lambda m, x: m.broadcast_to(x, (2, 4, 3)), [(4, 1)]),
    "getitem": (lambda m, x: x[[0, 0, 1], 1:] * x[-1, ::2], [(2, 3)]),
    "put": (lambda m, x, y: m.stack([x[0], y * y], -1), [(2, 3), (3,)]),
    "cast": (lambda m, x: x * single(m, x), [(2, 3)]),
}
COMPOSED = {
    "mean": (lambda m, x: m.mean(x, -1) * x.mean(), [(4, 3)]),
    "sum of two axes": (lambda m, x: m.sum(x * x, (0, 1)), [(4, 3)]),
    "sum kept": (lambda m, x: x / m.sum(x * x, -1, keepdims=True), [(2, 3)]),
    "where with a number": (lambda m, x: m.where(x > 0, x, 7.0), [(4, 3)]),
    "transpose": (lambda m, x: x.T @ x, [(4, 3)]),
    "vectors": (lambda m, x: x[0] @ x[1] * x @ x[2], [(4, 3)]),
    "a vector first": (lambda m, x: x[:, 0] @ x, [(4, 3)]),
    "iteration": (lambda m, x: sum(a * b for a, b in zip(x, x)), [(4, 3)]),  # noqa: B905
    "comparison": (lambda m, x: x * (x > 0), [(4, 3)]),
}


def cube_root(m, x):
    return np.cbrt(x) if m is np else x.sign() * x.abs() ** (1 / 3)


def single(m, x):
    return x.float() if m is torch else P.apply(P.cast, x, np.float32)


def calls(name, rng):
    """Return NumPy's call, PyTorch's, and operands for both."""
    if name in PROGRAMS | COMPOSED:
        f, shapes = (PROGRAMS | COMPOSED)[name]
        ours, theirs = (lambda *a, m=m: f(m, *a) for m in (np, torch))
    else:
        ours = getattr(np, name)
        theirs = getattr(torch, name.replace("power", "pow"))
        kinds = [(), (3,), (1,), (2, 1), (1, 3), (2, 3)]
        shapes = [kinds[rng.integers(6)] for _ in range(ours.nin)]
    xs = [np.asarray(rng.uniform(-1.3, 1.3, s)) for s in shapes]
    if not np.isfinite(ours(*xs)).all():
        xs = [abs(x) + 0.3 for x in xs]
    return ours, theirs, tuple(xs)


def torch_jvp(f, primals, tangents):
    """Return PyTorch's value and tangent as arrays."""
    pairs = [tuple(map(torch.as_tensor, a)) for a in (primals, tangents)]
    return [y.numpy() for y in torch.func.jvp(f, *pairs)]


def assert_same(ours, theirs, tolerance=1e-9):
    """Assert equal shapes and dtypes, and values within a tolerance."""
    for a, b in zip(map(np.asarray, ours), theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, (a, b)
        size = max([1.0, *abs(b).ravel()])
        np.testing.assert_allclose(a, b, 0, tolerance * size)


def inner(us, vs):
    return sum(np.sum(u * v) for u, v in zip(us, vs, strict=True))


def forward(f, v):
    """Return f's derivative along v by jvp; f and v: of several arrays."""
    return lambda *xs: P.jvp(f, xs, v)[1]


def reverse(f, v):
    """Return the same by vjp, for a scalar f."""
    return lambda *xs: inner(P.vjp(f, xs)[1], v)


def in_torch(f, v):
    v = tuple(map(torch.as_tensor, v))
    return lambda *xs: torch.func.jvp(f, xs, v)[1]


# One property of every rule


@pytest.mark.parametrize("name", [*(f.__name__ for f in P.RULES), *COMPOSED])
@settings(max_examples=6)
@given(seed=seeds)
def test_rule_is_right_in_both_modes_and_nested_to_third_order(name, seed):
    rng = np.random.default_rng(seed)
    ours, theirs, xs = calls(name, rng)
    v, w = (tuple(np.asarray(rng.normal(size=x.shape)) for x in xs) for _ in range(2))
    # jvp: PyTorch and differences
    value, tangent = P.jvp(ours, xs, v)
    assert_same([value, tangent], torch_jvp(theirs, xs, v))
    ahead, behind = (
        ours(*(x + h * t for x, t in zip(xs, v, strict=True))) for h in (1e-6, -1e-6)
    )
    differences = (ahead - behind) / 2e-6
    close = 1e-6 if name == "cast" else 1e-9  # cast rounds
    if close == 1e-9:
        np.testing.assert_allclose(tangent, differences, 1e-6, 1e-6)
    # vjp: the transpose
    u = rng.normal(size=value.shape)
    same, cotangents = P.vjp(ours, xs, u)
    assert_same([same], [value])
    assert [c.shape for c in cotangents] == [x.shape for x in xs]
    assert abs(inner(cotangents, v) - np.sum(u * tangent)) < close
    # nested: every word of forward and reverse gives PyTorch's number
    exact = lambda *a: (torch.as_tensor(u) * theirs(*a)).sum()  # noqa: E731
    for order in 1, 2, 3:
        directions = [v, w, v][:order]
        exact = in_torch(exact, directions[-1])
        number = exact(*map(torch.as_tensor, xs)).item()
        for word in itertools.product((forward, reverse), repeat=order):
            nested = lambda *a: np.sum(u * ours(*a))  # noqa: E731
            for mode, along in zip(word, directions, strict=True):
                nested = mode(nested, along)
            size = max(1.0, abs(number))
            assert abs(nested(*xs) - number) < 10 * close * size, word


def test_every_linear_rule_has_a_transpose_and_the_others_their_slopes():
    linear = {f for f in P.RULES if P.RULES[f] == P.LINEAR}
    assert linear == {*P.TRANSPOSES}
    assert all(len(P.RULES[f]) == f.nin for f in {*P.RULES} - linear)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_derivatives_have_the_dtype_of_what_they_belong_to(dtype):
    for name in [*(f.__name__ for f in P.RULES), *COMPOSED]:
        ours, _, xs = calls(name, np.random.default_rng(0))
        xs = tuple(x.astype(dtype) for x in xs)
        value, tangent = P.jvp(ours, xs, tuple(np.ones(x.shape) for x in xs))
        assert value.dtype == tangent.dtype == ours(*xs).dtype, name
        _, cotangents = P.vjp(ours, xs, np.ones(value.shape))
        assert all(c.dtype == dtype for c in cotangents), name
        square = P.grad(lambda *xs, f=ours: np.sum(f(*xs) ** 2))
        assert P.jacfwd(square)(*xs).dtype == dtype, name


OPERANDS = [2, 2.5, True, np.float64(2), np.float32(2), [1.0, 2.0, 3.0]]
OPERANDS += [(1, 2, 3), np.arange(3), np.uint8([0, 200, 4]), np.ones((2, 1))]
OPERANDS += [np.int8([100, 3, 4]), np.ones(3, np.float32), np.array(2.0)]
BINARY = [operator.add, operator.sub, operator.mul, operator.truediv]
BINARY += [operator.pow, np.arctan2, np.hypot, np.maximum, np.logaddexp]


@pytest.mark.parametrize("operand", OPERANDS, ids=repr)
def test_mixed_operands_work_on_either_side(operand):
    constant = np.asarray(operand, float)
    cases = itertools.product(BINARY, ("float32", "float64"), (0, 1))
    for f, dtype, swap in cases:
        x = np.array([0.5, 1.5, 0.7], dtype)
        g = (lambda a, b, f=f: f(b, a)) if swap else f
        value, tangent = P.jvp(lambda z, g=g: g(z, operand), (x,), (np.ones(3),))
        plain = np.asarray(g(x, operand))
        assert value.dtype == tangent.dtype == plain.dtype
        np.testing.assert_allclose(value, plain, 1e-6)
        exact = D(lambda z, g=g: g(z, constant))(x.astype(float))
        np.testing.assert_allclose(tangent, exact, 1e-4, 1e-5)


# Random programs

ONE = ["negative", "square", "tanh", "sin", "exp", "log", "absolute", "sum"]
TWO = ["add", "subtract", "multiply", "divide", "power", "maximum", "hypot"]
TWO += ["logaddexp", "minimum"]
GUARDS = dict.fromkeys(["log", "divide", "power", "hypot"], "positive")
GUARDS |= {"exp": "tanh", "square": "tanh"}  # keep operands tame
trees = st.recursive(
    st.sampled_from("xy") | st.floats(-2, 2, width=16),
    lambda part: (
        st.tuples(st.sampled_from([*ONE, "relu"]), part)
        | st.tuples(st.sampled_from(TWO), part, part)
    ),
    max_leaves=12,
)


def evaluate(tree, m, leaves):
    """Return the value of a tree, computed by m, numpy or torch."""
    if not isinstance(tree, tuple):
        number = m.ones((2, 1), dtype=m.float64)
        return leaves[tree] if tree in leaves else number * tree
    name, *parts = tree
    parts = [evaluate(part, m, leaves) for part in parts]
    if GUARDS.get(name) == "positive":
        parts = [0.5 + m.sin(part) ** 2 for part in parts]
    elif name in GUARDS:
        parts = [m.tanh(part) for part in parts]
    if name == "relu":
        return P.relu(*parts) if m is np else torch.relu(*parts)
    return getattr(m, "pow" if name == "power" else name)(*parts)


@settings(max_examples=150)
@given(tree=trees, seed=seeds)
def test_random_program_matches_torch_in_both_modes_and_nested(tree, seed):
    rng = np.random.default_rng(seed)
    (x, u), (y, v) = rng.normal(size=(2, 3)), rng.normal(size=(2, 2, 1))
    ours, theirs = (
        lambda x, y, m=m: m.sum(evaluate(tree, m, {"x": x, "y": y}))
        for m in (np, torch)
    )
    expected = torch_jvp(theirs, (x, y), (u, v))
    assume(np.abs(expected).max() < 1e8)
    assert_same(P.jvp(ours, (x, y), (u, v)), expected)
    value, gradients = P.vjp(ours, (x, y))
    assert_same([value], expected[:1])
    tensors = tuple(map(torch.as_tensor, (x, y)))
    exact = [g.numpy() for g in torch.func.grad(theirs, (0, 1))(*tensors)]
    assert_same(gradients, exact)
    ours_xy, theirs_xy = (
        lambda x, y, m=m: evaluate(tree, m, {"x": x, "y": y}) * (x + y)
        for m in (np, torch)
    )
    exact = torch.func.jacfwd(theirs_xy)(*tensors)
    assert_same([P.jacfwd(ours_xy)(x, y)], [exact.numpy()])
    words = itertools.product((forward, reverse), repeat=2)
    second = [b(a(ours, (u, v)), (u, v))(x, y) for a, b in words]
    np.testing.assert_allclose(second, second[0], 1e-7, 1e-7)


# What a traced array does as an array

LOSSES = {
    "float": lambda x: float(x[0]),
    "int": lambda x: int(x[0]),
    "format": lambda x: f"{x[0]:.3f}",
    "asarray": np.asarray,
    "array of a list": lambda x: np.array([x, x]),
    "tensor": torch.as_tensor,
    "out": lambda x: np.add(np.ones(3), x, out=np.ones(3)),
    "in place": lambda x: operator.iadd(np.ones(3), x),
    "in place on itself": lambda x: operator.iadd(x, 1),
    "assignment": lambda x: operator.setitem(x, 0, 1.0),
    "to an entry": lambda x: operator.setitem(np.zeros(2), 0, x[0]),
    "reduce": np.add.reduce,
    "arcsin": np.arcsin,
    "max": lambda x: x.max(),
    "norm": np.linalg.norm,
    "block": lambda x: np.block([x, x]),
    "sum of some": lambda x: np.sum(x, where=[True, False, True]),
    "complex factor": lambda x: x * 1j,
    "objects": lambda x: x + np.array([None] * 3),
    "list of a number": lambda x: list(x[0]),
    "to integers": lambda x: x.astype(int) * 1.0,
}
ADVICE = {
    "max": r"max.*RULES",
    "arcsin": r"arcsin.*RULES",
    "asarray": r"lose the derivative.*np\.stack",
    "to an entry": r"lose the derivative.*np\.stack",
    "sum of some": "where",
    "complex factor": "real",
}


@pytest.mark.parametrize("case", LOSSES)
def test_what_would_lose_the_derivative_raises_and_says_so(case):
    for f in P.jacfwd(LOSSES[case]), P.grad(lambda x: LOSSES[case](x)):
        errors = TypeError if case in ADVICE else (TypeError, AttributeError)
        with pytest.raises(errors, match=ADVICE.get(case)):
            f(np.array([0.5, 1.5, 0.7]))


def test_a_rule_can_be_added_as_the_message_says(monkeypatch):
    rule = (lambda y, x: 1 / np.sqrt(1 - x * x),)
    monkeypatch.setitem(P.RULES, np.arcsin, rule)
    np.testing.assert_allclose(D(np.arcsin)(0.6), 1.25)
    np.testing.assert_allclose(P.grad(np.arcsin)(0.6), 1.25)


@both
def test_traced_arrays_behave_like_arrays(derive):
    def program(x):
        assert len(x) == 2 and (x.shape, x.ndim, x.size) == ((2, 3), 2, 6)
        assert x.dtype == float and len(list(x)) == 2 and len(x.T) == 3
        assert x[0, 1] and not x[0, 0] and (x > 1)[0].tolist() == [0, 0, 1]
        assert max(x[0, 0], x[0, 2]) == 2 and x[0, 0] != 1
        return x[0, 0] * 1.0 if x[0, 0] < 1 else np.sum(x)

    assert np.sum(derive(lambda t: program(t + X))(np.zeros((2, 3)))) == 1


X = np.arange(6.0).reshape(2, 3)

# jvp, vjp, grad, jacfwd as functions


def test_wrong_arguments_raise():
    one, three = np.ones(1), np.ones(3)
    for bad in ((three,), (1.0,)), ((1.0, 2.0), (1.0,)):
        with pytest.raises(ValueError):
            P.jvp(np.sin, *bad)
    for wrong in (lambda: P.jvp(np.sin, one, one), lambda: P.vjp(D, one)):
        with pytest.raises(TypeError, match="tuple"):
            wrong()
    for bad in 1j, "1", None:
        with pytest.raises(TypeError):
            P.jvp(np.sin, (bad,), (1.0,))
    with pytest.raises(ValueError, match=r"\(3,\)"):
        P.grad(np.sin)(three)
    with pytest.raises(ValueError, match="shape"):
        P.grad(lambda x: np.sum(np.stack([x, x[:1]])))(three)
    for derive in P.grad, P.jacfwd:
        with pytest.raises(TypeError):
            derive(lambda x: (x, x))(1.0)


@both
def test_integers_become_floats_and_constants_have_no_slope(derive):
    assert derive(lambda x: x**-2)(2) == -0.25
    for f in (lambda x: 5.0), (lambda x: np.sum(np.zeros_like(x))):
        assert P.jvp(f, (X,), (X,)) == (f(X), 0)
        assert (derive(f)(X) == 0).all()
        assert (P.jacfwd(f)(X) == np.zeros(X.shape)).all()


def test_results_are_fresh_and_the_tape_ignores_later_changes():
    x, kept = np.ones(2), np.ones(2)
    gradient = P.grad(np.sum)(x)
    gradient += 1  # no read-only view
    value, _ = P.jvp(lambda x: x, (x,), (x,))
    value += 1

    def stale(x):
        factor, index = np.array([1.0, 2.0]), [0, 1]
        y = np.sum((x * factor)[index])
        factor *= 100
        index[:] = [0, 0]
        return y

    assert (x == kept).all() and (P.grad(stale)(x) == [1, 2]).all()
    square = P.grad(lambda x: stale(x) ** 2)
    assert (P.jacfwd(square)(x) == [[2, 4], [4, 8]]).all()
    twice = P.grad(lambda x: np.sum(P.grad(lambda z: stale(z * x))(x)))
    assert (twice(x) == [1, 2]).all()


# Inputs that have failed, by kind


@pytest.mark.parametrize(
    "f, derivatives",
    [
        (lambda x: np.exp(-(x**2)), [0, -2, 0, 12]),
        (lambda x: x**2 * x**0, [0, 2, 0, 0]),
    ],
)
def test_high_derivatives_at_zero_agree_in_all_nestings(f, derivatives):
    for order, expected in enumerate(derivatives, start=1):
        for word in itertools.product((P.grad, D), repeat=order):
            g = f
            for derive in word:
                g = derive(g)
            assert g(0.0) == expected, word


@both
def test_a_rules_own_arithmetic_neither_overflows_nor_divides_by_0(derive):
    for x in -1000.0, 1000.0:
        soft = derive(lambda x: np.logaddexp(0.0, x))
        assert soft(x) == (x > 0) and derive(soft)(x) == 0
    assert derive(lambda x: np.arctan2(x, 1e200))(1e200) > 0
    assert derive(lambda x: x / 1e200)(1.0) == 1e-200
    assert derive(lambda x: x ** np.uint8(0))(1e9) == 0  # 0 - 1 is 255
    slope = derive(lambda n: P.grad(lambda a: a**n)(2.0))
    assert slope(0.0) == 0.5  # n a^(n-1), by n at 0


@both
def test_a_value_that_outlived_its_run_raises(derive):
    kept = {}
    for f in (
        lambda x: kept.setdefault("square", x * x),
        lambda x: kept.setdefault("x", x) * x,
    ):
        assert derive(f)(2.0) == 4
        with pytest.raises(RuntimeError, match="run"):
            derive(f)(2.0)


def test_infinities_are_where_the_text_and_pytorch_have_them():
    for m, jac, grad in (np, P.jacfwd, P.grad), TORCH:
        steep, at = lambda a, m=m: a[0] * m.exp(-a[1]), [1.0, -1000.0]
        trap = lambda x, m=m: m.where(x < 1, x, m.sqrt(x))  # noqa: E731
        zero, at = (m.asarray(x, dtype=m.float64) for x in (0.0, at))
        assert m.isnan(jac(steep)(at)).all() and jac(trap)(zero) == 1
        assert grad(steep)(at).tolist() == [np.inf, -np.inf]
        assert m.isnan(grad(trap)(zero))


TORCH = torch, torch.func.jacfwd, torch.func.grad


@pytest.mark.parametrize("name", P.EDGE_CASES)
def test_edges_are_torchs_in_both_modes(name):
    ours, theirs, expected = P.EDGE_CASES[name]
    assert D(ours)(0.0) == P.grad(ours)(0.0) == expected
    assert torch.func.grad(theirs)(torch.tensor(0.0)) == expected


@both
def test_no_warning_where_none_is_due(derive):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert derive(lambda x: x**0 + (x - 2.0) ** 3.0)(0.0) == 12


@both
def test_perturbations_are_not_confused(derive):
    for other in P.grad, D:
        f = lambda x, d=other: x * d(lambda y: x * y * y)(3.0)  # noqa: E731
        assert (f(2.0), derive(f)(2.0)) == (24, 24)  # 6x², 12x
        assert derive(P.outer(other))(1.0) == 1


# The scalar class of section 3


@given(a=st.floats(0.5, 3), b=st.floats(-2, 2), c=st.floats(0.5, 3))
def test_scalar_arithmetic_is_that_of_the_engine(a, b, c):
    programs = [
        lambda x: 3 - x * c + (1 - x) / (x * x + c),
        lambda x: c / x - x / c + x**3 - x**-2 + x**0,
        lambda x: -x - 2 * (x + 1) * x,
        lambda x: x if x > 1 else c * x,
    ]
    pairs = [(f, f) for f in programs]
    for name, f in P.SCALAR_FUNCTIONS.items():
        pairs.append((f, P.relu if name == "relu" else getattr(np, name)))
    for f, g in pairs:
        y, expected = f(P.Scalar(a, b)), P.jvp(g, (a,), (b,))
        np.testing.assert_allclose([y.primal, y.tangent], expected, 1e-9)


def test_scalars_compare_by_their_primals():
    small, large, nan = map(P.Scalar, (0.0, 2.0, math.nan), (9.0, -9.0, 1.0))
    assert small < large and small <= 0 and large > 1 and large >= 2
    assert small == 0 and small != large and large and not small
    assert not (nan > 1 or nan < 1 or nan == nan or nan >= 1)
    zeroth = small**0
    assert (zeroth.primal, zeroth.tangent) == (1, 0)


@given(a=st.floats(0.1, 9))
def test_newtons_loop_has_the_slope_of_the_root(a):
    slopes = [derive(P.newton_root)(a) for derive in (D, P.grad)]
    slopes.append(P.newton_root(P.Scalar(a, 1.0)).tangent)
    np.testing.assert_allclose(slopes, 0.5 / math.sqrt(a), 1e-6)


# Exercises and helpers

WRONG = {
    "steepest": [lambda g: g, lambda g: g / abs(g).sum()],
    "sigmoid_slope": [lambda x: 1 / (1 + math.exp(x)), lambda x: 0.25],
    "dual_quotient": [
        lambda a, b, c, d: (a / c, (a * d - b * c) / c**2),
        lambda a, b, c, d: a / c,
        lambda a, b, c, d: None,
    ],
    "newton_slope": [
        lambda a, tolerance: 0.5 / math.sqrt(a),
        lambda a, tolerance: 0.5 / P.newton_root(a, tolerance),
    ],
    "softmax_jvp": [
        lambda x, v: P.softmax(x) * (1 - P.softmax(x)) * v,
        lambda x, v: "s(v - sv)",
    ],
    "hvp": [
        lambda f, x, v: P.grad(f)(x) * v,
        lambda f, x, v: P.jvp(P.grad(f), (v,), (x,))[1],
    ],
    "uniform_mean": [lambda g: g, lambda g: g / 12],
}


@pytest.mark.parametrize("name", P.EXERCISES)
def test_checker_tells_right_wrong_and_open_answers_apart(name, capsys):
    P.check(getattr(P, name), *P.EXERCISES[name])
    P.check(getattr(P, f"{name}_solution"), *P.EXERCISES[name])
    open_, right = capsys.readouterr().out.splitlines()
    assert open_ == f"{name}: not attempted yet"
    assert right == f"{name}: correct"
    for attempt in WRONG[name]:
        attempt.__name__ = name
        with pytest.raises(AssertionError, match=rf"{name}.*expected"):
            P.check(attempt, *P.EXERCISES[name])


def test_helpers_raise_where_they_should(capsys):
    P.compare("equal", 0.1, np.float64(0.1), 1e-15)
    for wrong in np.ones(3) + 1e-6, np.full(3, np.nan), np.ones((1, 3)):
        with pytest.raises(AssertionError):
            P.compare("different", wrong, np.ones(3))
    samples = np.random.default_rng(0).normal(size=(10_000, 2))
    P.compare_mean("right", samples, np.zeros(2))
    with pytest.raises(AssertionError, match="standard errors"):
        P.compare_mean("wrong", samples, np.array([0, 0.1]))
    P.claim(False, "faster")
    assert "differs on this machine: faster" in capsys.readouterr().out
