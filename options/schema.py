"""Every option: its name, type, default and unit, and which combinations are refused.

`Config` is one dataclass made of one class per topic. How a user's words become one: command_line.py.
"""

import math
import re
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from adadagrad.control import CRITICAL, RULES
from adadagrad.tests import OTHER_SCALES, TESTS
from options.errors import UsageError
from options.names import expanded, unknown
from options.schedules import rule_class, test_parameters

MEASURED_SCALINGS = ("adascale", "critical")
"""Values of lr_scaling that read the statistics."""
KINDS = ("bias", "norm", "embedding")
"""Kinds of parameters, for no_weight_decay."""


@dataclass
class DataOptions:
    """Data"""

    dataset: str = "digits"
    """digits, mnist, fashion_mnist, cifar10, cifar100, imagenet, tokens (train.bin and val.bin in data_dir), stdlib
    (Python's own sources, as bytes), or an import path package.module:function"""
    data_dir: Path = Path("data")
    """folder of the data sets; official archives there are unpacked, what is missing is downloaded into it"""
    shuffle: bool = True
    """a new random order of the training set every epoch"""
    num_workers: int = 0
    """worker processes a device that read data sets which do not fit in memory (in-memory data sets need none); 0: the
    training process reads"""
    dataset_args: dict[str, Any] = field(default_factory=dict)
    """further arguments of the data set, as --dataset_args.NAME=VALUE; text has sequence_length, the tokens that a
    sample predicts (256), and vocab_size (as meta.json in data_dir says)"""
    loss: str | None = None
    """import path package.module:function of the loss, (outputs, targets) → the samples' losses (n,) or their mean;
    default: the data set's own"""


@dataclass
class ModelOptions:
    """Model"""

    model: str = "cnn"
    """logistic, cnn, any torchvision classifier (resnet18, vit_b_16, …), gpt for text, or an import path
    package.module:function"""
    model_args: dict[str, Any] = field(default_factory=dict)
    """further arguments of the model, as --model_args.NAME=VALUE; gpt has layers, heads, width, dropout, mlp,
    positions, tied, bias"""
    compile: bool = False
    """compile the model by torch.compile"""


@dataclass
class BatchOptions:
    """Batch size"""

    batch_size: int = 16
    """initial global batch size [samples, over all devices]; in stages it is the first of them"""
    max_batch_size: int | None = None
    """largest global batch size [samples]; default: the size of the training set, or the largest stage"""
    max_micro_batch_size: int | Literal["auto"] = "auto"
    """most samples a device processes at once; larger batches are accumulated [samples per device]; auto: the smallest
    size that is about as quick as any and fits into the device's memory, measured before the training"""
    eval_micro_batch_size: int | Literal["auto"] = "auto"
    """most samples a device evaluates at once; auto: measured in the same way where max_micro_batch_size is, else that
    size, at most 1024"""
    gradient_accumulation_steps: int = 1
    """least number of accumulation steps in a batch"""
    batch_size_multiple: int = 1
    """sizes are rounded up to a multiple of this [samples]; the initial and the largest size stand as they are"""
    max_growth: float | None = None
    """largest factor by which the batch grows at a time; default: no bound"""


