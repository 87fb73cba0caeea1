"""fwdgrad's exercises: the checker is right about right and wrong answers."""

import math

import pytest
import torch
from conftest import code_cells, lift, read

WRONG = [
    ("sign_variance", lambda a: a.square().sum() + a.square()),
    ("useless", lambda count, n, g: torch.randn(count, n, generator=g)),
    ("useless", lambda count, n, g: 9 * torch.randn(count, n, generator=g)),
    (
        "orthogonal",
        lambda c, k, n, g: n**0.5 * torch.eye(n)[:k].repeat(c, 1, 1),
    ),
    ("orthogonal", lambda c, k, n, g: torch.randn(c, k, n, generator=g)),
    ("best_probabilities", lambda d, norms: d / d.sum()),
    ("best_probabilities", lambda d, norms: d.sqrt() * norms),
    ("repaired", lambda u: (math.sqrt(12) * (u - 0.5), u.shape[1] + 2)),
    ("repaired", lambda u: (u, (u[:, :1] * u).square().sum(1).mean())),
    ("corrected_variance", lambda d, g: len(d) * (d - g).square().sum()),
    ("guess_factor", lambda q, cosine: 1 - q * cosine),
    ("corrected_products", lambda layers: 4 * layers - 1),
    ("step_tangent", lambda H, x, t, rate, change: t - rate * (H @ t)),
    ("bytes_times_noise", lambda n, workers, k: 8 * (n - 1) / k),
]
NAMES = [*lift("fwdgrad").EXERCISES]


def judge(fwdgrad, name, attempt):
    attempt.__name__ = name
    fwdgrad.check(attempt, *fwdgrad.EXERCISES[name])


@pytest.mark.parametrize("name", NAMES)
def test_solutions_pass_and_open_exercises_are_open(fwdgrad, name, capsys):
    judge(fwdgrad, name, getattr(fwdgrad, f"{name}_solution"))
    judge(fwdgrad, name, getattr(fwdgrad, name))
    said = capsys.readouterr().out
    assert said == f"{name}: correct\n{name}: not attempted yet\n"


@pytest.mark.parametrize("name, wrong", WRONG)
def test_wrong_answers_raise_and_say_where(fwdgrad, name, wrong):
    with pytest.raises(AssertionError, match=name):
        judge(fwdgrad, name, wrong)
    with pytest.raises((AssertionError, RuntimeError, TypeError)):
        judge(fwdgrad, name, lambda *case: torch.zeros(2, 3, 5))


def test_every_solution_is_checked_in_the_notebook():
    assert {name for name, _ in WRONG} == {*NAMES}
    source = "\n".join(c.source for c in code_cells(read("fwdgrad")))
    assert all(f"def {name}_solution" in source for name in NAMES)
    assert "check(globals()" in source
