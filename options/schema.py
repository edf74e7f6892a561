"""Every option: its name, type, default and unit.

`Config` is one dataclass made of one class per topic. How a user's words become one: command_line.py; which values and
combinations are refused: refusals.py.
"""

from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from adadagrad.control import CRITICAL
from adadagrad.tests import OTHER_SCALES, TESTS
from options import refusals
from options.names import expanded


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
    size that is about as quick as any and fits into the device's memory, measured before the training. Evaluations
    take as many, at most 1024"""
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
    which costs 1 + 1/η² times the least possible samples and 1 + η² times the least possible steps (McCandlish et al.,
    arXiv:1812.06162)"""
    theta: float = 1.0
    """θ of the inner product test: smaller means larger batches"""
    nu: float = 1.0
    """ν of the orthogonality test: smaller means larger batches"""
    statistics: Literal["batch", "unbiased"] = "batch"
    """batch: as published, where noise dominates ‖ḡ‖² is mostly noise itself; unbiased: without this part"""
    smoothing: float = 0.0
    """average the statistics over steps, with this half-life [samples], but at most a quarter of the samples so far and
    at least four measurements; 0: the last tested batch alone"""
    test_interval: int | Literal["auto"] = 1
    """measure, and test, every so many steps; auto: every step until the noise scale is known to a half (at most an
    eighth of the steps and 16 more), then every sixteenth; less often where a measurement is expensive (vmap, loop)"""
    monitor_interval: int = 0
    """measure the statistics every so many steps also where nothing is decided by them: in runs without a test and at
    the largest batch size; 0: do not. A network with BatchNorm is measured by micro_batch"""
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
    there; goodput: no test, but the size with the most progress a second, √(critical · noise scale ·
    knee); or an import path package.module:Class of an adadagrad.Rule"""
    ramp_up_factor: float = 2.0
    """factor of ramp_up_type=factor"""
    may_shrink: bool = False
    """ramp_up_type=goodput may also make the batch smaller, to two samples and one a process at least"""
    knee: float | None = None
    """of ramp_up_type=goodput: the batch whose samples take as long as the fixed part of a step [samples]; default:
    measured once before the first step. With a number, batch sizes do not depend on the machine"""
    critical: float = CRITICAL
    """of ramp_up_type=goodput and lr_scaling=critical: critical batch size ÷ noise scale, as critical.py measures
    it"""
    max_waste: float | None = None
    """of ramp_up_type=goodput: W, a bound on the samples: the run takes at most about 1 + W times those that the
    smallest batches would need; default: batches of at most 10 critical batch sizes"""
    free_start: bool = False
    """of ramp_up_type=goodput: begin with an eighth of the knee if that is more than batch_size, since such a step
    takes hardly longer (at most 1/256 of max_samples); the learning rate begins at that of batch_size and follows what
    is measured"""
    recipe: Literal["paper", "steady"] | None = None
    """paper: the published rule. steady: unbiased, smoothed statistics, goodput, a learning rate that follows,
    a free start, growth at most fourfold at a time and by what is known for sure, at most twice the least
    possible samples, weights averaged over a twentieth of the samples so far, clipped gradients. Options that are given
    override it; default: paper where test_type, eta, theta, nu or ramp_up_type is given or there is no test, else
    steady"""


@dataclass
class RampOptions:
    """Ramp-up without a test (needs --test=False)"""

    stagewise_ramp_up: bool = False
    """use the sizes in global_batch_sizes one after the other"""
    global_batch_sizes: list[int] = field(default_factory=list)
    """batch sizes of the stages [samples]"""
    samples_stages: list[int | str] = field(default_factory=list)
    """length of each stage [samples, or as 25% of a run whose length is in samples]; default: equal lengths"""
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
    grad_clip: float | Literal["auto"] = 0.0
    """clip the norm of the batch gradient at this value; auto: at twice the mean norm of about the last sixteen steps,
    from the fifth step on; 0: do not clip"""
    weight_average: float = 0.0
    """average the weights with this half-life [samples; below 1: a share of the samples so far]; evaluations are of the
    average, and model_average.pt has it; 0: do not"""
    lr_scaling: Literal["none", "sqrt", "linear", "adascale", "critical"] = "none"
    """how the learning rate follows the batch size b, on top of the schedule, from the initial one b₀: by √(b/b₀),
    b/b₀, or from the statistics, between 1 and b/b₀: AdaScale's gain, or that of the critical batch size, `critical`
    noise scales (with coupling=rate the root of either for optimizers other than SGD; with coupling=full as the
    state that follows leaves it: 1 for AdaGrad, at most √(b/b₀) for Adam)"""
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
    """how processes work together; ddp_find_unused_parameters_true: if some parameters get no gradient in a step; fsdp:
    parameters, gradients and optimizer states are sharded, for models that do not fit"""
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
    """end the run if a process waits this long for another [min]"""
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
    """auto: go on from the newest intact checkpoint of the run's folder, start where there is none (needs run_name);
    or a run's folder or checkpoint to go on from; default: start a new run"""
    branch: float | None = None
    """of resume: go on from a checkpoint with so many times its batch size, constant from there on; seed, length and
    evaluations may be other ones then. critical.py compares such branches. Default: go on as the run was"""
    branch_gain: float = 1.0
    """of branch: the length of a step is multiplied by branch ** branch_gain, and the optimizer's state follows; 1: by
    as much as the batch, as where noise dominates"""


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
        """Fill in what follows from other options, and refuse what can be refused without data, model or devices.

        Raises:
            UsageError: a value is out of range or options contradict each other.
        """
        self.lr_decay_type = self.lr_decay_type or self.training_type
        self.lr_factors = {str(name): factor for name, factor in self.lr_factors.items()}  # YAML reads 0 as a number
        if self.learning_rate is None:
            self.learning_rate = 0.002 if self.dataset in ("tokens", "stdlib") else 0.01
        self.data_dir, self.out_dir = expanded("data_dir", self.data_dir), expanded("out_dir", self.out_dir)
        if self.resume not in (None, "auto"):
            self.resume = str(expanded("resume", self.resume))
        refusals.check(self, DEFAULTS)
        if self.seesaw_ramp_up:
            self.lr_scaling = "sqrt"

    @property
    def without_weight_decay(self) -> list[str]:
        """The kinds in no_weight_decay."""
        return [kind.strip() for kind in self.no_weight_decay.split(",") if kind.strip()]


DEFAULTS = SimpleNamespace(
    **{
        entry.name: entry.default_factory() if entry.default_factory is not MISSING else entry.default
        for entry in fields(Config)
    }
)
"""Every option as it is where nobody says anything."""
