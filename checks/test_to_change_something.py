"""docs/design.md, "To change something": in a copy of the program a test, a schedule, a data set and a column are added
by editing the files that its table names, and no others.
"""

import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from checks.conftest import ROOT, launch

pytestmark = pytest.mark.long

COSINE_TEST = '''

@dataclass(frozen=True)
class CosineTest(Test):
    """Fails where V/b exceeds (1/c² − 1)‖ḡ‖², c the least cosine between the batch's gradient and the whole one."""

    name, title, symbols = "cosine", "cosine test", {"least_cosine": "c"}
    least_cosine: float = 0.5

    def __call__(self, moments: Statistics | Moments) -> Decision:
        bound = (self.least_cosine**-2 - 1) * moments.grad_norm_sq
        return _decide(moments, {"cosine test": _ratio(moments.variance, bound)})
'''
DOUBLING = '''

@dataclass(frozen=True)
class Doubling(Rule):
    """Twice as large every `doubling_samples` samples."""

    name = "doubling"
    options = described = ("doubling_samples",)
    samples_apart: int = 1000

    @classmethod
    def from_options(cls, options, test, decay):
        return cls(options["doubling_samples"])

    def __call__(self, batch_size: int, samples: int, observation: Observation) -> int:
        before = samples - batch_size
        return batch_size * 2 if samples // self.samples_apart > before // self.samples_apart else batch_size

    def label(self, batch_size: int) -> str:
        return f"doubling{self.samples_apart}"
'''
SQUARES = '''

def squares(data_dir: Path) -> DataSet:
    """Dark and bright squares."""
    labels = torch.arange(256) % 2
    images = (labels * 200).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    return DataSet(_tensors(images, labels), _tensors(images, labels), num_classes=2)


DATASETS["squares"] = squares
'''
NU = '    nu: float = 1.0\n    """ν of the orthogonality test: smaller means larger batches"""\n'
# Row of the table → file → what is replaced by what; an end of the file is "".
EDITS = {
    "a statistical test": {
        "adadagrad/tests.py": {"": COSINE_TEST},
        "options/schema.py": {NU: NU + '    least_cosine: float = 0.5\n    """c of the cosine test"""\n'},
    },
    "a batch-size schedule": {
        "adadagrad/control/rules.py": {"": DOUBLING},
        "options/schema.py": {
            NU: NU
            + '    doubling_samples: int = 1000\n    """of ramp_up_type=doubling: samples between two doublings"""\n'
        },
    },
    "a column of `metrics.csv`": {
        "runs/log.py": {'"next_batch_size"),\n': '"next_batch_size", "epochs_left"),\n'},
        "main.py": {
            '            "world_size": self.fabric.world_size,\n': '            "world_size": self.fabric.world_size,\n'
            '            "epochs_left": (self.config.max_samples - samples) / self.parts.samples_per_epoch,\n'
        },
    },
    "a built-in data set": {
        "data.py": {"": SQUARES},
        "options/names.py": {'DATA_SETS = ("digits", ': 'DATA_SETS = ("digits", "squares", '},
    },
}
PROGRAM = """
import main
common = ["--accelerator=cpu", "--devices=1", "--model=logistic", "--dataset=squares", "--max_micro_batch_size=64",
          "--out_dir=out", "--max_samples=512", "--eval_samples=100000", "--batch_size=4"]
assert main.main([*common, "--test_type=cosine", "--least_cosine=0.9"]) == 0
assert main.main([*common, "--ramp_up_type=doubling", "--doubling_samples=128"]) == 0
"""


def named_files(row: str) -> set[str]:
    """The files that the table's row of this name tells to edit."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    (cell,) = re.findall(rf"^\| {re.escape(row)} \| (.*) \|$", text, re.M)
    return set(re.findall(r"`([\w/]+\.py)`", cell))


@pytest.fixture(scope="module")
def changed(tmp_path_factory) -> Path:
    """A copy of the program with all four additions, after two runs there."""
    copy = tmp_path_factory.mktemp("copy")
    tracked = subprocess.run(["git", "ls-files", "*.py", "pyproject.toml"], capture_output=True, text=True, cwd=ROOT)
    for name in tracked.stdout.split() if tracked.returncode == 0 else pytest.skip("this is no git checkout"):
        if (ROOT / name).exists() and not name.startswith(("checks/", "benchmarks/")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    for files in EDITS.values():
        for name, replacements in files.items():
            text = (copy / name).read_text(encoding="utf-8")
            for old, new in replacements.items():
                assert old in text, f"{name} no longer has {old!r}"
                text = text.replace(old, new, 1) if old else text + new
            (copy / name).write_text(text, encoding="utf-8")
    done = launch(sys.executable, "-c", PROGRAM, cwd=copy)
    assert done.returncode == 0, done.stdout + done.stderr
    return copy


def rows_of(copy: Path, how: str) -> list[dict[str, str]]:
    (folder,) = (copy / "out").glob(f"logistic_squares_{how}_*")
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("row", EDITS)
def test_the_table_names_what_has_to_be_edited(row):
    assert set(EDITS[row]) <= named_files(row)


def test_the_test_decides(changed):
    rows = rows_of(changed, "cosine_least_cosine0.9")
    for row in rows[:-1]:
        b, v, g = (float(row[name]) for name in ("batch_size", "variance", "grad_norm_sq"))
        asked = v / ((0.9**-2 - 1) * g)
        assert float(row["next_batch_size"]) == max(b, min(-(-asked // 1), 256))
    assert len({row["batch_size"] for row in rows}) > 1


def test_the_schedule_decides(changed):
    sizes = {int(float(row["samples"])): int(float(row["batch_size"])) for row in rows_of(changed, "doubling128")}
    assert sizes[128] == 4 and max(sizes.values()) >= 32
    assert all(after in (size, 2 * size) for size, after in zip(sizes.values(), list(sizes.values())[1:]))


def test_the_column_is_written(changed):
    assert [float(row["epochs_left"]) for row in rows_of(changed, "doubling128")][-1] <= 0


def test_report_and_help_know_them(changed):
    report = launch(sys.executable, "report.py", "out", cwd=changed)
    assert report.returncode == 0 and "cosine test, c = 0.9" in report.stdout, report.stdout + report.stderr
    words = launch(sys.executable, "main.py", "--help", cwd=changed).stdout
    assert all(word in words for word in ("--least_cosine", "c of the cosine test", "--doubling_samples"))
    told = launch(sys.executable, "main.py", "--dataset=square", "--doubling_samples=5", cwd=changed)
    assert told.returncode == 2 and "did you mean 'squares'?" in told.stderr