@dataclass
class TestOptions:
    """Adaptive batch size"""

    test: bool = True
    """grow the batch by a statistical test; False: constant batch size, or one of the ramp-ups below"""
    test_type: Literal[tuple(TESTS)] = "norm"
    """norm test, inner product test, or inner product test with orthogonality test (augmented)"""
    eta: float = 1.0
    """η of the norm test: smaller means larger batches. With statistics=unbiased the batch stays at (noise scale)/η²,
    which costs 1 + 1/η² times the least possible samples and 1 + η² times the least possible steps"""
    theta: float = 1.0
    """θ of the inner product test: smaller means larger batches"""
    nu: float = 1.0
    """ν of the orthogonality test: smaller means larger batches"""
    statistics: Literal["batch", "unbiased"] = "batch"
    """batch: as published, where noise dominates ‖ḡ‖² is mostly noise itself; unbiased: without this part"""
    smoothing: float = 0.0
    """average the statistics over steps, with this half-life [samples], or of four measurements where those have more
    samples; 0: the last tested batch alone"""
    test_interval: int | Literal["auto"] = 1
    """measure, and test, every so many steps; auto: every step until the noise scale is known to a half (at most an
    eighth of the steps and 16 more), then every sixteenth"""
    monitor_interval: int = 0
    """measure the statistics every so many steps also where nothing is decided by them: in runs without a test and at
    the largest batch size; 0: do not. A network with BatchNorm is watched by micro_batch"""
    monitor_modules: bool = False
    """write the statistics of every module's own parameters to modules.csv, too, by ghost or micro_batch"""
    monitor_metrics: list[Literal[OTHER_SCALES]] = field(default_factory=list)
    """measure other noise scales in the same steps, too, by per-sample gradients: in the optimizer's metric (weights
    1/√v or, optimizer_squared, 1/v), of l1 norms, weighted by the curvature; as [optimizer,curvature]"""
    test_gradients: Literal["auto", "ghost", "vmap", "loop", "micro_batch", "worker"] = "auto"
    """where the statistics come from. ghost: exact, norms without per-sample gradients; vmap: exact, per-sample
    gradients by torch.func; loop: exact, one backward pass a sample; micro_batch: variance between micro-batches;
    worker: likewise, with a tested step cut as any other (DDP-Norm, FSDP-Norm); auto: the first of ghost, vmap and loop
    that agrees with single samples; where a model couples samples (BatchNorm), micro_batch, but for the published
    rule"""
    test_groups: int = 8
    """least number of micro-batches, over all devices, into which micro_batch cuts a tested batch"""
    recheck: bool = True
    """compare a few samples of the 2nd, 20th, 200th, … measured step with single samples again, as before the first
    step; where they differ, the next of ghost, vmap and loop takes over"""
    max_test_micro_batch_size: int = 256
    """most samples of a device in a pass of the test's own [samples per device]"""
    ramp_up_type: str = "test"
    """test: where the test fails, take the size that it asks for; factor: multiply the batch size by ramp_up_factor
    there; goodput: no test, but the size with the most progress a second, √(critical · noise scale · knee), by the
    steps' times; or an import path package.module:Class of a control.Rule"""
    ramp_up_factor: float = 2.0
    """factor of ramp_up_type=factor"""
    may_shrink: bool = False
    """ramp_up_type=goodput may also make the batch smaller"""
    knee: float | None = None
    """of ramp_up_type=goodput: the batch whose samples take as long as the fixed part of a step [samples]; default: as
    the steps' times say. With a number, the sizes do not depend on times"""
    critical: float = CRITICAL
    """of ramp_up_type=goodput and lr_scaling=critical: the critical batch size, in noise scales, as critical.py
    measures it"""
    max_waste: float | None = None
    """of ramp_up_type=goodput: W, a bound on the samples: the batch stays where the run takes at most 1 + W times the
    least possible ones, W critical batch sizes; default: 10"""
    free_start: bool = False
    """of ramp_up_type=goodput: begin with an eighth of the knee where that is more than batch_size, as a step takes
    hardly longer for it; the learning rate begins at that of batch_size and follows what is measured"""
    recipe: Literal["paper", "steady"] | None = None
    """paper: the published rule. steady: unbiased, smoothed statistics, goodput, a learning rate that follows,
    a free start, growth at most fourfold at a time and by what is known for sure, at most twice the least
    possible samples. Options that are given stand above it; default:
    paper where test_type, eta, theta, nu or ramp_up_type is given or there is no test, else steady"""


@dataclass
class RampOptions:
    """Ramp-up without a test (needs --test=False)"""

    stagewise_ramp_up: bool = False
    """use the sizes in global_batch_sizes one after the other"""
    global_batch_sizes: list[int] = field(default_factory=list)
    """batch sizes of the stages [samples]"""
    samples_stages: list[int | str] = field(default_factory=list)
    """length of each stage [samples, or as 25% of the run]; default: equal lengths"""
    linear_ramp_up: bool = False
    """add linear_ramp_up_increment to the batch size at every step"""
    linear_ramp_up_increment: int = 256
    """increment of linear_ramp_up [samples per step]"""
    seesaw_ramp_up: bool = False
    """where the schedule lowers the learning rate by a factor, the batch grows by it and the learning rate falls by its
    square root"""


