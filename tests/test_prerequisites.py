"""The two engines and the exercises of prerequisites.ipynb."""

import inspect
import math
import operator
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

settings.register_profile(
    "notebook",
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("notebook")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

REAL, POSITIVE = (-3.0, 3.0), (0.1, 4.0)
ONE = {  # name: (PyTorch's function, interval it is drawn from)
    "negative": (torch.negative, REAL),
    "positive": (torch.positive, REAL),
    "reciprocal": (torch.reciprocal, POSITIVE),
    "square": (torch.square, REAL),
    "sqrt": (torch.sqrt, POSITIVE),
    "cbrt": (lambda x: x ** (1 / 3), POSITIVE),
    "exp": (torch.exp, REAL),
    "expm1": (torch.expm1, REAL),
    "log": (torch.log, POSITIVE),
    "log1p": (torch.log1p, (-0.9, 3.0)),
    "sin": (torch.sin, REAL),
    "cos": (torch.cos, REAL),
    "tan": (torch.tan, (-1.4, 1.4)),
    "sinh": (torch.sinh, REAL),
    "cosh": (torch.cosh, REAL),
    "tanh": (torch.tanh, REAL),
    "arctan": (torch.arctan, REAL),
    "absolute": (torch.absolute, REAL),
    "sign": (torch.sign, REAL),
}
TWO = {  # name: (PyTorch's function, intervals of the two operands)
    "add": (torch.add, REAL, REAL),
    "subtract": (torch.subtract, REAL, REAL),
    "multiply": (torch.multiply, REAL, REAL),
    "divide": (torch.divide, REAL, POSITIVE),
    "power": (torch.pow, POSITIVE, REAL),
    "maximum": (torch.maximum, REAL, REAL),
    "minimum": (torch.minimum, REAL, REAL),
    "hypot": (torch.hypot, POSITIVE, REAL),
    "arctan2": (torch.arctan2, REAL, POSITIVE),
    "logaddexp": (torch.logaddexp, REAL, REAL),
}
SHAPES = [(), (1,), (3,), (0,), (2, 3), (2, 1), (1, 3), (4, 1, 3), (1, 1)]
PAIRS = [
    (a, b)
    for a in SHAPES
    for b in SHAPES
    if all(
        m == n or 1 in (m, n)
        for m, n in zip(reversed(a), reversed(b), strict=False)
    )
]
DTYPES = {"float64": 1e-10, "float32": 1e-4}


def draw(seed, interval, shape, dtype="float64"):
    low, high = interval
    values = np.random.default_rng(seed).uniform(low, high, shape)
    return np.asarray(values, dtype)


def torch_jvp(f, primals, tangents):
    """Return PyTorch's value and tangent as arrays."""
    pairs = [tuple(map(torch.as_tensor, a)) for a in (primals, tangents)]
    return [y.numpy() for y in torch.func.jvp(f, *pairs)]


def assert_same(ours, theirs, tolerance=1e-10):
    """Assert equal shapes and dtypes, and values within a tolerance."""
    for a, b in zip(ours, theirs, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape and a.dtype == b.dtype, (a, b)
        np.testing.assert_allclose(a, b, tolerance, tolerance)


seeds = st.integers(0, 10**6)
dtypes = st.sampled_from(sorted(DTYPES))


# Forward mode: every rule


@pytest.mark.parametrize("name", ONE)
@settings(max_examples=25)
@given(seed=seeds, shape=st.sampled_from(SHAPES), dtype=dtypes)
def test_rule_of_one_operand_matches_torch(
    prerequisites, name, seed, shape, dtype
):
    theirs, interval = ONE[name]
    x = draw(seed, interval, shape, dtype)
    v = draw(seed + 1, REAL, shape, dtype)
    assert_same(
        prerequisites.jvp(getattr(np, name), (x,), (v,)),
        torch_jvp(theirs, (x,), (v,)),
        DTYPES[dtype],
    )


@pytest.mark.parametrize("name", TWO)
@settings(max_examples=40)
@given(seed=seeds, shapes=st.sampled_from(PAIRS), dtype=dtypes)
def test_rule_of_two_operands_matches_torch(
    prerequisites, name, seed, shapes, dtype
):
    theirs, *intervals = TWO[name]
    ours = getattr(np, name)
    drawn = zip(intervals, shapes, strict=True)
    x, y = (draw(seed + i, *d, dtype) for i, d in enumerate(drawn))
    u, v = (draw(seed + 2 + i, REAL, s, dtype) for i, s in enumerate(shapes))
    a, b = torch.as_tensor(x), torch.as_tensor(y)
    jvp, close = prerequisites.jvp, DTYPES[dtype]
    assert_same(
        jvp(ours, (x, y), (u, v)), torch_jvp(theirs, (x, y), (u, v)), close
    )
    assert_same(
        jvp(lambda z: ours(z, y), (x,), (u,)),
        torch_jvp(lambda z: theirs(z, b), (x,), (u,)),
        close,
    )
    assert_same(
        jvp(lambda z: ours(x, z), (y,), (v,)),
        torch_jvp(lambda z: theirs(a, z), (y,), (v,)),
        close,
    )


COMPLEX = [n for n in ONE if n not in ("cbrt", "absolute", "sign")]


@pytest.mark.parametrize("name", COMPLEX)
@given(seed=seeds)
def test_rule_matches_the_complex_step(prerequisites, name, seed):
    f, x = getattr(np, name), draw(seed, ONE[name][1], (4,))
    _, tangent = prerequisites.jvp(f, (x,), (np.ones(4),))
    np.testing.assert_allclose(tangent, f(x + 1e-30j).imag / 1e-30, 1e-12)


@pytest.mark.parametrize("name", [*ONE, *TWO])
@given(seed=seeds)
def test_rule_matches_a_central_difference(prerequisites, name, seed):
    f = getattr(np, name)
    intervals = (ONE | TWO)[name][1:]
    primals = tuple(
        draw(seed + i, k, (5,)) + 1e-3 for i, k in enumerate(intervals)
    )
    tangents = tuple(
        draw(seed + 9 + i, REAL, (5,)) for i in range(len(primals))
    )
    h = 1e-6
    ahead, behind = (
        f(*(x + s * h * v for x, v in zip(primals, tangents, strict=True)))
        for s in (1, -1)
    )
    kinks = {"absolute": 1, "sign": 1, "maximum": 2, "minimum": 2}
    if name in kinks:
        gap = np.abs(primals[0] - (primals[1] if kinks[name] == 2 else 0))
        assume(gap.min() > 1e-4)
    _, tangent = prerequisites.jvp(f, primals, tangents)
    np.testing.assert_allclose(
        tangent, (ahead - behind) / (2 * h), 1e-5, 1e-5
    )


def test_every_rule_in_the_table_is_tested(prerequisites):
    names = {ufunc.__name__ for ufunc in prerequisites.RULES}
    assert names == {*ONE, *TWO}


MATMULS = [
    ((3,), (3,)),
    ((2, 3), (3,)),
    ((3,), (3, 2)),
    ((2, 3), (3, 4)),
    ((5, 2, 3), (3, 4)),
    ((2, 3), (5, 3, 4)),
    ((5, 1, 2, 3), (4, 3, 2)),
    ((3,), (5, 3, 2)),
    ((5, 2, 3), (3,)),
]


@pytest.mark.parametrize("shapes", MATMULS)
@given(seed=seeds)
def test_matmul_matches_torch_in_both_modes(prerequisites, shapes, seed):
    x, y, u, v = (draw(seed + i, REAL, s) for i, s in enumerate(shapes * 2))
    assert_same(
        prerequisites.jvp(np.matmul, (x, y), (u, v)),
        torch_jvp(torch.matmul, (x, y), (u, v)),
    )
    ours = prerequisites.grad(lambda a, b: np.sum(np.sin(a @ b)), (0, 1))
    theirs = torch.func.grad(lambda a, b: (a @ b).sin().sum(), (0, 1))
    assert_same(ours(x, y), theirs(torch.as_tensor(x), torch.as_tensor(y)))
    if max(map(len, shapes)) < 3:
        assert_same(
            prerequisites.jvp(np.dot, (x, y), (u, v)),
            torch_jvp(torch.matmul, (x, y), (u, v)),
        )


def test_the_trace_at_two_and_three(prerequisites):
    f = lambda x1, x2: x1 * x2 - np.sin(x2)  # noqa: E731
    value, by_x1 = prerequisites.jvp(f, (2.0, 3.0), (1.0, 0.0))
    assert value == 6 - math.sin(3) and by_x1 == 3
    _, by_x2 = prerequisites.jvp(f, (2.0, 3.0), (0.0, 1.0))
    assert by_x2 == 2 - math.cos(3)
    assert prerequisites.grad(f, (0, 1))(2.0, 3.0) == (by_x1, by_x2)


# Random programs


GUARDS = {  # what keeps an operand where the function is smooth and small
    "square": "tanh",
    "exp": "tanh",
    "expm1": "sin",
    "tan": "tanh",
    "sinh": "sin",
    "cosh": "sin",
    "sqrt": "positive",
    "log": "positive",
    "log1p": "positive",
    "reciprocal": "positive",
    "divide": "positive",
    "power": "positive",
    "hypot": "positive",
    "arctan2": "positive",
}


@st.composite
def trees(draw, depth=6):
    """Draw an expression tree of at most the given depth."""
    kinds = ["leaf", *["one"] * 2, *["two"] * 5] if depth else ["leaf"]
    kind = draw(st.sampled_from(kinds))
    if kind == "leaf":
        constants = st.floats(-2, 2, width=16)
        return draw(st.sampled_from("xyxy") | constants)
    names = [*ONE, "relu", "sum"] if kind == "one" else [*TWO]
    names = [name for name in names if name != "cbrt"]
    operands = [draw(trees(depth - 1)) for _ in range(1 + (kind == "two"))]
    return draw(st.sampled_from(names)), *operands


def evaluate(tree, library, relu, x, y):
    """Return the value of a tree, computed by numpy or by torch."""
    if not isinstance(tree, tuple):
        leaves = {"x": x, "y": y}
        if tree in leaves:
            return leaves[tree]
        return library.ones((2, 1), dtype=library.float64) * tree
    name, *parts = tree
    parts = [evaluate(part, library, relu, x, y) for part in parts]
    guard = GUARDS.get(name)
    if guard == "positive":
        parts = [0.5 + library.sin(part) ** 2 for part in parts]
    elif guard:
        parts = [getattr(library, guard)(part) for part in parts]
    if name == "relu":
        return relu(*parts)
    if name == "power" and library is torch:
        name = "pow"
    return getattr(library, name)(*parts)


def test_trees_reach_depth_six():
    def depth(tree):
        return 1 + max(map(depth, tree[1:])) if isinstance(tree, tuple) else 0

    depths = set()

    @settings(max_examples=200, database=None)
    @given(tree=trees())
    def collect(tree):
        depths.add(depth(tree))

    collect()
    assert max(depths) == 6 and len(depths) > 2


@settings(max_examples=400)
@given(tree=trees(), seed=seeds)
def test_random_program_matches_torch_in_both_modes(
    prerequisites, tree, seed
):
    x, u = (draw(seed + i, REAL, (3,)) for i in range(2))
    y, v = (draw(seed + i, REAL, (2, 1)) for i in range(2, 4))

    def ours(x, y):
        return np.sum(evaluate(tree, np, prerequisites.relu, x, y))

    def theirs(x, y):
        return evaluate(tree, torch, torch.relu, x, y).sum()

    a, b = torch.as_tensor(x), torch.as_tensor(y)
    expected = torch_jvp(theirs, (x, y), (u, v))
    assume(all(abs(e) < 1e8 for e in expected))
    tolerance = 1e-9 * max(1, *map(abs, expected))
    assert_same(prerequisites.jvp(ours, (x, y), (u, v)), expected, tolerance)
    gradients = prerequisites.grad(ours, (0, 1))(x, y)
    expected = torch.func.grad(theirs, (0, 1))(a, b)
    tolerance = 1e-9 * max(1, *(e.abs().max().item() for e in expected))
    assert_same(gradients, expected, tolerance)
    columns = prerequisites.jacfwd(ours, (0, 1))(x, y)
    assert_same(columns, gradients, tolerance)


@settings(max_examples=50)
@given(tree=trees(depth=4), seed=seeds)
def test_second_derivatives_agree_in_all_four_nestings(
    prerequisites, tree, seed
):
    x, v = (draw(seed + i, REAL, (3,)) for i in range(2))
    y = draw(seed + 2, REAL, (2, 1))
    jvp, grad = prerequisites.jvp, prerequisites.grad

    def ours(x):
        return np.sum(evaluate(tree, np, prerequisites.relu, x, y))

    def theirs(x):
        return evaluate(tree, torch, torch.relu, x, torch.as_tensor(y)).sum()

    gradient = torch.func.grad(theirs)
    _, expected = torch_jvp(gradient, (x,), (v,))
    assume(np.isfinite(expected).all() and np.abs(expected).max() < 1e6)
    tolerance = 1e-8 * max(1, np.abs(expected).max())
    slope = lambda x: jvp(ours, (x,), (v,))[1]  # noqa: E731
    found = {
        "forward over reverse": jvp(grad(ours), (x,), (v,))[1],
        "reverse over forward": grad(slope)(x),
        "reverse over reverse": grad(lambda x: grad(ours)(x) @ v)(x),
        "forward over forward": prerequisites.jacfwd(slope)(x),
    }
    for how, hv in found.items():
        assert np.shape(hv) == (3,), how
        np.testing.assert_allclose(
            hv, expected, tolerance, tolerance, err_msg=how
        )


@given(seed=seeds)
def test_second_derivatives_through_matrix_products(prerequisites, seed):
    """Vectors and matrices on either side, a broadcast row, a sum."""
    x, w = draw(seed, REAL, (3,)), draw(seed + 1, REAL, (2, 3))

    def ours(x):
        table = np.tanh(w @ x)[:, None] * x + x @ w.T @ w
        return np.sum((table @ x) ** 2) + x @ x

    def theirs(x):
        m = torch.as_tensor(w)
        table = torch.tanh(m @ x)[:, None] * x + x @ m.T @ m
        return ((table @ x) ** 2).sum() + x @ x

    jacfwd, grad = prerequisites.jacfwd, prerequisites.grad
    exact = torch.func.hessian(theirs)(torch.as_tensor(x)).numpy()
    tolerance = 1e-9 * max(1, np.abs(exact).max())
    found = {
        "forward over reverse": jacfwd(grad(ours))(x),
        "forward over forward": jacfwd(jacfwd(ours))(x),
        "reverse over forward": [
            grad(lambda x, i=i: jacfwd(ours)(x)[i])(x) for i in range(3)
        ],
        "reverse over reverse": [
            grad(lambda x, i=i: grad(ours)(x)[i])(x) for i in range(3)
        ],
    }
    for how, hessian in found.items():
        np.testing.assert_allclose(
            hessian, exact, tolerance, tolerance, err_msg=how
        )


# Edges and kinks, one by one


EDGES = {
    "relu at 0": (None, torch.relu, [0.0], [1.0]),
    "abs at 0": (np.absolute, torch.abs, [0.0], [1.0]),
    "sign at 0": (np.sign, torch.sign, [0.0], [1.0]),
    "maximum at a tie": (np.maximum, torch.maximum, [1.0, 1.0], [1.0, 4.0]),
    "minimum at a tie": (np.minimum, torch.minimum, [1.0, 1.0], [1.0, 4.0]),
    "sqrt at 0": (np.sqrt, torch.sqrt, [0.0], [1.0]),
    "sqrt at 0, tangent 0": (np.sqrt, torch.sqrt, [0.0], [0.0]),
    "sqrt of a negative": (np.sqrt, torch.sqrt, [-1.0], [1.0]),
    "log at 0": (np.log, torch.log, [0.0], [1.0]),
    "log at 0, tangent 0": (np.log, torch.log, [0.0], [0.0]),
    "log of a negative": (np.log, torch.log, [-1.0], [1.0]),
    "log1p at -1": (np.log1p, torch.log1p, [-1.0], [1.0]),
    "reciprocal at 0": (np.reciprocal, torch.reciprocal, [0.0], [1.0]),
    "1 / 0": (np.divide, torch.divide, [1.0, 0.0], [1.0, 1.0]),
    "1 / 0, by 1": (np.divide, torch.divide, [1.0, 0.0], [1.0, 0.0]),
    "1 / 0, by 0": (np.divide, torch.divide, [1.0, 0.0], [0.0, 1.0]),
    "0 / 0": (np.divide, torch.divide, [0.0, 0.0], [1.0, 1.0]),
    "constant / 0": (lambda x: 1 / x, lambda x: 1 / x, [0.0], [1.0]),
    "0 / constant 0": (lambda x: x / 0, lambda x: x / 0, [0.0], [1.0]),
    "0 ** 0": (np.power, torch.pow, [0.0, 0.0], [1.0, 1.0]),
    "0 ** constant 0": (lambda x: x**0, lambda x: x**0, [0.0], [1.0]),
    "0 ** 1": (lambda x: x**1, lambda x: x**1, [0.0], [1.0]),
    "0 ** 2": (lambda x: x**2, lambda x: x**2, [0.0], [1.0]),
    "0 ** 0.5": (lambda x: x**0.5, lambda x: x**0.5, [0.0], [1.0]),
    "0 ** -1": (lambda x: x**-1, lambda x: x**-1, [0.0], [1.0]),
    "0 ** -1, both": (np.power, torch.pow, [0.0, -1.0], [1.0, 1.0]),
    "constant 0 ** 0": (lambda y: 0.0**y, lambda y: 0.0**y, [0.0], [1.0]),
    "constant 0 ** 2": (lambda y: 0.0**y, lambda y: 0.0**y, [2.0], [1.0]),
    "constant 0 ** -1": (lambda y: 0.0**y, lambda y: 0.0**y, [-1.0], [1.0]),
    "-2 ** 3": (lambda x: x**3, lambda x: x**3, [-2.0], [1.0]),
    "-2 ** -3": (lambda x: x**-3, lambda x: x**-3, [-2.0], [1.0]),
    "-2 ** 3, both": (np.power, torch.pow, [-2.0, 3.0], [1.0, 1.0]),
    "-2 ** 0.5": (lambda x: x**0.5, lambda x: x**0.5, [-2.0], [1.0]),
    "hypot at 0, 0": (np.hypot, torch.hypot, [0.0, 0.0], [1.0, 1.0]),
    "arctan2 at 0, 0": (np.arctan2, torch.arctan2, [0.0, 0.0], [1.0, 1.0]),
    "logaddexp of -inf twice": (
        np.logaddexp,
        torch.logaddexp,
        [-np.inf, -np.inf],
        [1.0, 1.0],
    ),
    "logaddexp of inf": (
        np.logaddexp,
        torch.logaddexp,
        [np.inf, 0.0],
        [1.0, 1],
    ),
    "0 times inf": (lambda x: x * np.inf, lambda x: x * np.inf, [0.0], [1.0]),
    "inf times 0": (np.multiply, torch.multiply, [np.inf, 0.0], [1.0, 1.0]),
    "an infinite tangent": (np.sin, torch.sin, [np.pi / 2], [np.inf]),
    "nan": (np.exp, torch.exp, [np.nan], [1.0]),
    "relu of nan": (None, torch.relu, [np.nan], [1.0]),
}


@pytest.mark.parametrize("case", EDGES)
def test_edge_is_the_same_as_in_torch(prerequisites, case):
    ours, theirs, primals, tangents = EDGES[case]
    primals, tangents = (
        tuple(map(np.float64, a)) for a in (primals, tangents)
    )
    assert_same(
        prerequisites.jvp(ours or prerequisites.relu, primals, tangents),
        torch_jvp(theirs, primals, tangents),
    )


def test_infinite_slopes_are_never_silently_finite(prerequisites):
    for f in np.sqrt, np.log, np.cbrt, np.reciprocal:
        _, tangent = prerequisites.jvp(f, (0.0,), (1.0,))
        assert np.isinf(tangent), f
        assert np.isinf(prerequisites.grad(f)(0.0)), f


def test_maximum_shares_a_tie_and_relu_does_not(prerequisites):
    ramp = lambda x: np.maximum(x, 0.0)  # noqa: E731
    assert prerequisites.jvp(ramp, (0.0,), (1.0,)) == (0, 0.5)
    assert prerequisites.jvp(prerequisites.relu, (0.0,), (1.0,)) == (0, 0)
    assert prerequisites.grad(ramp)(0.0) == 0.5
    assert prerequisites.grad(prerequisites.relu)(0.0) == 0


# Behaving like an array


def make(prerequisites, shape=(3,), kind="Dual", dtype="float64"):
    """Return a Dual or a Node over random numbers."""
    x, v = (draw(i, POSITIVE, shape, dtype) for i in range(2))
    if kind == "Dual":
        return prerequisites.Dual(x, v)
    return prerequisites.Node(x, prerequisites.Tape())


OPERANDS = [2, 2.5, True, np.float64(2), np.float32(2), np.int8(2)]
OPERANDS += [[1.0, 2.0, 3.0], np.arange(1, 4), np.ones(3, np.float32)]
OPERANDS += [np.array([30, 3, 4], np.int8), np.ones((2, 1)), np.array(2.0)]


@pytest.mark.parametrize("operand", OPERANDS, ids=repr)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_operands_work_on_either_side(prerequisites, operand, dtype):
    x, v = (draw(i, POSITIVE, (3,), dtype) for i in range(2))
    operators = [
        lambda a, b: a + b,
        lambda a, b: a - b,
        lambda a, b: a * b,
        lambda a, b: a / b,
        lambda a, b: a**b,
        np.arctan2,
        np.hypot,
        np.maximum,
    ]
    constant = np.asarray(operand, "float64")
    for f in operators:
        for g in (lambda a, b, f=f: f(a, b)), (lambda a, b, f=f: f(b, a)):
            value, tangent = prerequisites.jvp(
                lambda z, g=g: g(z, operand), (x,), (v,)
            )
            plain = g(x, operand)
            assert value.dtype == tangent.dtype == np.asarray(plain).dtype
            np.testing.assert_allclose(value, plain, 1e-6)
            _, exact = prerequisites.jvp(
                lambda z, g=g: g(z, constant),
                (x.astype(float),),
                (v.astype(float),),
            )
            np.testing.assert_allclose(tangent, exact, 1e-4, 1e-5)


def test_a_constant_integer_array_cannot_overflow(prerequisites):
    big = np.array([100], np.int8)
    _, tangent = prerequisites.jvp(
        lambda x: np.arctan2(x, big), (np.ones(1),), (np.ones(1),)
    )
    np.testing.assert_allclose(tangent, 100 / (1 + 100**2))


def test_comparisons_branch_on_the_primal(prerequisites):
    x = prerequisites.Dual([1.0, 2.0, 3.0], [9.0, -9.0, 0.0])
    assert ((x > 1.5) == [False, True, True]).all()
    assert (
        type(x <= 2) is np.ndarray and (x == x).all() and not (x != x).any()
    )
    assert bool(prerequisites.Dual(1.0, 0.0)) and max(x[0], x[2]) is not None
    assert not prerequisites.Dual(0.0, 5.0)
    assert np.isfinite(x).all() and not np.isnan(x).any()

    def steps(x):
        return x * 3 if x > 1 else -x

    assert prerequisites.jvp(steps, (2.0,), (1.0,)) == (6, 3)
    assert prerequisites.jvp(steps, (0.5,), (1.0,)) == (-0.5, -1)
    assert prerequisites.grad(steps)(0.5) == -1


@pytest.mark.parametrize("kind", ["Dual", "Node"])
def test_length_iteration_and_indexing_are_those_of_an_array(
    prerequisites, kind
):
    x = make(prerequisites, (4, 3), kind)
    assert len(x) == 4 and len(list(x)) == 4 and x.shape == (4, 3)
    assert (x.ndim, x.size, x.dtype) == (2, 12, np.float64)
    for index in (
        0,
        -1,
        (1, 2),
        slice(1, 3),
        slice(None, None, -1),
        [0, 0, 2],
        (..., None),
        x > 1,
    ):
        assert (x[index].primal == x.primal[index]).all()
        if kind == "Dual":
            assert (x[index].tangent == x.tangent[index]).all()
    for refuse in len, list, iter:
        with pytest.raises(TypeError):
            refuse(make(prerequisites, (), kind))
    with pytest.raises(TypeError):
        x[0] = 1.0


FUNCTIONS = {
    "sum": (np.sum, torch.sum),
    "sum of columns": (lambda x: x.sum(0), lambda x: x.sum(0)),
    "sum kept": (
        lambda x: np.sum(x, axis=1, keepdims=True),
        lambda x: x.sum(1, keepdim=True),
    ),
    "sum of two axes": (lambda x: np.sum(x, (0, 1)), torch.sum),
    "mean": (np.mean, torch.mean),
    "mean of rows": (lambda x: np.mean(x, -1), lambda x: x.mean(-1)),
    "where": (
        lambda x: np.where(x > 2, x, -x),
        lambda x: torch.where(x > 2, x, -x),
    ),
    "where with a constant": (
        lambda x: np.where(x > 2, x, 7.0),
        lambda x: torch.where(x > 2, x, 7.0),
    ),
    "where spreads": (
        lambda x: np.where(np.ones((2, 1, 1)) > 0, 1.0, x),
        lambda x: torch.where(torch.ones(2, 1, 1) > 0, 1.0, x),
    ),
    "reshape": (lambda x: x.reshape(3, 4), lambda x: x.reshape(3, 4)),
    "reshape to -1": (lambda x: np.reshape(x, -1), lambda x: x.reshape(-1)),
    "concatenate": (
        lambda x: np.concatenate([x, np.ones((1, 3)), x[:1] * 2]),
        lambda x: torch.cat([x, torch.ones(1, 3), x[:1] * 2]),
    ),
    "concatenate columns": (
        lambda x: np.concatenate((x * x, x), axis=1),
        lambda x: torch.cat((x * x, x), 1),
    ),
    "stack": (
        lambda x: np.stack([x[0], x[1] * x[2]], axis=-1),
        lambda x: torch.stack([x[0], x[1] * x[2]], -1),
    ),
    "transpose": (lambda x: x.T @ x, lambda x: x.T @ x),
    "axes": (lambda x: np.transpose(x, (1, 0)), lambda x: x.T),
    "swapaxes": (
        lambda x: np.swapaxes(x, 0, 1) * 2,
        lambda x: x.swapaxes(0, 1) * 2,
    ),
    "broadcast": (
        lambda x: np.broadcast_to(x, (2, 4, 3)),
        lambda x: x.broadcast_to(2, 4, 3),
    ),
    "indexing": (
        lambda x: x[1:, ::2] * x[0, 1] + x[[1, 1, 2]][:, :2],
        lambda x: x[1:, ::2] * x[0, 1] + x[[1, 1, 2]][:, :2],
    ),
    "iteration": (
        lambda x: sum(a * b for a, b in zip(x, x[::-1], strict=True)),
        lambda x: sum(a * b for a, b in zip(x, x.flip(0), strict=True)),
    ),
    "dot": (lambda x: np.dot(x, x[0]), lambda x: x @ x[0]),
    "dot with a number": (lambda x: np.dot(x, 2.0), lambda x: x * 2.0),
}


@pytest.mark.parametrize("case", FUNCTIONS)
@given(seed=seeds)
def test_array_function_matches_torch_in_both_modes(
    prerequisites, case, seed
):
    ours, theirs = FUNCTIONS[case]
    x, v = draw(seed, POSITIVE, (4, 3)), draw(seed + 1, REAL, (4, 3))
    expected = torch_jvp(theirs, (x,), (v,))
    assert_same(prerequisites.jvp(ours, (x,), (v,)), expected)
    gradient = prerequisites.grad(lambda x: np.sum(np.sin(ours(x))))(x)
    theirs_sum = torch.func.grad(lambda x: theirs(x).sin().sum())
    assert_same([gradient], [theirs_sum(torch.as_tensor(x))])


def test_every_function_in_the_table_is_tested(prerequisites):
    source = inspect.getsource(inspect.getmodule(make))
    for function in prerequisites.FUNCTIONS:
        name = function.__name__
        assert f"np.{name}" in source or f".{name}" in source, name


REFUSED = {
    "an integer division": lambda x: x // 2,
    "a remainder": lambda x: x % 2,
    "arcsin": np.arcsin,
    "in place on an array": lambda x: np.add(np.ones(3), x, out=np.ones(3)),
    "in place with where": lambda x: np.add(x, 1, where=[True, False, True]),
    "in place on a Dual": lambda x: np.add(x, 1, out=x),
    "reduce": np.add.reduce,
    "accumulate": np.multiply.accumulate,
    "at, as index target": lambda x: np.add.at(x, [0], 1.0),
    "at, as values": lambda x: np.add.at(np.ones(3), [0, 1, 2], x),
    "outer": lambda x: np.multiply.outer(x, x),
    "asarray": np.asarray,
    "array": np.array,
    "array of a list": lambda x: np.array([x, x]),
    "object array": lambda x: np.array([x], dtype=object),
    "float": lambda x: float(x[0]),
    "int": lambda x: int(x[0]),
    "complex": lambda x: complex(x[0]),
    "math.sin": lambda x: math.sin(x[0]),
    "format": lambda x: f"{x[0]:.3f}",
    "float64": lambda x: np.float64(x[0]),
    "tensor": torch.as_tensor,
    "copyto": lambda x: np.copyto(np.ones(3), x),
    "slice assignment": lambda x: np.ones(3).__setitem__(slice(3), x),
    "assignment to itself": lambda x: operator.setitem(x, 0, 1.0),
    "sum with out": lambda x: np.sum(x, out=np.array(0.0)),
    "sum with dtype": lambda x: np.sum(x, dtype=int),
    "sum with initial": lambda x: np.sum(x, initial=1.0),
    "mean with where": lambda x: np.mean(x, where=[True, False, True]),
    "sum of a list": lambda x: np.sum([x, x]),
    "concatenate with out": lambda x: np.concatenate([x], out=np.ones(3)),
    "stack with dtype": lambda x: np.stack([x, x], dtype=int),
    "reshape in memory order": lambda x: np.reshape(x, (3, 1), order="A"),
    "linalg.norm": np.linalg.norm,
    "cumsum": np.cumsum,
    "prod": np.prod,
    "max": np.max,
    "sort": np.sort,
    "a complex factor": lambda x: x * 1j,
    "an object operand": lambda x: x + np.array([None] * 3),
}


@pytest.mark.parametrize("kind", ["Dual", "Node"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_could_lose_the_derivative_raises(prerequisites, case, kind):
    with pytest.raises(TypeError):
        REFUSED[case](make(prerequisites, kind=kind))


def test_assigning_into_an_array_raises(prerequisites):
    a, x = np.zeros(3), make(prerequisites)
    for index, value in (0, x[0]), (0, x), (slice(1), x[:1]):
        with pytest.raises((TypeError, ValueError)):
            a[index] = value
    with pytest.raises(TypeError):
        a += x
    with pytest.raises(TypeError):
        x += 1
    assert (a == 0).all()


def test_missing_rule_names_the_operation_and_the_cure(prerequisites):
    x = make(prerequisites)
    with pytest.raises(TypeError, match=r"numpy\.arcsin .*RULES\["):
        np.arcsin(x)
    with pytest.raises(TypeError, match=r"numpy\.linalg\.norm .*FUNCTIONS\["):
        np.linalg.norm(x)


def test_a_rule_can_be_added_as_the_message_says(prerequisites, monkeypatch):
    rule = (lambda x: 1 / np.sqrt(1 - x * x),)
    monkeypatch.setitem(prerequisites.RULES, np.arcsin, rule)
    result = prerequisites.jvp(np.arcsin, (0.6,), (1.0,))
    np.testing.assert_allclose(result, (math.asin(0.6), 1.25))
    np.testing.assert_allclose(prerequisites.grad(np.arcsin)(0.6), 1.25)


def test_different_shapes_raise_with_both_shapes(prerequisites):
    with pytest.raises(ValueError, match=r"\(3,\).*\(2,\)"):
        prerequisites.Dual(np.ones(3), np.ones(2))
    with pytest.raises(ValueError, match=r"\(3,\).*\(\)"):
        prerequisites.jvp(np.sin, (np.ones(3),), (1.0,))
    with pytest.raises(ValueError):
        prerequisites.jvp(np.add, (1.0, 2.0), (1.0,))
    with pytest.raises(TypeError):
        prerequisites.jvp(np.sin, np.ones(1), np.ones(1))


def test_complex_and_text_are_refused_and_integers_become_floats(
    prerequisites,
):
    for bad in 1j, "1", None:
        with pytest.raises(TypeError):
            prerequisites.Dual(bad, 1.0)
    value, tangent = prerequisites.jvp(lambda x: x**-2, (2,), (1,))
    assert (value, tangent) == (0.25, -0.25)


def test_a_tangent_takes_the_dtype_of_its_primal(prerequisites):
    x = prerequisites.Dual(np.float32([1, 2]), np.float64([1, 2]))
    assert x.dtype == x.tangent.dtype == np.float32
    for y in x * 2, x + np.pi, np.maximum(x, 1), np.where(x > 1, x, 0), x**2:
        assert y.primal.dtype == y.tangent.dtype == np.float32
    gradient = prerequisites.grad(lambda x: np.sum(np.maximum(x, 1) * x))
    assert gradient(x.primal).dtype == np.float32


# jvp, jacfwd, grad


def several(library, x, y, w):
    """Return a function of three arguments, in numpy or torch."""
    return library.tanh(w @ x) * y + library.exp(-x[0]) * (y**2).sum()


@given(seed=seeds)
def test_jvp_and_jacfwd_of_several_arguments_match_torch(prerequisites, seed):
    shapes = (3,), (2,), (2, 3)
    args = tuple(draw(seed + i, REAL, s) for i, s in enumerate(shapes))
    tangents = tuple(
        draw(seed + 5 + i, REAL, s) for i, s in enumerate(shapes)
    )
    ours = lambda *a: several(np, *a)  # noqa: E731
    theirs = lambda *a: several(torch, *a)  # noqa: E731
    tensors = tuple(map(torch.as_tensor, args))
    assert_same(
        prerequisites.jvp(ours, args, tangents),
        torch_jvp(theirs, args, tangents),
    )
    for i in range(3):
        found = prerequisites.jacfwd(ours, argnums=i)(*args)
        expected = torch.func.jacfwd(theirs, argnums=i)(*tensors)
        assert_same([found], [expected])
    found = prerequisites.jacfwd(ours, (0, 2))(*args)
    assert_same(found, torch.func.jacfwd(theirs, (0, 2))(*tensors))
    total = prerequisites.grad(lambda *a: ours(*a).sum(), (1, 2))(*args)
    expected = torch.func.grad(lambda *a: theirs(*a).sum(), (1, 2))
    assert_same(total, expected(*tensors))


def test_negative_argument_numbers_count_from_the_end(prerequisites):
    f = lambda *a: a[-2] * a[-1] ** 2  # noqa: E731
    assert prerequisites.jacfwd(f, -1)(3.0, 5.0) == 30
    assert prerequisites.grad(f, -1)(3.0, 5.0) == 30
    for derive in prerequisites.jacfwd, prerequisites.grad:
        with pytest.raises(IndexError):
            derive(f, 2)(3.0, 5.0)


def test_a_constant_function_has_zero_derivatives(prerequisites):
    x = draw(0, REAL, (2, 3))
    for f in (lambda x: 5.0), (lambda x: np.zeros_like(x).sum()):
        value, tangent = prerequisites.jvp(f, (x,), (x,))
        assert value == f(x) and tangent == 0
        assert (prerequisites.grad(f)(x) == np.zeros((2, 3))).all()
        assert (prerequisites.jacfwd(f)(x) == np.zeros((2, 3))).all()
    _, tangent = prerequisites.jvp(lambda x: np.ones(4), (x,), (x,))
    assert tangent.shape == (4,) and not tangent.any()


def test_grad_refuses_what_is_not_scalar(prerequisites):
    with pytest.raises(ValueError, match=r"\(3,\)"):
        prerequisites.grad(np.sin)(np.ones(3))
    with pytest.raises(TypeError):
        prerequisites.grad(lambda x: (x, x))(1.0)
    with pytest.raises(TypeError):
        prerequisites.jvp(lambda x: (x, x), (1.0,), (1.0,))


def test_grad_adds_up_all_the_uses_of_a_value(prerequisites):
    grad = prerequisites.grad
    assert grad(lambda x: x * x)(3.0) == 6
    assert grad(lambda x: x + x + x)(3.0) == 3

    def diamonds(x):
        for _ in range(50):
            x = 0.5 * x + 0.5 * x
        return x

    assert grad(diamonds)(3.0) == 1
    np.testing.assert_allclose(
        grad(lambda x: x @ x + np.sum(x) ** 2)(np.array([1.0, 2.0])), [8, 10]
    )


def test_grad_is_not_disturbed_by_later_changes_to_an_array(prerequisites):
    def stale(x):
        factor = np.array([1.0, 2.0])
        y = np.sum(x * factor)
        factor *= 100
        return y

    assert (prerequisites.grad(stale)(np.ones(2)) == [1, 2]).all()


def test_neither_mode_changes_its_inputs(prerequisites):
    x, v = np.ones(3), np.full(3, 2.0)
    f = lambda x: np.sum(np.exp(x) * x)  # noqa: E731
    prerequisites.jvp(f, (x,), (v,)), prerequisites.grad(f)(x)
    prerequisites.jacfwd(f)(x)
    assert (x == 1).all() and (v == 2).all()


@given(seed=seeds)
def test_newtons_square_root_is_differentiated_through_its_loop(
    prerequisites, seed
):
    a = draw(seed, POSITIVE, ())

    def root(a):
        guess = 1.0
        while abs(guess * guess - a) > 1e-12:
            guess = (guess + a / guess) / 2
        return guess

    _, tangent = prerequisites.jvp(root, (a,), (1.0,))
    np.testing.assert_allclose(tangent, 0.5 / np.sqrt(a), 1e-5)
    np.testing.assert_allclose(prerequisites.grad(root)(a), tangent)


# Nesting


def test_perturbation_confusion_is_cured_by_levels(prerequisites):
    jvp, grad = prerequisites.jvp, prerequisites.grad

    def inner_forward(x):
        return x * jvp(lambda y: x + y, (1.0,), (1.0,))[1]

    def inner_reverse(x):
        return x * grad(lambda y: x + y)(1.0)

    for f in inner_forward, inner_reverse:
        assert jvp(f, (1.0,), (1.0,)) == (1, 1)
        assert grad(f)(1.0) == 1

    def harder(x):
        return x * jvp(lambda y: x * y * y, (3.0,), (1.0,))[1]

    assert jvp(harder, (2.0,), (1.0,)) == (24, 24)  # 6x², 12x


def test_a_dual_inside_a_dual_gives_the_second_derivative(prerequisites):
    Dual = prerequisites.Dual
    x = Dual(Dual(2.0, 1.0), Dual(1.0, 0.0))
    y = x**3
    assert (y.primal.primal, y.tangent.primal) == (8, 12)
    assert y.primal.tangent == 12 and y.tangent.tangent == 12
    inner = Dual(2.0, 1.0)
    z = x * inner  # the inner one is a constant for the outer one
    assert z.tangent.primal == 2 and z.tangent.tangent == 1
    with pytest.raises(ValueError, match="level"):
        Dual(Dual(2.0, 1.0), 1.0, level=0)


@given(seed=seeds)
def test_third_derivatives_match_torch(prerequisites, seed):
    x = draw(seed, REAL, ())

    def derivative(f):
        return lambda x: prerequisites.jvp(f, (x,), (1.0,))[1]

    def theirs(f):
        return lambda x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]

    ours = derivative(derivative(derivative(lambda x: np.sin(x) * x**3)))
    exact = theirs(theirs(theirs(lambda x: torch.sin(x) * x**3)))
    np.testing.assert_allclose(ours(x), exact(torch.as_tensor(x)), 1e-9, 1e-9)
    np.testing.assert_allclose(
        prerequisites.grad(prerequisites.grad(prerequisites.grad(np.sin)))(x),
        -np.cos(x),
    )


def test_no_warning_where_none_is_due(prerequisites):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prerequisites.jvp(lambda x: x**0 + x**2, (0.0,), (1.0,))
        prerequisites.jvp(lambda x: np.maximum(x, 0.0), (0.0,), (1.0,))
        prerequisites.grad(lambda x: (-x) ** 3.0)(2.0)


# The small classes of section 3


def test_scalar_rules_match_the_array_engine(prerequisites):
    Scalar, table = prerequisites.Scalar, prerequisites.SCALAR_FUNCTIONS
    arrays = {"relu": prerequisites.relu}
    for name, f in table.items():
        y = f(Scalar(0.7, 2.0))
        g = arrays.get(name) or getattr(np, name)
        expected = prerequisites.jvp(g, (0.7,), (2.0,))
        np.testing.assert_allclose((y.primal, y.tangent), expected)
        assert f(0.7) == y.primal


@given(a=st.floats(0.5, 3), b=st.floats(-2, 2), c=st.floats(0.5, 3))
def test_scalar_arithmetic_matches_the_array_engine(prerequisites, a, b, c):
    programs = [
        lambda x: 3 - x * c + x,
        lambda x: (1 - x) / (x * x + c),
        lambda x: c / x - x / c + x**3 - x**-2,
        lambda x: -x - 2 * (x + 1) * x,
    ]
    for f in programs:
        y = f(prerequisites.Scalar(a, b))
        expected = prerequisites.jvp(f, (a,), (b,))
        np.testing.assert_allclose(
            (y.primal, y.tangent), expected, 1e-9, 1e-9
        )


# Exercises


WRONG = {
    "steepest": [
        lambda g: g,
        lambda g: g / np.sum(g),
        lambda g: -g / np.linalg.norm(g),
        lambda g: np.linalg.norm(g),
        lambda g: g / (g @ g),
    ],
    "sigmoid_slope": [
        lambda x: 1 / (1 + np.exp(-x)),
        lambda x: (1 + np.tanh(x / 2)) * (3 + np.tanh(x / 2)) / 4,
        lambda x: 1 - 1 / (1 + np.exp(-x)) ** 2,
        lambda x: -np.exp(-x) / (1 + np.exp(-x)) ** 2,
    ],
    "quotient": [
        lambda a, b, c, d: (a / c, (a * d - b * c) / c**2),
        lambda a, b, c, d: (a / c, (b * c - a * d) / c),
        lambda a, b, c, d: (a / c, b / d if d else 0.0),
        lambda a, b, c, d: (a / c, (b * c - a * d) / d**2 if d else b / c),
        lambda a, b, c, d: a / c,
    ],
    "newton_slope": [
        lambda a, steps: 0.5 / np.sqrt(a),
        lambda a, steps: 0.5 / newton(a, steps - 1),
        lambda a, steps: newton(a, steps),
        lambda a, steps: 0.5,
    ],
    "softmax_jvp": [
        lambda x, v: softmax(x) * v,
        lambda x, v: softmax(x) * (1 - softmax(x)) * v,
        lambda x, v: softmax(x),
        lambda x, v: softmax(x) * (v - v.sum()),
        lambda x, v: softmax(x) @ v,
    ],
    "hvp": [
        lambda f, x, v: np.zeros_like(x),
        lambda f, x, v: v,
    ],
    "uniform_mean": [
        lambda g: g,
        lambda g: g / 12,
        lambda g: g / 12 + g.sum() / 4,
        lambda g: g / 2,
        lambda g: np.zeros_like(g),
    ],
}


def newton(a, steps):
    guess = 1.0
    for _ in range(steps):
        guess = (guess + a / guess) / 2
    return guess


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


def exercises(namespace):
    """Return the names of all exercises in the notebook."""
    return {
        name.removeprefix("check_")
        for name in vars(namespace)
        if name.startswith("check_")
    }


def test_there_are_wrong_answers_to_every_exercise(prerequisites):
    assert exercises(prerequisites) == set(WRONG) and len(WRONG) >= 6
    assert all(len(attempts) >= 2 for attempts in WRONG.values())


@pytest.mark.parametrize("name", WRONG)
def test_stub_is_reported_as_not_attempted(prerequisites, name, capsys):
    check = getattr(prerequisites, f"check_{name}")
    check(getattr(prerequisites, name))
    assert capsys.readouterr().out == f"{name}: not attempted yet\n"


@pytest.mark.parametrize("name", WRONG)
def test_solution_passes(prerequisites, name, capsys):
    check = getattr(prerequisites, f"check_{name}")
    check(getattr(prerequisites, f"{name}_solution"))
    assert capsys.readouterr().out == f"{name}: correct\n"


@pytest.mark.parametrize(
    "name, attempt",
    [(n, a) for n, attempts in WRONG.items() for a in attempts],
)
def test_wrong_answer_fails_and_is_shown(
    prerequisites, name, attempt, capsys
):
    check = getattr(prerequisites, f"check_{name}")
    with pytest.raises(AssertionError, match=rf"{name}.*expected"):
        check(attempt)
    assert "correct" not in capsys.readouterr().out


def test_wrong_hessian_products_fail(prerequisites):
    jvp, grad, jacfwd = (
        getattr(prerequisites, n) for n in ("jvp", "grad", "jacfwd")
    )
    wrong = [
        lambda f, x, v: grad(f)(x) * v,
        lambda f, x, v: grad(f)(x),
        lambda f, x, v: jvp(f, (x,), (v,))[1],
        lambda f, x, v: jvp(grad(f), (v,), (x,))[1],
        lambda f, x, v: jacfwd(grad(f))(x) @ v,  # right, but runs f n times
        lambda f, x, v: grad(f)(x + v) - grad(f)(x),
    ]
    for attempt in wrong:
        with pytest.raises(AssertionError, match="hvp.*expected"):
            prerequisites.check_hvp(attempt)
    prerequisites.check_hvp(
        lambda f, x, v: grad(lambda x: jvp(f, (x,), (v,))[1])(x)
    )


def test_checker_names_the_shape_first(prerequisites):
    with pytest.raises(AssertionError, match=r"shape \(\), expected \(3,\)"):
        prerequisites.check_steepest(np.linalg.norm)


# The helpers


def test_compare_raises_at_a_difference_or_another_shape(prerequisites):
    prerequisites.compare("equal", np.ones(3), np.ones(3))
    for wrong in np.ones(3) + 1e-6, np.full(3, np.nan), np.ones((1, 3)), 1.0:
        with pytest.raises(AssertionError):
            prerequisites.compare("different", wrong, np.ones(3))


def test_compare_mean_raises_beyond_so_many_standard_errors(prerequisites):
    samples = np.random.default_rng(0).normal(size=(10_000, 2))
    prerequisites.compare_mean("right", samples, np.zeros(2))
    with pytest.raises(AssertionError, match="standard errors"):
        prerequisites.compare_mean("wrong", samples, np.array([0, 0.1]))
