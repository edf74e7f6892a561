"""examples/kubernetes and examples/skypilot.yaml: what they say to the cluster, and to main.py; and the documentation's
loader for a group whose members come and go.
"""

from pathlib import Path

import pytest
import yaml

from checks.conftest import ROOT
from checks.test_library import example
from options import command_line

FILES = sorted([*(ROOT / "examples" / "kubernetes").glob("*.yaml"), ROOT / "examples" / "skypilot.yaml"])


def objects(path: Path) -> list[dict]:
    return [dict(document) for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))]


def words_of(document) -> list[str]:
    """The arguments of main.py, wherever in a document."""
    if isinstance(document, dict):
        return [word for value in document.values() for word in words_of(value)]
    if isinstance(document, list):
        return [word for value in document for word in words_of(value)]
    words = str(document).split()
    return [word for word in words if word.startswith("--") and not word.startswith(TORCHRUNS)]


TORCHRUNS = ("--nnodes", "--nproc_per_node", "--max-restarts", "--rdzv")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_program_takes_the_options(path):
    replicas = 2 if path.stem == "pytorchjob" else 1  # master and workers
    words = [word for document in objects(path) for word in words_of(document)]
    words = words[: len(words) // replicas]
    config = command_line.parse(words)
    assert config.resume == "auto" and config.run_name and config.checkpoint_minutes > 0
    assert config.launcher == ("env" if path.stem == "pytorchjob" else "auto")


def test_kubernetes_own_schema():
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate checks the Job")
    for document in objects(ROOT / "examples" / "kubernetes" / "job.yaml"):
        validate.validate(document, validate.latest_version(), strict=True)
    (job,) = objects(ROOT / "examples" / "kubernetes" / "pytorchjob.yaml")
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        template = replica["template"]
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}
        validate.validate(pod, validate.latest_version(), strict=True)
        assert [container["name"] for container in template["spec"]["containers"]] == ["pytorch"]


def test_interruptions_are_no_failures():
    (task,) = objects(ROOT / "examples" / "skypilot.yaml")
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75, 85]
    (job,) = objects(ROOT / "examples" / "kubernetes" / "pytorchjob.yaml")
    policies = {replica["restartPolicy"] for replica in job["spec"]["pytorchReplicaSpecs"].values()}
    assert policies == {"OnFailure"}


def test_a_loader_under_a_changing_group():
    """Two epochs of 20 samples: each twice, and a batch is the same whoever takes it."""
    names, used = {}, []
    exec(example("class Loader:"), names)
    members = [names["Loader"](range(20)) for _ in range(4)]  # those who are away are told where the others are

    def batch(size, world_size):
        shares = [member.share(size, rank, world_size) for rank, member in enumerate(members[:world_size])]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        return sorted(sum(shares, []))

    for size, world_size in ((8, 2), (8, 3), (6, 1), (10, 4), (8, 3)):
        taken = batch(size, world_size)
        assert len(taken) == size and taken == batch(size, world_size % 4 + 1)  # a step that another group takes again
        used += taken
        for member in members:
            member.advance(size)
    assert sorted(used) == sorted([*range(20)] * 2)
