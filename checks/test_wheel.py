"""The wheel, where nothing else of this folder is: what pip installs of it, and the pages' programs on that."""

import json
import math
import re
import shutil
import sys
import sysconfig
import venv
from pathlib import Path
from types import SimpleNamespace

import pytest

from checks.conftest import ROOT, launch, unused_port
from checks.test_library import example

pytestmark = pytest.mark.xdist_group("wheel")  # what the fixtures have found serves several tests


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder of packages into which the wheel is installed, as it is built from all that stands beside it."""
    folder = tmp_path_factory.mktemp("installed")
    ignored = shutil.ignore_patterns(".*", "__pycache__", "out", "data", "build", "results", "*.egg-info", "*.png")
    source = shutil.copytree(ROOT, folder / "source", ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--quiet", "--no-input"]
    for command in (
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, source],
        [
            *pip,
            "install",
            "--no-deps",
            "--no-index",
            "--find-links",
            folder,
            "--target",
            folder / "packages",
            "adadagrad",
        ],
    ):
        done = launch(*map(str, command), cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "packages"


def test_nothing_but_the_library_is_installed(installed):
    import adadagrad

    information = f"adadagrad-{adadagrad.__version__}.dist-info"
    assert {path.name for path in installed.iterdir()} == {"adadagrad", information}
    assert (installed / "adadagrad" / "py.typed").exists()
    assert (installed / "adadagrad" / "integrations" / "transformers.py").exists()
    metadata = (installed / information / "METADATA").read_text()
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert needed == ["Requires-Dist: torch>=2.11"]


def fresh_python(installed: Path, folder: Path, extra: str = "") -> str:
    """Python of an environment of its own, for which pip has installed the wheel; all else that this needs is the
    suite's."""
    venv.create(folder)
    python = str(folder / "bin" / "python")
    own = launch(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    Path(own, "suite.pth").write_text(sysconfig.get_path("purelib"))
    (wheel,) = installed.parent.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index"]
    done = launch(*pip, f"{wheel}{extra}", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert Path(own, "adadagrad").is_dir()
    return python


def test_loop_of_the_readme_beside_files_of_the_same_names(installed, tmp_path):
    """In a repository that has `tests/`, `data.py` and `models.py`, too."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").write_text("OWN = True\n")
    (tmp_path / "data.py").write_text(
        "import torch\nlabels = torch.arange(3000) % 3\n"
        "images = torch.nn.functional.one_hot(labels, 5) + torch.randn(3000, 5)\n"
    )
    (tmp_path / "models.py").write_text("import torch\nmodel = torch.nn.Linear(5, 3)\n")
    loop = example("optimizer, batch_size=16, max_batch_size")
    (tmp_path / "train.py").write_text(
        "import torch\ntorch.manual_seed(0)\nimport tests\nfrom data import images, labels\nfrom models import model\n"
        f"{loop}\nimport adadagrad\nassert tests.OWN\n"
        "print(adadagrad.__file__, scaler.samples, float(cross_entropy(model(images), labels)))\n"
    )
    python = fresh_python(installed, tmp_path / "environment")
    done = launch(python, "train.py", cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 0, done.stdout + done.stderr
    where, samples, loss = done.stdout.split()
    assert Path(where).is_relative_to(tmp_path / "environment")
    assert int(samples) >= 20_000 and float(loss) < 1.0 < math.log(3)


@pytest.fixture(scope="module")
def fresh(installed, tmp_path_factory) -> str:
    """With adadagrad[transformers]."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    return fresh_python(installed, tmp_path_factory.mktemp("fresh"), "[transformers]")


PROGRAM = example("AdaptiveBatchTrainer(model, args, train_dataset=data, scaling={")
SAYS = """
import adadagrad, json
told = {"steps": trainer.state.global_step, "samples": trainer.scaler.samples, "file": adadagrad.__file__}
told |= {"batch_size": trainer.scaler.batch_size, "weights": [float(part.sum()) for part in model.parameters()]}
told["losses"] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
pathlib.Path(f"told{os.environ.get('RANK', 0)}.json").write_text(json.dumps(told))
"""


def shortened(program: str, max_steps: int = 60) -> str:
    return re.sub(r"max_steps=200,\s+logging_steps=10", f"{max_steps=}, logging_steps=1, report_to='none'", program)


def trained(python: str, folder: Path, program: str, processes: int) -> SimpleNamespace:
    """Of a program, at its end: steps, samples, batch size, losses; the same on all processes, and equal weights."""
    (folder / "llama.py").write_text(program + SAYS)
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={unused_port()}"]
    done = launch(python, *(torchrun if processes > 1 else []), "llama.py", cwd=folder, PYTHONPATH="")
    assert done.returncode == 0, done.stdout + done.stderr
    told = [json.loads((folder / f"told{rank}.json").read_text()) for rank in range(processes)]
    assert all(of_rank == told[0] for of_rank in told)
    assert Path(told[0]["file"]).is_relative_to(Path(python).parents[1])
    return SimpleNamespace(**told[0])


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
def test_a_small_llama_on_the_standard_librarys_text(fresh, tmp_path, processes):
    """README's program."""
    program = PROGRAM.replace("AdaptiveBatchTrainer(model", "trainer = AdaptiveBatchTrainer(model")
    program = program.replace(").train()", ")\ntrainer.train()")
    found = trained(fresh, tmp_path, shortened(program), processes)
    assert found.samples >= 480 and found.batch_size > 8 and len(found.losses) == found.steps < 60
    assert found.losses[0] > 5 > 3.7 > found.losses[-1]


@pytest.mark.long
def test_the_same_command_goes_on_from_a_checkpoint(fresh, tmp_path):
    """The page's program, on README's model and data: by the norm test, once more after its end for more samples."""
    begin = PROGRAM[: PROGRAM.index("AdaptiveBatchTrainer(model")]
    program = f"{begin}from adadagrad import NormTest\n" + example("trainer = AdaptiveBatchTrainer(model, args")
    first, longer = (trained(fresh, tmp_path, shortened(program, steps), 2) for steps in (60, 90))
    assert first.samples >= 480 and longer.samples >= 720 and longer.batch_size > 8
    assert longer.losses[: first.steps] == first.losses and len(longer.losses) == longer.steps > first.steps
    assert longer.losses[-1] < 3.7
