"""The command line: published commands, help, files, and everything that is refused there."""

import re

import pytest
import yaml

from checks.conftest import ROOT
from options import command_line
from options.errors import UsageError
from options.schema import DEFAULTS, Config

PUBLISHED = {
    "cnn": "--num_workers=0 --optimizer=adagrad --batch_size=16 --max_test_micro_batch_size=15000 "
    "--max_batch_size=60000 --learning_rate=5e-1 --max_lr=5e-2 --decay_lr=False --max_samples=6000000 --model=cnn "
    "--dataset=mnist --test_type=norm --eta=1e-1",
    "resnet18": "--num_workers=0 --optimizer=adagrad --batch_size=8 --max_test_micro_batch_size=100 "
    "--max_micro_batch_size=128 --max_batch_size=50000 --max_samples=10000000 --warmup_samples=1000000 "
    "--lr_decay_samples=9000000 --learning_rate=5e-2 --min_lr=5e-3 --model=resnet18 --dataset=cifar10 --eta=5e-1",
    "resnet50": "--num_workers=0 --optimizer=sgdm --batch_size=256 --max_test_micro_batch_size=64 "
    "--max_micro_batch_size=100 --max_batch_size=50000 --max_samples=10000000 --warmup_samples=1000000 "
    "--lr_decay_samples=9000000 --learning_rate=5e-1 --min_lr=5e-2 --model=resnet50 --dataset=cifar100 "
    "--test_type=ip+orth --theta=5e-1 --nu=1e0",
    "resnet101": "--num_workers=12 --precision=bf16-mixed --optimizer=sgdm --data_dir=/data/imagenet-gen/ "
    "--batch_size=256 --max_test_micro_batch_size=64 --max_micro_batch_size=512 --max_batch_size=111360 "
    "--max_samples=256233400 --warmup_samples=6405835 --lr_decay_samples=249827565 --learning_rate=2.5e0 "
    "--min_lr=2.5e-1 --weight_decay=1e-4 --gradient_accumulation_steps=1 --model=resnet101 --dataset=imagenet "
    "--test_type=norm --eta=1e-1",
    "further": "--out_dir=x --eval_interval=3 --log_interval=2 --seed=1 --shuffle=False --compile=False --test=False "
    "--test_interval=2 --training_type=iter --max_iters=10 --lr_decay_type=iter --warmup_iters=2 --lr_decay_iters=9 "
    "--scheduler=multistep --milestones=[4,6] --gamma=0.5 --min_lr=1e-5 --ramp_up_type=factor --ramp_up_factor=1.5 "
    "--stagewise_ramp_up=True --samples_stages=[64,64] --global_batch_sizes=[16,32] --beta1=0.8 --beta2=0.99 "
    "--grad_clip=1.0 --linear_ramp_up=False --devices=2 --num_nodes=1",
    "linear": "--test=False --linear_ramp_up=True --linear_ramp_up_increment=8 --max_batch_size=512",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_commands_parse(name):
    parsed = command_line.parse(PUBLISHED[name].split())
    for option, value in re.findall(r"--(\w+)=(\S+)", PUBLISHED[name]):
        got = getattr(parsed, option)
        assert str(got) == value.rstrip("/") or got == yaml.safe_load(value) or float(got) == float(value), option


def test_help_groups_by_topic_and_names_every_option(capsys):
    with pytest.raises(SystemExit) as ended:
        command_line.parse(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    for topic in ("Data:", "Adaptive batch size:", "Learning-rate schedule:", "Devices"):
        assert f"\n{topic}" in text
    for option in Config.__dataclass_fields__:
        assert re.search(rf"--{option}[ ,]", text), option
    assert "--test_interval INT|auto" in text and "--recipe {paper,steady}" in text and "--knee FLOAT" in text
    assert not re.search(r"UNION|OPTIONAL|LITERAL|<class", text)
    assert "samples per device" in text and "default: cnn" in text


def test_options_page_names_every_option_with_its_default():
    page = (ROOT / "docs" / "options.md").read_text()
    rows = dict(re.findall(r"^\| `--(\w+)` \| [^|]* \| `?([^|`]*?)`? \|", page, re.M))
    assert set(Config.__dataclass_fields__) <= set(rows)
    defaults = DEFAULTS
    for option in Config.__dataclass_fields__:
        assert rows[option] == (
            "" if getattr(defaults, option) in (None, {}, []) else str(getattr(defaults, option))
        ), option


def test_config_file_and_later_options(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("eta: 0.25\nbatch_size: 32\noptimizer_args: {eps: 0.001}\n")
    parsed = command_line.parse([f"--config={file}", "--batch_size=64", "--optimizer_args.amsgrad=true"])
    assert (parsed.eta, parsed.batch_size) == (0.25, 64)
    assert parsed.optimizer_args == {"eps": 0.001, "amsgrad": True}
    with pytest.raises(SystemExit):
        command_line.parse(["--eta=0.3", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["eta"] == 0.3 and printed["model"] == "cnn"


@pytest.mark.parametrize("flag", ["--print_config", "--print_config=skip_default"])
@pytest.mark.parametrize("words", ["", "--eta=0.3", "--smoothing=9 --dataset=stdlib", "--test=False", "--recipe=paper"])
def test_a_printed_config_is_the_same_program(words, flag, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command_line.parse([*words.split(), flag])
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    assert command_line.parse([f"--config={file}"]) == command_line.parse(words.split())


REFUSED = [
    ("--etta=1", "did you mean 'eta'"),
    ("--test_type=nrm", "did you mean 'norm'"),
    ("--eta=abc", "--eta must be a number"),
    ("--batch_size=1.5", "--batch_size must be a whole number"),
    ("--test=maybe", "--test must be True or False"),
    ("--config=nowhere.yaml", "--config"),
    *[(f"--{name}={value}", f"--{name} must be positive")
      for name in ("eta", "theta", "nu", "learning_rate", "batch_size", "max_batch_size", "max_micro_batch_size",
                   "max_test_micro_batch_size", "test_interval", "max_samples", "max_iters", "devices", "test_groups")
      for value in (0, -1)],
    ("--eta=nan", "--eta must be a number"),
    ("--seed=-1", "--seed must be zero or positive"),
    ("--beta1=1", "--beta1 must be in"),
    ("--ramp_up_factor=1", "--ramp_up_factor must be larger"),
    ("--batch_size=128 --max_batch_size=64", "above --max_batch_size=64"),
    ("--batch_size=1", "no variance to test"),
    ("--eta=inf", "--eta must be"),
    ("--stagewise_ramp_up=True --global_batch_sizes=[8]", "add --test=False"),
    ("--test=False --stagewise_ramp_up=True", "needs --global_batch_sizes"),
    ("--test=False --global_batch_sizes=[8]", "--global_batch_sizes acts only with --stagewise_ramp_up=True"),
    ("--test=False --stagewise_ramp_up=True --linear_ramp_up=True --global_batch_sizes=[8]", "choose one"),
    ("--test=False --stagewise_ramp_up=True --global_batch_sizes=[8,9] --samples_stages=[5]", "give as many"),
    ("--test=False --stagewise_ramp_up=True --global_batch_sizes=[8,0]", "positive"),
    ("--model=resnt18", "did you mean 'resnet18'?"),
    ("--dataset=minst", "did you mean 'mnist'?"),
    ("--optimizer=adamm", "did you mean 'adam'?"),
    ("--max_growth=1", "--max_growth must be larger than 1"),
    ("--max_growth=1.1 --batch_size=2 --eta=1", "the next size is 3, which is more"),
    ("--max_growth=2 --batch_size_multiple=64", "the next size is 64, which is more"),
    ("--smoothing=-1", "--smoothing must be zero or positive"),
    ("--weight_average=-1", "--weight_average must be zero or positive"),
    ("--critical=1e300", "--critical must be at most 1e15"),
    ("--test=False --smoothing=100", "acts only with --test=True or --monitor_interval"),
    ("--test=False --lr_scaling=adascale", "needs the statistics: add --test=True or --monitor_interval=N"),
    ("--ramp_up_type=goodput --eta=0.5", "--ramp_up_type=goodput makes no test"),
    ("--theta=0.7", "--theta acts only with --test_type=ip or ip+orth: add that"),
    ("--theta=0.7 --nu=2", "--nu acts only with --test_type=ip+orth: add that"),
    ("--ramp_up_type=test --may_shrink=True", "--may_shrink acts only with --ramp_up_type=goodput"),
    ("--test=False --monitor_modules=True", "--monitor_modules acts only with"),
    ("--ramp_up_type=test --knee=100", "--knee acts only with --ramp_up_type=goodput"),
    ("--eval_interval=3 --eval_samples=100", "--eval_samples acts only with --eval_interval=0"),
    ("--seesaw_ramp_up=True", "add --test=False"),
    ("--test=False --seesaw_ramp_up=True --decay_lr=False", "needs a learning rate that falls with the samples"),
    ("--test=False --seesaw_ramp_up=True --lr_scaling=linear", "--seesaw_ramp_up scales by sqrt"),
    ("--test=False --stagewise_ramp_up=True --global_batch_sizes=[8] --samples_stages=[x]", "a share such as 25%"),
    ("--min_lr=1 --learning_rate=0.1", "above the peak"),
    ("--scheduler=multistep", "needs --milestones"),
    ("--milestones=[5]", "--milestones acts only with --scheduler=multistep"),
    ("--scheduler=multistep --milestones=[5,3]", "must rise"),
    ("--warmup_samples=10 --lr_decay_samples=10", "not before"),
    ("--lr_decay_type=iter", "needs --lr_decay_iters"),
    ("--warmup_samples=500 --max_samples=400", "--warmup_samples=500 is not before --max_samples=400"),
    ("--training_type=iter --lr_decay_type=iter --warmup_iters=9 --max_iters=9", "is not before --max_iters=9"),
    ("--decay_lr=False --warmup_samples=5", "--warmup_samples acts only with --decay_lr=True"),
    ("--decay_lr=False --min_lr=1e-3", "--min_lr acts only with --decay_lr=True"),
    ("--test=False --linear_ramp_up_increment=3", "acts only with --linear_ramp_up=True"),
    ("--lr_decay_iters=5", "--lr_decay_iters acts only with --lr_decay_type=iter"),
    ("--max_iters=5", "--max_iters acts only with --training_type=iter"),
    ("--ramp_up_type=goodputt", "did you mean 'goodput'"),
    ("--ramp_up_factor=3", "--ramp_up_factor acts only with --ramp_up_type=factor"),
    ("--seed=4294967296", "--seed must be below 2^32"),
    ("--eta=1e300", "--eta must be from 1e-100 to 1e100"),
    ("--nu=1e-300", "--nu must be from 1e-100 to 1e100"),
    (f"--max_batch_size={2**63}", "--max_batch_size must be below 2^31"),
    (f"--test=False --stagewise_ramp_up=True --global_batch_sizes=[4,{2**63}]", "must be below 2^31"),
    ("--run_name=a/b", "must be the name of a folder"),
    ("--run_name=..", "must be the name of a folder"),
    ("--devices=many", "--devices must be a whole number or auto, not 'many'"),
    ("--weight_decay=much", "--weight_decay must be a number, not 'much'"),
    ("--milestones=3", "--milestones must be a list"),
    ("--strategy=ddpp", "did you mean 'ddp'"),
    ("--optimizer_args=3", "--optimizer_args must be {NAME: VALUE}, not '3'"),
    ("--batch_size", "--batch_size needs a value"),
    ("quickstart", "unexpected argument 'quickstart': options are written --NAME=VALUE"),
]  # fmt: skip


@pytest.mark.parametrize(
    "words, recipe, expected",
    [
        ("", "steady", ("unbiased", 5000.0, "goodput", "critical", 4.0)),
        ("--model=cnn --dataset=mnist", "steady", ("unbiased", 5000.0, "goodput", "critical", 4.0)),
        ("--eta=1", "paper", ("batch", 0.0, "test", "none", None)),
        ("--test_type=norm", "paper", ("batch", 0.0, "test", "none", None)),
        ("--test=False", "paper", ("batch", 0.0, "test", "none", None)),
        ("--recipe=paper", "paper", ("batch", 0.0, "test", "none", None)),
        ("--recipe=steady --smoothing=100 --max_growth=2", "steady", ("unbiased", 100.0, "goodput", "critical", 2.0)),
        ("--recipe=steady --ramp_up_type=test --eta=2", "steady", ("unbiased", 5000.0, "test", "critical", 4.0)),
    ],
)
def test_recipes(words, recipe, expected):
    """A word of the published rule is enough for the published rule; what is given stands above a recipe."""
    c = command_line.parse(words.split())
    assert c.recipe == recipe
    assert (c.statistics, c.smoothing, c.ramp_up_type, c.lr_scaling, c.max_growth) == expected


@pytest.mark.parametrize("options, words", REFUSED, ids=[options for options, _ in REFUSED])
def test_refused_in_one_line(options, words):
    with pytest.raises(UsageError, match=re.escape(words)) as refused:
        command_line.parse(options.split())
    assert "\n" not in str(refused.value)


def test_schedules_count_what_the_training_counts():
    assert command_line.parse(["--training_type=iter"]).lr_decay_type == "iter"
    assert command_line.parse([]).lr_decay_type == "sample"
    command_line.parse(
        ["--lr_decay_type=iter", "--scheduler=multistep", "--milestones=[10,20]"]
    )  # no end to be told of


@pytest.mark.parametrize(
    "text, words",
    [
        (b"batch_sise: 4\n", "unknown option batch_sise in the --config file; did you mean 'batch_size'?"),
        (b"batch_size: many\n", "--batch_size must be a whole number, not 'many'"),
        (b"batch_size: [4\n", "--config: while parsing"),
        (b"- 4\n", "give a YAML file with lines OPTION: VALUE"),
        (b"\xff\xfe\x00", "--config: "),
    ],
)
def test_refused_files(tmp_path, text, words):
    (tmp_path / "run.yaml").write_bytes(text)
    with pytest.raises(UsageError, match=re.escape(words)) as refused:
        command_line.parse([f"--config={tmp_path / 'run.yaml'}"])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("option", ["data_dir", "out_dir", "resume"])
def test_paths_are_expanded(tmp_path, monkeypatch, option):
    """On the command line behind `=`, in a file, in a file that is itself named so; a relative path is of the folder
    that the program is started in, wherever it is written."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    (tmp_path / "sub").mkdir()
    paths = {"~/x": f"{tmp_path}/x", "$SCRATCH/x": "/scratch/me/x", "${SCRATCH}x": "/scratch/mex", "x/~y": "x/~y"}
    for path, expected in paths.items():
        (tmp_path / "sub" / "run.yaml").write_text(f"{option}: {path}\n")
        for word in (f"--{option}={path}", "--config=~/sub/run.yaml", "--config=$HOME/sub/run.yaml"):
            assert str(getattr(command_line.parse([word]), option)) == expected, (path, word)
    assert Config(resume="auto").resume == "auto"


@pytest.mark.parametrize(
    "word, words",
    [
        ("--out_dir=$NOWHERE/x", "--out_dir=$NOWHERE/x: $NOWHERE is not set"),
        ("--data_dir=${NOWHERE}", "${NOWHERE} is not set"),
        ("--config=$NOWHERE/run.yaml", "$NOWHERE is not set"),
        ("--resume=~nobody_of_this_name/x", "there is no user nobody_of_this_name"),
        ("--run_name=$NOWHERE", "one word without '/' or '$'"),
    ],
)
def test_paths_that_lead_nowhere(monkeypatch, word, words):
    monkeypatch.delenv("NOWHERE", raising=False)
    with pytest.raises(UsageError, match=re.escape(words)):
        command_line.parse([word])


def test_names_are_known_without_an_import():
    """What launch/names.py reads from the sources is what the packages and this program's own tables have."""
    import torch
    import torchvision

    import data
    import models
    import optim
    from options import names

    assert sorted(names.torchvision_models()) == sorted(torchvision.models.list_models(module=torchvision.models))
    own = {
        name
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and value is not torch.optim.Optimizer
    }
    assert set(names.torch_optimizers()) == {
        name for name in own if issubclass(getattr(torch.optim, name), torch.optim.Optimizer)
    }
    assert tuple(data.DATASETS) == names.DATA_SETS and set(names.MODELS) == set(models.OWN)
    assert set(names.OPTIMIZERS) == set(optim.NAMES)