@dataclass
class OptimizerOptions:
    """Optimizer"""

    optimizer: str = "adam"
    """adagrad, adagradnorm, adam, adamw, muon (for the matrices of hidden layers, AdamW for the rest), sgd, sgdm, any
    torch.optim class, or an import path package.module:Class"""
    learning_rate: float | None = None
    """learning rate; with decay_lr=True its peak; default: 0.01; of tokens and stdlib 0.002"""
    weight_decay: float | None = None
    """weight decay; default: the optimizer's own, 5e-4 for sgdm"""
    momentum: float | None = None
    """momentum of SGD-like optimizers; default: the optimizer's own, 0.9 for sgdm"""
    beta1: float = 0.9
    """first coefficient of optimizers with betas, such as Adam"""
    beta2: float = 0.95
    """second coefficient of optimizers with betas, such as Adam"""
    optimizer_args: dict[str, Any] = field(default_factory=dict)
    """further arguments of the optimizer, as --optimizer_args.NAME=VALUE"""
    grad_clip: float = 0.0
    """clip the norm of the batch gradient at this value; 0: do not clip"""
    weight_average: float = 0.0
    """average the weights with this half-life [samples]; evaluations are of the average, and model_average.pt has it;
    0: do not"""
    lr_scaling: Literal["none", "sqrt", "linear", "adascale", "critical"] = "none"
    """how the learning rate follows the batch size b, on top of the schedule, from the initial one b₀: by √(b/b₀),
    b/b₀, or from the statistics, between 1 and b/b₀: AdaScale's gain, or that of the critical batch size, `critical`
    noise scales (the root of either for optimizers other than SGD)"""
    coupling: Literal["full", "rate", "none"] = "rate"
    """what follows the batch size by the statistics of lr_scaling=adascale or critical. full: learning rate, decoupled
    weight decay, β₂, and what the optimizer keeps of the gradients so far; rate: the learning rate; none: nothing"""
    no_weight_decay: str = ""
    """kinds of parameters without weight decay, as bias,norm,embedding"""
    lr_factors: dict[str, float] = field(default_factory=dict)
    """factors on the learning rate of parameters by their names or those of modules around them, where * stands for
    anything, as {head: 10, layers.*.bias: 0.5}; of several that fit, the product"""


@dataclass
class ScheduleOptions:
    """Learning-rate schedule"""

    decay_lr: bool = True
    """warm up and decay the learning rate; False: constant"""
    max_lr: float | None = None
    """cap on the learning rate, also where lr_scaling raises it; default: none"""
    scheduler: Literal["cosine", "linear", "multistep"] = "cosine"
    """form of the decay after the linear warm-up"""
    lr_decay_type: Literal["sample", "iter"] | None = None
    """what the schedule counts: samples or iterations (steps); default: as training_type"""
    min_lr: float = 0.0
    """learning rate at the end of the decay"""
    warmup_samples: int = 0
    """length of the warm-up [samples]"""
    lr_decay_samples: int | None = None
    """the decay ends here [samples]; default: max_samples"""
    warmup_iters: int = 0
    """length of the warm-up [steps]"""
    lr_decay_iters: int | None = None
    """the decay ends here [steps]; default: max_iters"""
    milestones: list[int] = field(default_factory=list)
    """where scheduler=multistep multiplies the learning rate by gamma [samples or steps]"""
    gamma: float = 0.1
    """factor of scheduler=multistep"""


@dataclass
class DurationOptions:
    """Length of the run"""

    training_type: Literal["sample", "iter"] = "sample"
    """end after max_samples or after max_iters"""
    max_samples: int | None = None
    """length of the run [samples]; default: 30 epochs; of tokens, one; of stdlib, 8192 samples"""
    max_iters: int = 1000
    """length of the run with training_type=iter [steps]"""
    seed: int = 42
    """seed of everything random: weights, order, augmentation, dropout"""


