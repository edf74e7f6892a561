"""tests.py: formulas, edge cases, and a Monte-Carlo check against a problem whose variance is known."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tests
from tests import Moments


def moments_of(vectors: torch.Tensor, sizes: list[int] | None = None) -> Moments:
    """From group means (K, P) and group sizes, as an estimator would measure them."""
    vectors = vectors.double()
    m = torch.tensor(sizes or [1] * len(vectors), dtype=torch.float64)
    mean = (m[:, None] * vectors).sum(0) / m.sum()
    inner = vectors @ mean
    return Moments(
        batch_size=int(m.sum()),
        num_groups=len(vectors),
        grad_norm_sq=float(mean.dot(mean)),
        sum_norm_sq=float((m * vectors.square().sum(1)).sum()),
        sum_inner_sq=float((m * inner.square()).sum()),
        sum_inner=float((m * inner).sum()),
    )


def test_written_out_example():
    """Gradients (1, 0), (3, 0), (2, 2), (2, −2): ḡ = (2, 0), V = 10/3, p = (2, 6, 4, 4), V_ip = 8/3, V_orth = 8/3."""
    m = moments_of(torch.tensor([[1.0, 0], [3, 0], [2, 2], [2, -2]]))
    assert m.grad_norm_sq == 4 and m.variance == pytest.approx(10 / 3)
    assert m.variance_inner_product == pytest.approx(8 / 3)
    assert m.variance_orthogonality == pytest.approx(8 / 3)
    assert m.batch_noise_scale == pytest.approx(10 / 12)
    assert tests.NormTest(0.1)(m) == tests.Decision(False, 84)  # ⌈(10/3) / 0.04⌉
    assert tests.InnerProductTest(0.1)(m) == tests.Decision(False, 17)  # ⌈(8/3) / 0.16⌉
    assert tests.AugmentedInnerProductTest(0.1, 0.2)(m) == tests.Decision(False, 17)  # ⌈(8/3) / 0.16⌉ both ways
    assert tests.AugmentedInnerProductTest(0.1, 0.1)(m) == tests.Decision(False, 67)
    assert tests.NormTest(1.0)(m) == tests.Decision(True, 4)


def test_inner_products_that_hardly_differ():
    """V_ip of p_i measured in float32, a relative rounding of 1e-7 away from ‖ḡ‖²: about their own mean it is exact."""
    p = 0.7 + 1e-4 * torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    m = Moments(8, 8, float(p.mean()) * (1 + 1e-7), 9.0, float(p.square().sum()), float(p.sum()))
    assert m.variance_inner_product == pytest.approx(float(p.var()), rel=1e-6)


@given(st.integers(2, 9), st.integers(1, 6), st.integers(0, 2**31))
def test_variance_splits_into_parallel_and_orthogonal(n, p, seed):
    m = moments_of(torch.randn(n, p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    total = m.variance_orthogonality + m.variance_inner_product / m.grad_norm_sq
    assert m.variance == pytest.approx(total, rel=1e-7, abs=1e-12)
    assert m.sum_inner == pytest.approx(m.batch_size * m.grad_norm_sq, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    "moments, words",
    [
        (Moments(1, 1, 1.0, 1.0, 1.0), "two observations"),
        (Moments(64, 1, 1.0, 64.0, 64.0), "two observations"),
        (Moments(4, 4, 0.0, 8.0, 0.0), "gradient is zero"),
        (Moments(4, 4, math.nan, 8.0, 1.0), "not finite"),
        (Moments(4, 4, 1.0, math.inf, math.inf), "not finite"),
    ],
)
@pytest.mark.parametrize("test", [tests.NormTest(), tests.InnerProductTest(), tests.AugmentedInnerProductTest()])
def test_no_decision_on_unusable_numbers(moments, words, test):
    decision = test(moments)
    assert decision.passed is None and decision.next_batch_size == moments.batch_size and words in decision.reason


@pytest.mark.parametrize("value", [0, -0.1, math.nan, math.inf])
def test_thresholds_must_be_positive(value):
    for create in (tests.NormTest, tests.InnerProductTest, lambda nu: tests.AugmentedInnerProductTest(0.1, nu)):
        with pytest.raises(ValueError, match="must be a positive number"):
            create(value)


def test_inner_products_must_be_measured():
    with pytest.raises(ValueError, match="inner_products=True"):
        tests.InnerProductTest()(Moments(4, 4, 1.0, 8.0))


@pytest.mark.parametrize("sizes", [[1] * 512, [8] * 64, [3, 5, 8, 16] * 16])
def test_next_batch_size_matches_closed_form(sizes):
    """g_i ~ N(μ, Σ), Σ diagonal: V = tr Σ, V_ip = μᵀΣμ, V_orth = tr Σ − μᵀΣμ/‖μ‖², whatever the groups."""
    generator = torch.Generator().manual_seed(7)
    mu = torch.tensor([3.0, -1.0, 0.5, 0.0, 2.0], dtype=torch.float64)
    sigma_sq = torch.tensor([1.0, 4.0, 0.25, 2.0, 9.0], dtype=torch.float64)
    mu_sq = float(mu.dot(mu))
    v, v_ip = float(sigma_sq.sum()), float((sigma_sq * mu.square()).sum())
    exact = {
        tests.NormTest(0.01): v / (0.01**2 * mu_sq),
        tests.InnerProductTest(0.01): v_ip / (0.01**2 * mu_sq**2),
        tests.AugmentedInnerProductTest(1.0, 0.01): (v - v_ip / mu_sq) / (0.01**2 * mu_sq),
    }
    asked = {test: [] for test in exact}
    scale = (sigma_sq / torch.tensor(sizes, dtype=torch.float64)[:, None]).sqrt()
    for _ in range(400):
        means = mu + scale * torch.randn(len(sizes), 5, generator=generator, dtype=torch.float64)
        for test, sizes_asked in asked.items():
            sizes_asked.append(test(moments_of(means, sizes)).next_batch_size)
    for test, expected in exact.items():
        sample = torch.tensor(asked[test], dtype=torch.float64)
        standard_error = float(sample.std() / len(sample) ** 0.5)
        bias = 3 * expected / sum(sizes)  # E[1/‖ḡ‖²] ≠ 1/‖μ‖²: a term of order 1/b, and the rounding up
        assert abs(float(sample.mean()) - expected) < 5 * standard_error + bias + 1, test
