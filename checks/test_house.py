"""The house: which wing may import which, and that words are answered before anything heavy is imported."""

import ast
import functools
import re
import subprocess
import sys
from collections import Counter

import pytest

from checks.conftest import ROOT

# docs/design.md says the same in words: what each package may import, beside libraries. All arrows run down this list.
ARROWS = {
    "main": {"training", "batches", "optim", "tests", "options", "launch", "adadagrad"},
    "training": {"batches", "data", "models", "optim", "tests", "runs", "options", "launch", "adadagrad"},
    "report": {"runs", "options", "launch"},
    "critical": {"runs", "options", "launch"},
    "batches": {"data", "options", "launch", "adadagrad"},
    "data": {"imagenet", "text", "options"},
    "models": {"text", "options", "adadagrad"},
    "optim": {"options", "adadagrad"},
    "runs": {"tests", "options", "launch", "adadagrad"},
    "tests": {"options", "adadagrad"},
    "imagenet": {"options", "launch"},
    "text": {"options", "launch"},
    "launch": {"options"},
    "options": {"adadagrad"},
    "adadagrad": set(),
}
KNOW_FABRIC = ("launch.processes", "launch.collectives", "launch.ending", "launch.fsdp", "options.effective")
WITHOUT_FABRIC = ("tests", "batches", "optim", "models", "data", "imagenet", "text", "adadagrad")


def modules(room: str) -> list:
    return [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else sorted((ROOT / room).rglob("*.py"))


@functools.cache
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
            in_library = path.is_relative_to(ROOT / "adadagrad")
            assert bool(node.level) == in_library or not node.level, f"{path}: only the library imports relatively"
            package = path.relative_to(ROOT).parent.parts[: len(path.relative_to(ROOT).parent.parts) + 1 - node.level]
            module = ".".join([*package, node.module or ""] if node.level else [node.module]).rstrip(".")
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def test_every_room_is_known():
    rooms = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert rooms - {"checks", "benchmarks"} == set(ARROWS)


def test_no_name_of_a_file_occurs_twice():
    names = Counter(path.name for room in (*ARROWS, "checks", "benchmarks", "examples") for path in modules(room))
    assert {name for name, times in names.items() if times > 1} == {"__init__.py", "tests.py"}


@pytest.mark.parametrize("room", ARROWS)
def test_imports_run_one_way(room):
    order = list(ARROWS)
    assert all(order.index(below) > order.index(room) for below in ARROWS[room])
    for path in modules(room):
        rooms = {name.partition(".")[0] for name in imported(path)} & {*ARROWS, "checks", "benchmarks"}
        assert rooms - {room} <= ARROWS[room], path
        if room in WITHOUT_FABRIC:
            fabric = KNOW_FABRIC if path.parent.name == "integrations" else ("lightning", *KNOW_FABRIC)
            assert not any(name.startswith(fabric) for name in imported(path)), path


@pytest.mark.parametrize("room", [room for room in ARROWS if (ROOT / room).is_dir()])
def test_no_circles_within_a_wing(room):
    paths = (path for path in modules(room) if path.stem != "__init__")
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
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


def test_design_page_describes_the_files_that_there_are():
    """Each package's part of the page names its files, every one of them, and no others."""
    page = (ROOT / "docs" / "design.md").read_text()
    _, _, parts = page.partition("## Package by package")
    parts = re.split(r"\*\*`(\w+)/`\*\*", parts.partition("## Where an option")[0])
    for package, part in zip(parts[1::2], parts[2::2]):
        if package in ARROWS:
            there = {path.name for path in modules(package) if path.name != "__init__.py"}
            named = set(re.findall(r"`(\w+\.py)`", part.partition("\n**`")[0]))
            assert there == named - {"optim.py"}, package  # (the schedules over time, to tell them apart)


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
    assert "options.schema" in loaded
    assert not {"torch", "torchvision", "lightning", "numpy", "tensorboard"} & set(loaded)
    assert done.returncode == (0 if arguments[0] in ("--help", "--print_config") else 2)


def test_reports_need_no_torch():
    done = subprocess.run(
        [sys.executable, "-c", "import report, sys; print('torch' in sys.modules)"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == "False", done.stderr


def test_options_page_is_current():
    from options import command_line

    assert (ROOT / "docs" / "options.md").read_text() == command_line.page(), (
        "run: python -m options.command_line > docs/options.md"
    )
