"""The statistical tests: gradient moments in, decision out. Pure arithmetic on Python floats (float64).

    moments = adadagrad.moments(model, loss, inputs, targets)
    decision = adadagrad.NormTest(eta=0.1)(moments)
    batch_size = decision.next_batch_size

Sources: norm test, Byrd, Chin, Nocedal, Wu (Math. Program. 134, 2012), section 3; inner product, orthogonality and
augmented tests, Bollapragada, Byrd, Nocedal (SIAM J. Optim. 28(4), 2018), sections 2 and 3; their use with adaptive
gradient methods, Lau, Liu, Kolar (arXiv:2402.11215).
"""

import math
from dataclasses import asdict, dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Moments:
    """What a test needs to know of b samples that were observed as K groups with mean gradients ḡ_1 … ḡ_K.

    Group k has m_k samples; single samples are groups of one (K = b). ḡ is the mean over all b samples,
    p_k = ⟨ḡ_k, ḡ⟩. All sums run over the whole global batch and all parameters as one vector.

    Args:
        batch_size: b, the number of samples.
        num_groups: K, the number of groups.
        grad_norm_sq: ‖ḡ‖².
        sum_norm_sq: Σ m_k ‖ḡ_k‖².
        sum_inner_sq: Σ m_k p_k²; None where it was not measured (the norm test does not need it).
        sum_inner: Σ m_k p_k; equals b‖ḡ‖² up to rounding, and stands for it where it was not measured.
        sum_leave_one_out_sq: Σ m_k q_k², where q_k = ⟨ḡ_k, mean of all other samples⟩ = (b·p_k − m_k‖ḡ_k‖²)/(b − m_k);
            None where it was not measured.
    """

    batch_size: int
    num_groups: int
    grad_norm_sq: float
    sum_norm_sq: float
    sum_inner_sq: float | None = None
    sum_inner: float | None = None
    sum_leave_one_out_sq: float | None = None

    @property
    def variance(self) -> float:
        """V: the trace of the per-sample gradient covariance, unbiased for groups of any size."""
        return self._per_degree_of_freedom(self.sum_norm_sq - self.batch_size * self.grad_norm_sq)

    @property
    def variance_inner_product(self) -> float | None:
        """V_ip: the sample variance of p_i = ⟨g_i, ḡ⟩."""
        if self.sum_inner_sq is None:
            return None
        # About the mean of the p_i as measured, not about ‖ḡ‖²: in float32 the two differ by a rounding that can be
        # thousands of times V_ip where the p_i hardly differ.
        mean = self.grad_norm_sq if self.sum_inner is None else self.sum_inner / self.batch_size
        return self._per_degree_of_freedom(self.sum_inner_sq - self.batch_size * mean**2)

    @property
    def variance_orthogonality(self) -> float | None:
        """V_orth: the variance of the part of g_i that is orthogonal to ḡ. V = V_orth + V_ip / ‖ḡ‖²."""
        if self.sum_inner_sq is None:
            return None
        if self.grad_norm_sq == 0:
            return math.nan
        return self._per_degree_of_freedom(self.sum_norm_sq - self.sum_inner_sq / self.grad_norm_sq)

    @property
    def batch_noise_scale(self) -> float:
        """V / ‖ḡ‖² [samples]: of this batch, and biased; where noise dominates it is about b. See `Statistics`."""
        return self.variance / self.grad_norm_sq if self.grad_norm_sq else math.nan

    def statistics(self, unbiased: bool = False) -> "Statistics":
        """What a test compares.

        Args:
            unbiased: E‖ḡ‖² = ‖G‖² + V/b, so ‖ḡ‖² − V/b takes the place of ‖ḡ‖² (for one batch it may be negative), and
                the leave-one-out products q_k, whose mean it is, that of the p_k, which contain ‖ḡ_k‖² of the group
                itself. A group is also in the mean of the others' others, so that q_k has only (K − 2)/(K − 1) of the
                signal's part ⟨G, ḡ_k − G⟩: allowed for. Var q_k is still more than GᵀΣG, what a test of many samples
                would find: by about tr(Σ²)/(b − 1). Two groups have one q between them: V_ip is not a number then.
        """
        if not unbiased:
            variances = self.variance, self.variance_inner_product, self.variance_orthogonality
            return Statistics(self.batch_size, self.num_groups, self.grad_norm_sq, *variances)
        signal = self.grad_norm_sq - self.variance / self.batch_size
        of_products = None
        if self.sum_leave_one_out_sq is not None:
            of_products = self._per_degree_of_freedom(self.sum_leave_one_out_sq - self.batch_size * signal**2)
            k = self.num_groups
            of_products = of_products * ((k - 1) / (k - 2)) ** 2 if k > 2 else math.nan
        return Statistics.from_averages(self.batch_size, self.num_groups, signal, self.variance, of_products)

    def _per_degree_of_freedom(self, sum_of_squares: float) -> float:
        # Rounding can leave a sum of squares a little below zero where all gradients agree.
        return max(sum_of_squares, 0.0) / (self.num_groups - 1) if self.num_groups > 1 else math.nan