@dataclass
class DeviceOptions:
    """Devices (under `fabric run`, the launcher reads these)"""

    accelerator: Literal["auto", "cpu", "gpu", "cuda"] = "auto"
    """kind of device"""
    strategy: Literal["auto", "ddp", "ddp_find_unused_parameters_true", "fsdp"] = "auto"
    """how processes work together; ddp_find_unused_parameters_true: where a step may leave out parameters; fsdp:
    parameters, gradients and optimizer states are shared out, for models that do not fit"""
    shard_modules: list[str] = field(default_factory=list)
    """of strategy=fsdp: classes whose modules are gathered one at a time; default: the model's repeated blocks"""
    launcher: Literal["auto", "env"] = "auto"
    """who has started the processes. auto: `fabric run`, torchrun or srun, as they tell, else the program itself; env:
    an operator, by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT (Kubeflow's PyTorchJob)"""
    devices: int | Literal["auto"] = "auto"
    """devices (processes) a node; auto: all GPUs, or one process on CPU"""
    num_nodes: int = 1
    """number of nodes (machines)"""
    matmul_precision: Literal["highest", "high"] = "highest"
    """of float32 products and convolutions on GPUs; high: by TF32, faster, about three decimal digits"""
    deterministic: bool = False
    """the same numbers, bit for bit, in every run on the same GPUs; slower. On CPUs runs are so anyway, but for what
    is measured where max_micro_batch_size is auto and knee says nothing"""
    timeout_minutes: float = 10.0
    """end where a process waits so long for another one [min]"""
    precision: Literal["32-true", "16-mixed", "bf16-mixed", "bf16-true", "64-true", "32", "bf16", "64"] = "32-true"
    """floating-point precision"""


@dataclass
class LogOptions:
    """Logs and results"""

    out_dir: Path = Path("out")
    """folder that takes the run folders"""
    run_name: str | None = None
    """name of the run's folder; default: model, data set, schedule or test, seed and time"""
    log_interval: int = 1
    """log every so many steps"""
    eval_interval: int = 0
    """evaluate every so many steps; 0: as eval_samples says"""
    eval_samples: int | None = None
    """evaluate whenever so many samples more were used [samples]; default: an epoch's worth; always at the end"""
    validation_samples: int | None = None
    """evaluate on so many samples of the validation set, spread evenly over it; default: all; of stdlib, 2048"""


@dataclass
class CheckpointOptions:
    """Checkpoints"""

    checkpoint_interval: int = 0
    """save a checkpoint every so many steps, too; 0: by the clock, when an evaluation is the best, at the end"""
    checkpoint_minutes: float = 10.0
    """save a checkpoint after so many minutes without one [min]; 0: not by the clock"""
    keep_checkpoints: int = 2
    """keep so many of the newest checkpoints, and the one with the best evaluation"""
    resume: str | None = None
    """auto: go on from the newest whole checkpoint of the run's folder, start where there is none (needs run_name);
    or a run's folder or checkpoint to go on from; default: start a new run"""
    branch: float | None = None
    """of resume: go on from a checkpoint with so many times its batch size, constant from there on; seed, length and
    evaluations may be other ones then. critical.py compares such branches. Default: go on as the run was"""
    branch_gain: float = 1.0
    """of branch: a step is to be branch ** branch_gain times as long, optimizer state along; 1: as many times as the
    batch is larger, as where noise dominates"""


