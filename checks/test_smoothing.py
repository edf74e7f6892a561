"""control/: the statistics without bias, averaged over steps, and how surely the noise scale is known by them.

Random numbers with known V, Σ and G stand in for gradients.
"""

import math

import numpy as np
import pytest

from adadagrad import control
from tests import AugmentedInnerProductTest, InnerProductTest, Moments, NormTest, Statistics


def gradients_of(rng, b: int, mean: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """b per-sample gradients: mean G, covariance diag(scales²)."""
    return mean + scales * rng.standard_normal((b, len(mean)))


def moments_of(g: np.ndarray) -> Moments:
    """By the definitions."""
    b, mean = len(g), g.mean(0)
    products, norms = g @ mean, (g**2).sum(1)
    apart = np.array([g[i] @ np.delete(g, i, 0).mean(0) for i in range(b)])
    return Moments(
        b, b, float(mean @ mean), float(norms.sum()), float((products**2).sum()), float(products.sum()),
        float((apart**2).sum()),
    )  # fmt: skip


def constant_moments(b: int, variance: float, signal: float) -> Moments:
    """Whose unbiased statistics are these."""
    grad_norm_sq = signal + variance / b
    return Moments(b, b, grad_norm_sq, (b - 1) * variance + b * grad_norm_sq)


MEAN = np.zeros(20)
MEAN[:2] = 0.3, -0.2  # ‖G‖² = 0.13
SCALES = np.linspace(0.5, 1.5, 20)
VARIANCE = float((SCALES**2).sum())  # 21.8: the noise scale is 168


@pytest.mark.parametrize("b", [4, 16, 64])
def test_unbiased_ratio_is_right_where_the_published_one_saturates(b):
    rng = np.random.default_rng(0)
    many = [moments_of(gradients_of(rng, b, MEAN, SCALES)) for _ in range(20_000 // b)]
    signals = np.array([m.statistics(unbiased=True).grad_norm_sq for m in many])
    assert abs(signals.mean() - MEAN @ MEAN) < 4 * signals.std() / math.sqrt(len(many))
    noise_scale = np.mean([m.variance for m in many]) / signals.mean()
    spread = 4 * signals.std() / math.sqrt(len(many)) / (MEAN @ MEAN)
    assert noise_scale == pytest.approx(VARIANCE / (MEAN @ MEAN), rel=spread + 0.02)
    published = np.mean([m.variance for m in many]) / np.mean([m.grad_norm_sq for m in many])
    assert published < 1.02 * b and published < 0.5 * noise_scale


@pytest.mark.parametrize("b", [4, 16])
def test_what_the_spread_of_leave_one_out_products_contains(b):
    """Var q_i = GᵀΣG + tr(Σ²)/(b − 1), and their mean is ‖G‖²: measured, as the docstring says."""
    rng = np.random.default_rng(1)
    many = [moments_of(gradients_of(rng, b, MEAN, SCALES)) for _ in range(6000)]
    products = np.array([m.sum_leave_one_out_sq / b for m in many])  # E q² = Var q + ‖G‖⁴
    expected = MEAN**2 @ SCALES**2 + (SCALES**4).sum() / (b - 1) + (MEAN @ MEAN) ** 2
    assert abs(products.mean() - expected) < 5 * products.std() / math.sqrt(len(many))


def test_unbiased_products_have_all_of_the_signals_part():
    """Of eight groups a leave-one-out product has 6/7 of it; noise so small that its own part is none."""
    rng = np.random.default_rng(4)
    many = [moments_of(gradients_of(rng, 8, MEAN, 1e-3 * SCALES)).statistics(unbiased=True) for _ in range(4000)]
    expected = MEAN**2 @ (1e-3 * SCALES) ** 2
    assert np.mean([own.variance_inner_product for own in many]) == pytest.approx(expected, rel=0.05)
    assert not moments_of(gradients_of(rng, 2, MEAN, SCALES)).statistics(unbiased=True).is_usable


def test_identity_of_the_unbiased_variances():
    moments = moments_of(gradients_of(np.random.default_rng(3), 64, 3 * MEAN, SCALES))
    statistics = moments.statistics(unbiased=True)
    assert statistics.grad_norm_sq > 0
    orthogonal = statistics.variance_orthogonality
    assert statistics.variance == pytest.approx(
        orthogonal + statistics.variance_inner_product / statistics.grad_norm_sq
    )
    for test in (InnerProductTest(0.05), AugmentedInnerProductTest(0.3, 0.3)):
        assert test(statistics).passed is False


def test_negative_signal_decides_nothing():
    statistics = Statistics(16, 16, -0.1, 5.0)
    decision = NormTest(1.0)(statistics)
    assert decision.passed is None and "the gradient is too noisy" in decision.reason and statistics.noise_scale is None


@pytest.mark.parametrize("b", [8, 32, 256])
def test_half_life_is_counted_in_samples(b):
    """After 1,024 samples of another kind a half-life of 1,024 leaves half of the old, whatever the batch size."""
    smoothing, samples = control.Smoothing(1024, unbiased=True), 0
    for _ in range(100_000 // b):
        smoothing.add(constant_moments(b, 10.0, 1.0), b)
    while samples < 1024:
        statistics = smoothing.add(constant_moments(b, 20.0, 3.0), b)
        samples += b
    assert statistics.variance == pytest.approx(15.0, rel=1e-6)
    assert statistics.grad_norm_sq == pytest.approx(2.0, rel=1e-6)


def test_half_life_has_four_measurements_at_least():
    """Batches larger than the half-life are averaged over four, too, however many samples that is."""
    smoothing = control.Smoothing(1024, unbiased=True)
    for kind in [(10.0, 1.0)] * 200 + [(20.0, 3.0)] * 4:
        statistics = smoothing.add(constant_moments(4096, *kind), 5 * 4096)
    assert statistics.variance == pytest.approx(15.0, rel=1e-6)
    assert statistics.grad_norm_sq == pytest.approx(2.0, rel=1e-6)


def test_first_measurement_counts_in_full_and_bad_ones_not_at_all():
    smoothing = control.Smoothing(10_000, unbiased=True)
    assert smoothing.add(constant_moments(16, 5.0, 2.0), 16).variance == pytest.approx(5.0)
    before = smoothing.state_dict()
    assert not smoothing.add(Moments(16, 16, math.nan, math.inf), 16).is_usable
    assert smoothing.state_dict() == before | {"samples": 32}


def test_a_young_average_forgets_as_fast_as_the_run_ages():
    """Of a ‖G‖² that falls with the square of the samples, the average is a few times the present one."""
    smoothing, samples = control.Smoothing(10**6, unbiased=True), 0
    for _ in range(250):
        samples += 16
        statistics = smoothing.add(constant_moments(16, 1.0, samples**-2.0), 16)
    assert 1 < statistics.grad_norm_sq * samples**2 < 5


def test_a_noisy_batch_leaves_the_augmented_test_able_to_decide():
    """‖ḡ‖² − V/b < 0: V_orth is no number of that batch, and one of the averages."""
    rng = np.random.default_rng(5)
    few = [moments_of(gradients_of(rng, 4, MEAN, SCALES)) for _ in range(400)]
    assert any(m.statistics(unbiased=True).grad_norm_sq < 0 for m in few)
    smoothing = control.Smoothing(2000, unbiased=True)
    for m in few:
        statistics = smoothing.add(m, 4)
        assert all(math.isfinite(value) for value in smoothing.averages.values())
    assert statistics.grad_norm_sq > 0 and AugmentedInnerProductTest(0.5, 0.5)(statistics).passed is False


@pytest.mark.parametrize("d, b, signal", [(20, 16, 0.01), (20, 16, 0.1), (100, 16, 0.01), (20, 64, 0.1)])
@pytest.mark.parametrize("measurements", [3, 8, 30])
def test_interval_of_the_noise_scale_covers_the_truth(d, b, signal, measurements):
    """In nine runs of ten, and on the side that growth goes by in nineteen of twenty (within the error of 200 runs)."""
    scales, mean = np.linspace(0.5, 1.5, d), np.zeros(d)
    mean[:3] = math.sqrt(signal * (scales**2).sum() / 3)
    truth, rng, inside, safe = 1 / signal, np.random.default_rng(0), 0, 0
    for _ in range(200):
        smoothing = control.Smoothing(5000, unbiased=True)
        for _ in range(measurements):
            g = gradients_of(rng, b, mean, scales)
            ghat = g.mean(0)
            statistics = smoothing.add(Moments(b, b, float(ghat @ ghat), float((g**2).sum())), b)
        low, high = statistics.noise_scale_interval
        inside += 0.9 * low <= truth <= 1.1 * high  # V is known to a tenth or better here
        safe += 0.95 * low <= truth
    assert inside >= 0.85 * 200 and safe >= 0.9 * 200