@dataclass(frozen=True)
class Statistics:
    """What a test compares: of one batch, or averaged over several.

    Args:
        batch_size: b, of the present batch.
        num_groups: K, the observations in it.
        grad_norm_sq: ‖ḡ‖², or the unbiased estimate of ‖G‖².
        variance: V.
        variance_inner_product: V_ip, None where it was not measured.
        variance_orthogonality: V_orth, likewise.
        margin: half of the two-sided 90 % interval of ‖G‖², None where it is not known.
    """

    batch_size: int
    num_groups: int
    grad_norm_sq: float
    variance: float
    variance_inner_product: float | None = None
    variance_orthogonality: float | None = None
    margin: float | None = None

    @classmethod
    def from_averages(
        cls,
        batch_size: int,
        num_groups: int,
        grad_norm_sq: float,
        variance: float,
        variance_inner_product: float | None = None,
        margin: float | None = None,
    ) -> "Statistics":
        """V_orth by V = V_orth + V_ip/‖G‖², for numbers that were averaged apart; not a number where ‖G‖² ≤ 0."""
        rest = None
        if variance_inner_product is not None:
            rest = max(variance - variance_inner_product / grad_norm_sq, 0.0) if grad_norm_sq > 0 else math.nan
        return cls(batch_size, num_groups, grad_norm_sq, variance, variance_inner_product, rest, margin)

    @property
    def is_usable(self) -> bool:
        """More than one observation, and finite in all that is averaged."""
        averaged = (self.grad_norm_sq, self.variance, self.variance_inner_product or 0.0)
        return self.num_groups > 1 and all(map(math.isfinite, averaged))

    @property
    def noise_scale(self) -> float | None:
        """V / ‖G‖² [samples], the simple gradient noise scale (McCandlish et al., arXiv:1812.06162); None where the
        estimate of ‖G‖² is not positive. Says what its name says of unbiased, averaged statistics only."""
        return self.variance / self.grad_norm_sq if self.grad_norm_sq > 0 else None

    @property
    def noise_scale_interval(self) -> tuple[float, float] | None:
        """The noise scale's two-sided 90 % interval [samples], V being well known; the upper end may be infinite."""
        if self.margin is None:
            return None
        ends = (self.grad_norm_sq + self.margin, self.grad_norm_sq - self.margin)
        low, high = (self.variance / signal if signal > 0 else math.inf for signal in ends)
        return low, high

    @property
    def is_narrow(self) -> bool:
        """The noise scale is known to a half or better."""
        return self.margin is not None and self.margin < 0.5 * self.grad_norm_sq

    @property
    def safe(self) -> "Statistics":
        """With ‖G‖² at the upper end of its interval: a batch or a rate by these does not grow by what is not known."""
        if self.margin is None:
            return self
        return Statistics.from_averages(
            self.batch_size,
            self.num_groups,
            self.grad_norm_sq + self.margin,
            self.variance,
            self.variance_inner_product,
        )


@dataclass(frozen=True)
class Decision:
    """A test's answer.

    Args:
        passed: True where the batch is large enough, False where it is not, None where nothing can be decided.
        next_batch_size: the batch size the test asks for (the present one where it passed or could not decide).
        reason: why nothing could be decided; empty otherwise.
    """

    passed: bool | None
    next_batch_size: int
    reason: str = ""


def _decide(moments: Statistics | Moments, ratios: dict[str, float]) -> Decision:
    """Compare batch sizes: each test fails where the size it asks for, variance / bound, exceeds b.

    Args:
        moments: of the present batch, or its statistics.
        ratios: test name to the (real-valued) batch size at which the test would just pass.
    """
    b = moments.batch_size
    if b < 2 or moments.num_groups < 2:
        return Decision(None, b, "a variance needs at least two observations")
    if moments.grad_norm_sq == 0:
        return Decision(None, b, "the batch gradient is zero")
    if moments.grad_norm_sq < 0:
        return Decision(None, b, "the gradient is too noisy: the estimate of ‖G‖² is negative")
    unusable = [name for name, ratio in ratios.items() if not math.isfinite(ratio)]
    if unusable:
        return Decision(None, b, f"the {unusable[0]} statistics are not finite")
    needed = max(ratios.values())
    if needed <= b:
        return Decision(True, b)
    return Decision(False, math.ceil(needed))