@dataclass
class Config(
    DataOptions,
    ModelOptions,
    BatchOptions,
    TestOptions,
    RampOptions,
    OptimizerOptions,
    ScheduleOptions,
    DurationOptions,
    DeviceOptions,
    LogOptions,
    CheckpointOptions,
):
    """All options of a run."""

    def __post_init__(self):
        """Refuse what can be refused without looking at data, model or devices.

        Raises:
            UsageError: a value is out of range or options contradict each other.
        """
        self.lr_decay_type = self.lr_decay_type or self.training_type
        if self.learning_rate is None:
            self.learning_rate = 0.002 if self.dataset in ("tokens", "stdlib") else 0.01
        self._expand_paths()
        self._check_names()
        self._check_ranges()
        self._check_without_effect()
        self._check_batch_sizes()
        self._check_schedules()
        self._check_branch()
        if self.run_name is not None and (self.run_name in ("", ".", "..") or set(self.run_name) & set("/\\$\0")):
            raise UsageError(f"--run_name='{self.run_name}' must be the name of a folder: one word without '/' or '$'")

    def _expand_paths(self):
        self.data_dir, self.out_dir = expanded("data_dir", self.data_dir), expanded("out_dir", self.out_dir)
        if self.resume not in (None, "auto"):
            self.resume = str(expanded("resume", self.resume))

    def _check_names(self):
        for option in ("model", "dataset", "optimizer", "ramp_up_type"):
            if problem := unknown(option, getattr(self, option)):
                raise UsageError(problem)
        for kind in self.without_weight_decay:
            if kind not in KINDS:
                raise UsageError(f"--no_weight_decay={self.no_weight_decay}: '{kind}' is none of {', '.join(KINDS)}")

    @property
    def without_weight_decay(self) -> list[str]:
        """The kinds in no_weight_decay."""
        return [kind.strip() for kind in self.no_weight_decay.split(",") if kind.strip()]

    def _check_ranges(self):
        positive = (
            "batch_size max_batch_size max_micro_batch_size eval_micro_batch_size max_test_micro_batch_size "
            "gradient_accumulation_steps test_interval test_groups learning_rate max_lr gamma "
            "max_samples max_iters devices num_nodes log_interval linear_ramp_up_increment lr_decay_samples "
            "lr_decay_iters keep_checkpoints timeout_minutes batch_size_multiple max_waste "
            "knee critical branch eval_samples validation_samples"
        )
        not_negative = (
            "num_workers weight_decay grad_clip min_lr warmup_samples warmup_iters eval_interval momentum seed "
            "checkpoint_interval checkpoint_minutes smoothing monitor_interval branch_gain"
        )
        for name in positive.split():
            _require_range(name, getattr(self, name), "positive", lambda value: value > 0)
        for name in not_negative.split():
            _require_range(name, getattr(self, name), "zero or positive", lambda value: value >= 0)
        for name in ("beta1", "beta2"):
            _require_range(name, getattr(self, name), "in [0, 1)", lambda value: 0 <= value < 1)
        for value in self.lr_factors.values():
            _require_range("lr_factors", value, "factors, zero or positive", lambda value: value >= 0)
        for name in ("global_batch_sizes", "samples_stages", "milestones"):
            for value in getattr(self, name):
                _require_range(name, value, "a list of positive numbers", lambda value: value > 0)
        for name in PARAMETERS_OF_TESTS:  # their squares are needed
            _require_range(name, getattr(self, name), "positive", lambda value: value > 0)
            _require_range(name, getattr(self, name), "from 1e-100 to 1e100", lambda value: 1e-100 <= value <= 1e100)
        sizes = [("global_batch_sizes", size) for size in self.global_batch_sizes]
        sizes += [(name, getattr(self, name)) for name in ("batch_size", "max_batch_size", "linear_ramp_up_increment")]
        for name, size in sizes:
            _require_range(name, size, "below 2^31", lambda value: value < 2**31)
        for value in self.samples_stages:
            if isinstance(value, str) and not re.fullmatch(r"\d+(\.\d+)?%", value):
                raise UsageError(f"--samples_stages: '{value}' is neither a number of samples nor a share such as 25%")
        _require_range("seed", self.seed, "below 2^32", lambda value: value < 2**32)
        _require_range("smoothing", self.smoothing, "at most 1e15", lambda value: value <= 1e15)
        _require_range("timeout_minutes", self.timeout_minutes, "at most a year", lambda value: value <= 365 * 24 * 60)
        for name in ("ramp_up_factor", "max_growth"):
            _require_range(name, getattr(self, name), "larger than 1", lambda value: value > 1)

    def _check_without_effect(self):
        """Refuse options that nothing would read: whoever sets them expects something else of the run."""
        for names, other, value in (
            ("eval_samples", "eval_interval", 0),
            ("shard_modules", "strategy", "fsdp"),
            (
                "warmup_samples warmup_iters min_lr scheduler lr_decay_samples lr_decay_iters",
                "decay_lr",
                True,
            ),
            ("warmup_iters lr_decay_iters", "lr_decay_type", "iter"),
            ("warmup_samples lr_decay_samples", "lr_decay_type", "sample"),
            ("milestones gamma", "scheduler", "multistep"),
            ("max_iters", "training_type", "iter"),
        ):
            for name in names.split():
                if getattr(self, name) != getattr(DEFAULTS, name) and getattr(self, other) != value:
                    raise UsageError(f"--{name} acts only with --{other}={value}: add that, or leave --{name} out")
        if not self.branch:
            self._check_options_of_other_rules()
        reads_critical = not self.test or self.lr_scaling == "critical" or rule_class(vars(self)).name == "goodput"
        if self.critical != CRITICAL and not reads_critical:
            raise UsageError("--critical acts only with --ramp_up_type=goodput or --lr_scaling=critical: add one")
        measured = self.test or self.monitor_interval
        for name in ("statistics", "smoothing"):
            if getattr(self, name) != getattr(DEFAULTS, name) and not measured:
                raise UsageError(f"--{name} acts only with --test=True or --monitor_interval: add one, or leave it out")
        if self.coupling != DEFAULTS.coupling and self.lr_scaling not in MEASURED_SCALINGS:
            raise UsageError(f"--coupling={self.coupling} acts only with --lr_scaling=adascale or critical: add one")
        if self.monitor_modules and not measured:
            raise UsageError("--monitor_modules acts only with --test=True or --monitor_interval: add one")
        if self.monitor_metrics and not measured:
            raise UsageError("--monitor_metrics acts only with --test=True or --monitor_interval: add one")
        if self.lr_scaling in MEASURED_SCALINGS and not measured:
            raise UsageError(
                f"--lr_scaling={self.lr_scaling} needs the statistics: add --test=True or --monitor_interval=N"
            )

    def _check_options_of_other_rules(self):
        """(A run's config.yaml makes its baseline by --test=False: what a test reads may then be left over.)"""
        chosen = rule_class(vars(self))
        for rule in RULES.values():
            for name in set(rule.options) - set(chosen.options) - GENERAL:
                left_over = rule.measures and not chosen.measures
                if getattr(self, name) != getattr(DEFAULTS, name) and not left_over:
                    raise UsageError(f"--{name} acts only with {rule.chosen_by}: add that, or leave --{name} out")
        if chosen.measures and "test_type" not in chosen.options:
            for name in ("test_type", *PARAMETERS_OF_TESTS):
                if getattr(self, name) != getattr(DEFAULTS, name):
                    raise UsageError(
                        f"--{name}: {chosen.chosen_by} makes no test: leave --{name} out, or take another type"
                    )

    def _check_batch_sizes(self):
        if self.max_batch_size is not None and self.batch_size > self.max_batch_size:
            raise UsageError(
                f"--batch_size={self.batch_size} is above --max_batch_size={self.max_batch_size} "
                "(default: the size of the training set): lower one or raise the other"
            )
        ramps = [n for n in ("stagewise_ramp_up", "linear_ramp_up", "seesaw_ramp_up") if getattr(self, n)]
        if self.test and ramps:
            raise UsageError(f"--{ramps[0]} contradicts --test=True: add --test=False to ramp up without a test")
        if len(ramps) > 1:
            raise UsageError(f"--{ramps[0]} and --{ramps[1]} contradict each other: choose one")
        if self.max_growth and (self.test or ramps):
            first = -(-(self.batch_size + 1) // self.batch_size_multiple) * self.batch_size_multiple
            if first > self.batch_size * self.max_growth:
                raise UsageError(
                    f"--max_growth={self.max_growth}: from --batch_size={self.batch_size} the next size is {first}, "
                    "which is more: raise it, or lower --batch_size_multiple"
                )
        if self.stagewise_ramp_up and not self.global_batch_sizes:
            raise UsageError("--stagewise_ramp_up needs --global_batch_sizes=[SIZE,SIZE,…]")
        if self.samples_stages and len(self.samples_stages) != len(self.global_batch_sizes):
            raise UsageError(
                f"--samples_stages has {len(self.samples_stages)} entries for the {len(self.global_batch_sizes)} of "
                "--global_batch_sizes: give as many"
            )
        if self.stagewise_ramp_up and self.training_type == "iter" and not self.samples_stages:
            raise UsageError("--stagewise_ramp_up with --training_type=iter needs --samples_stages=[SAMPLES,SAMPLES,…]")
        largest = max(self.global_batch_sizes, default=0)
        if self.max_batch_size is not None and largest > self.max_batch_size:
            raise UsageError(f"--global_batch_sizes has {largest}, above --max_batch_size={self.max_batch_size}")
        if self.test and self.batch_size == 1:
            raise UsageError("--batch_size=1 has no variance to test: start with 2 or more, or add --test=False")

    def _check_schedules(self):
        if self.seesaw_ramp_up:
            if not self.decay_lr or self.scheduler == "multistep" or self.lr_decay_type != "sample":
                raise UsageError(
                    "--seesaw_ramp_up needs a learning rate that falls with the samples: --decay_lr=True with "
                    "--scheduler=cosine or linear and --lr_decay_type=sample"
                )
            if self.lr_scaling not in ("none", "sqrt"):
                raise UsageError(f"--lr_scaling={self.lr_scaling}: --seesaw_ramp_up scales by sqrt: leave it out")
            self.lr_scaling = "sqrt"
        if not self.decay_lr:
            return
        if self.min_lr > self.learning_rate:
            raise UsageError(f"--min_lr={self.min_lr} is above the peak --learning_rate={self.learning_rate}")
        if self.scheduler == "multistep" and not self.milestones:
            raise UsageError("--scheduler=multistep needs --milestones=[N,N,…]")
        if sorted(self.milestones) != self.milestones:
            raise UsageError(f"--milestones={self.milestones} must rise: sort them")
        if self.scheduler != "multistep":
            self._check_end_of_decay()
        self._check_warmup()

    def _check_end_of_decay(self):
        if self.lr_decay_type == "iter" and self.lr_decay_iters is None and self.training_type == "sample":
            raise UsageError("--lr_decay_type=iter needs --lr_decay_iters (or --training_type=iter with --max_iters)")
        if self.lr_decay_type == "sample" and self.lr_decay_samples is None and self.training_type == "iter":
            raise UsageError("--lr_decay_type=sample needs --lr_decay_samples here (or take --lr_decay_type=iter)")

    def _check_branch(self):
        if self.branch_gain != DEFAULTS.branch_gain and not self.branch:
            raise UsageError("--branch_gain acts only with --branch: add that, or leave --branch_gain out")
        if self.branch and not self.resume:
            raise UsageError("--branch acts only with --resume=CHECKPOINT: add that, or leave --branch out")
        if self.branch and self.decay_lr and self.lr_decay_type == "iter":
            raise UsageError(
                "--branch: the learning rate follows the steps, of which a branch has other ones: take a run with "
                "--lr_decay_type=sample"
            )

    def _check_warmup(self):
        unit = "samples" if self.lr_decay_type == "sample" else "iters"
        warmup = getattr(self, f"warmup_{unit}")
        for name in (f"lr_decay_{unit}", f"max_{unit}"):
            end = getattr(self, name)
            if end is not None:
                if warmup >= end:
                    raise UsageError(f"--warmup_{unit}={warmup} is not before --{name}={end}: shorten the warm-up")
                return


PARAMETERS_OF_TESTS = sorted({name for test in TESTS for name in test_parameters({"test_type": test})})
GENERAL = {"batch_size", "max_batch_size", "test_type"}
"""Options that are no single rule's."""
DEFAULTS = SimpleNamespace(
    **{
        entry.name: entry.default_factory() if entry.default_factory is not MISSING else entry.default
        for entry in fields(Config)
    }
)


def _require_range(name: str, value, words: str, holds) -> None:
    if value is None or isinstance(value, str):
        return
    if not (math.isfinite(value) and holds(value)):
        raise UsageError(f"--{name} must be {words}, not {value}")
