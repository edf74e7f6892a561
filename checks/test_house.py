"""The house: which wing may import which, and that words are answered before anything heavy is imported."""

import ast
import re
import subprocess
import sys

import pytest

from checks.conftest import ROOT

# docs/design.md says the same in words: what each room may import, beside libraries. All arrows run down this list.
ARROWS = {
    "main": {"rehearsal", "assembly", "batches", "optim", "gradients", "runs", "tests", "launch"},
    "rehearsal": {"assembly", "batches", "optim", "gradients", "control", "runs", "launch"},
    "assembly": {"batches", "data", "models", "optim", "gradients", "runs", "tests", "launch"},
    "report": {"runs", "launch"},
    "batches": {"data", "control", "tests", "launch"},
    "data": {"imagenet", "text", "launch"},
    "models": {"text", "gradients", "launch"},
    "optim": {"launch"},
    "control": {"tests"},
    "gradients": {"tests"},
    "runs": {"launch"},
    "imagenet": {"launch"},
    "text": {"launch"},
    "launch": set(),
    "tests": set(),
}
KNOW_FABRIC = ("launch.processes", "launch.agreement", "launch.ending", "launch.effective", "launch.sharding")
WITHOUT_FABRIC = ("tests", "control", "batches", "optim", "gradients", "models", "data", "imagenet", "text")


def modules(room: str) -> list:
    return [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else sorted((ROOT / room).glob("*.py"))


def imported(path) -> set[str]:
    """All that a file imports, wherever in it: dotted names."""
    names = set()
    tree = ast.parse(path.read_text())
    for_types = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    skipped = {id(inner) for node in for_types for inner in ast.walk(node)}  # never executed
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write the whole name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_room_is_known():
    rooms = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert rooms - {"checks", "benchmarks"} == set(ARROWS)


@pytest.mark.parametrize("room", ARROWS)
def test_imports_run_one_way(room):
    order = list(ARROWS)
    assert all(order.index(below) > order.index(room) for below in ARROWS[room])
    for path in modules(room):
        rooms = {name.partition(".")[0] for name in imported(path)} & {*ARROWS, "checks", "benchmarks"}
        assert rooms - {room} <= ARROWS[room], path
        if room in WITHOUT_FABRIC:
            assert not any(name.startswith(("lightning", *KNOW_FABRIC)) for name in imported(path)), path


@pytest.mark.parametrize("room", [room for room in ARROWS if (ROOT / room).is_dir()])
def test_no_circles_within_a_wing(room):
    files = {f"{room}.{path.stem}": path for path in modules(room) if path.stem != "__init__"}
    arrows = {
        name: {other for other in files if any(f"{found}.".startswith(f"{other}.") for found in imported(path))}
        for name, path in files.items()
    }
    while arrows:
        done = {name for name, below in arrows.items() if not below & set(arrows)}
        assert done, f"a circle among {', '.join(arrows)}"
        arrows = {name: below for name, below in arrows.items() if name not in done}


def test_design_page_has_the_same_arrows():
    page = (ROOT / "docs" / "design.md").read_text()
    for room, below in ARROWS.items():
        line = re.search(rf"^\| `{room}(?:\.py|/)` \|.*\| (.*) \|$", page, re.M)
        assert line, f"docs/design.md has no line for {room}"
        assert set(re.findall(r"`(\w+)", line[1])) == below, room


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--print_config"], ["--etta=1"], ["--batch_size=0"], ["--linear_ramp_up=True"]]
    + [["--model=resnt18"], ["--dataset=minst"], ["--optimizer=adamm"]],
)
def test_words_are_answered_without_torch(arguments):
    """Seen from inside: the modules that are loaded when the program has said what it has to say."""
    watch = "import sys, atexit, runpy; sys.argv = ['main.py'] + sys.argv[1:]\n"
    watch += "atexit.register(lambda: print('loaded:', *sorted(sys.modules)))\n"
    watch += "runpy.run_path('main.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", watch, *arguments], cwd=ROOT, capture_output=True, text=True)
    loaded = done.stdout.rpartition("loaded:")[2].split()
    assert "launch.options" in loaded
    assert not {"torch", "torchvision", "lightning", "numpy", "tensorboard"} & set(loaded)
    assert done.returncode == (0 if arguments[0] in ("--help", "--print_config") else 2)


def test_reports_need_no_torch():
    done = subprocess.run(
        [sys.executable, "-c", "import report, sys; print('torch' in sys.modules)"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == "False", done.stderr


def test_options_page_is_current():
    from launch import command_line

    assert (ROOT / "docs" / "options.md").read_text() == command_line.page(), (
        "run: python -m launch.command_line > docs/options.md"
    )