def _ratio(variance: float | None, bound: float) -> float:
    if variance is None:
        raise ValueError("this test needs inner products: measure the moments with inner_products=True")
    return variance / bound if bound > 0 else math.nan


TESTS: dict[str, type["Test"]] = {}
"""By their names on the command line; every class that is made is in it."""


class Test:
    """A statistical test; its parameters are the fields of the dataclass that it is.

    Attributes:
        name: on the command line and in the names of folders.
        title: in words.
        symbols: parameter → the letter that formulas have for it.
        needs_inner_products: the moments must have Σ p_i and Σ p_i².
    """

    name: ClassVar[str]
    title: ClassVar[str]
    symbols: ClassVar[dict[str, str]]
    needs_inner_products: ClassVar[bool] = False

    def __init_subclass__(cls):
        TESTS[cls.name] = cls

    def __post_init__(self):
        for name, value in asdict(self).items():
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a positive number, not {value}")

    def __call__(self, moments: Statistics | Moments) -> Decision:
        raise NotImplementedError

    def __str__(self) -> str:
        """For example "norm test, η = 0.1"."""
        return ", ".join([self.title, *(f"{self.symbols[name]} = {value:g}" for name, value in asdict(self).items())])

    @property
    def label(self) -> str:
        """For the name of a folder, such as norm_eta0.1."""
        return "_".join([self.name, *(f"{name}{value:g}" for name, value in asdict(self).items())])


@dataclass(frozen=True)
class NormTest(Test):
    """Fails when V/b > η²‖ḡ‖² and then asks for ⌈V / (η²‖ḡ‖²)⌉ samples (arXiv:2402.11215, eq. for the norm test).

    Raises:
        ValueError: η is not positive.
    """

    name, title, symbols = "norm", "norm test", {"eta": "η"}
    eta: float = 0.1

    def __call__(self, moments: Statistics | Moments) -> Decision:
        return _decide(moments, {"norm test": _ratio(moments.variance, self.eta**2 * moments.grad_norm_sq)})


@dataclass(frozen=True)
class InnerProductTest(Test):
    """Fails when V_ip/b > θ²‖ḡ‖⁴ and then asks for ⌈V_ip / (θ²‖ḡ‖⁴)⌉ samples.

    Raises:
        ValueError: θ is not positive.
    """

    name, title, symbols = "ip", "inner product test", {"theta": "θ"}
    needs_inner_products = True
    theta: float = 0.1

    def ratio(self, moments: Statistics | Moments) -> float:
        return _ratio(moments.variance_inner_product, self.theta**2 * moments.grad_norm_sq**2)

    def __call__(self, moments: Statistics | Moments) -> Decision:
        return _decide(moments, {"inner product test": self.ratio(moments)})


@dataclass(frozen=True)
class AugmentedInnerProductTest(Test):
    """The inner product test (θ) and the orthogonality test (ν): fails when either does, asks for the larger size.

    The orthogonality test fails when V_orth/b > ν²‖ḡ‖² and asks for ⌈V_orth / (ν²‖ḡ‖²)⌉ samples.

    Raises:
        ValueError: θ or ν is not positive.
    """

    name, title, symbols = "ip+orth", "augmented inner product test", {"theta": "θ", "nu": "ν"}
    needs_inner_products = True
    theta: float = 0.1
    nu: float = 0.1

    def __call__(self, moments: Statistics | Moments) -> Decision:
        orthogonality = _ratio(moments.variance_orthogonality, self.nu**2 * moments.grad_norm_sq)
        inner_product = InnerProductTest(self.theta).ratio(moments)
        return _decide(moments, {"inner product test": inner_product, "orthogonality test": orthogonality})


OTHER_SCALES = ("optimizer", "optimizer_squared", "l1", "curvature")
"""Names of noise scales that weight directions otherwise than V/‖G‖² (gradients/noise_scales.py)."""
MEASURED = ("variance", "variance_inner_product", "variance_orthogonality", "grad_norm_sq", "batch_noise_scale")
"""What a row of metrics.csv says of a measured batch: properties of its `Moments`."""
