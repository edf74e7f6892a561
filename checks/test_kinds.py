"""Every kind of module and use of a parameter (kinds.py), against the loop over samples on the module itself."""

import copy
import random

import numpy
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

import gradients
from checks import kinds, oracle
from checks.conftest import ROOT
from checks.kinds import CLASSES, KINDS, STATISTICS, Kind, relative

PAGE = (ROOT / "docs" / "module_kinds.md").read_text()


def ids(kind: Kind) -> str:
    return f"{kind.group}: {kind.name}"


@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_exact_or_refused_as_the_page_says(kind):
    cells = kinds.cells(kind)
    assert not any("off by" in cell for cell in cells)
    assert kinds.row(kind, cells) in PAGE, "run: python -m checks.kinds > docs/module_kinds.md"


def test_every_layer_of_torch_is_listed():
    assert kinds.layers_with_parameters() <= set(kinds.LAYERS)


def test_the_page_has_no_line_too_many():
    assert PAGE.count("\n| ") == len(KINDS) + 1


@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_training_pass_in_pieces(kind):
    """Where the training pass is the test's own: cut into micro-batches, its loss scaled; and the model is left alone."""
    model, inputs, targets = kind.build()
    expected = oracle.statistics(oracle.gradient_vectors(model, kind.loss, inputs, targets))
    before = everything_of(model)
    probe = (inputs, targets)
    estimator, _ = gradients.build("auto", model, kind.loss, True, 4, probe, in_training_pass=True)
    assert_same(before, everything_of(model))
    in_training_pass, scale = getattr(estimator, "in_training_pass", False), 0.25
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for x, y in gradients.chunks(4, inputs, targets):
        with torch.no_grad():  # the oracle's passes all begin with these
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
        with estimator.observe(x, y, scale, whole=False):
            if in_training_pass:
                losses = [kind.loss(model(one), label) for one, label in gradients.chunks(1, x, y)]
                if kind.group in ("depends on values", "losses"):
                    (sum(losses) * scale).backward() if False else None
                (scale * summed(kind, model, x, y)).backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= scale * kinds.SAMPLES
    moments = estimator.moments()
    for name in STATISTICS:
        assert relative(getattr(moments, name), expected[name]) < 1e-9, name
