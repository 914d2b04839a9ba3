"""The table of generators, and that nothing else knows one by name."""

import re
import sys
from dataclasses import asdict

import pytest
import torch

import models
from models.generators import GENERATORS, config_of, recognise
from tests.conftest import ROOT, run

SIZES = {"depth": 2, "width": 64, "num_classes": 3, "codebook_size": 8, "codebook_dim": 4}


@pytest.mark.parametrize("name", GENERATORS)
def test_each_is_known_by_its_sizes_and_by_its_weights(name):
    config = GENERATORS[name](**SIZES)
    assert config_of(asdict(config)) == config
    found = recognise(config.build().state_dict(), "file")
    assert type(found) is type(config)
    assert {key: asdict(found)[key] for key in SIZES} == {key: asdict(config)[key] for key in SIZES}


def test_what_is_no_generator_is_named():
    with pytest.raises(ValueError, match=r"no model has such sizes: depth, colour"):
        config_of({"depth": 2, "colour": 3})
    with pytest.raises(ValueError, match=r"no word_embed.weight"):
        recognise({"x": torch.zeros(1)}, "file")


def test_only_the_table_knows_a_generator_by_name():
    """The hybrid model stands in its own file and the table; the schedule sf_hybrid is another thing."""
    for path in ROOT.rglob("*.py"):
        place = path.relative_to(ROOT)
        if place.parts[0] in ("tests", "experiments", ".venv") or place.name in ("hybrid.py", "generators.py"):
            continue
        text = re.sub(r"sf_hybrid\w*|SF_HYBRID\w*|hybrid@\w+|HybridStudentForcing|hybrid student", "", path.read_text())
        assert "hybrid" not in text.lower(), place


def test_names_are_imported_when_they_are_asked_for():
    entries = "train, train_tokenizer, sample, evaluate, demo"
    slow = {"huggingface_hub": "models.scales", "torchvision": entries, "torch._dynamo": entries}
    for name, modules in slow.items():
        code = f"import sys, {modules}; print({name!r} in sys.modules)"
        assert run(sys.executable, "-c", code).stdout.strip() == "False", name
    for name in models.__all__:
        assert getattr(models, name).__name__ == name if name != "DEFAULT_SCHEDULE" else models.DEFAULT_SCHEDULE
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        models.nothing  # noqa: B018
