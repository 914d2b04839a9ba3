"""The rooms: in layers, and no import points up."""

import ast

import pytest

from scripts.build_wheel import MODULES
from tests.conftest import ROOT

LAYERS = [
    {"utils.runtime", "utils.reporting", "pretrained", "scripts"},
    {"models"},
    {"utils.config"},
    {"utils.data"},
    {"utils.tokenizer"},
    {"utils.training"},
    {"utils.evaluations"},
    set(MODULES),
    {"experiments", "benchmarks"},
]
LAYER_OF = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}


def room_of(module: str) -> str | None:
    """The room that a module lies in; None for what is none of ours."""
    parts = module.split(".")
    return next((".".join(parts[:n]) for n in (2, 1) if ".".join(parts[:n]) in LAYER_OF), None)


def imported(path) -> set[str]:
    """Modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


SOURCES = [p for p in ROOT.rglob("*.py") if not {"tests", ".venv"} & set(p.relative_to(ROOT).parts)]
SOURCES = [p for p in SOURCES if str(p.relative_to(ROOT)) != "utils/__init__.py"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_import_points_up(path):
    here = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert here is not None, f"{path} lies in no room: put it into one, or add its room to LAYERS above"
    rooms = {room_of(module) for module in imported(path)} - {None}
    above = {room for room in rooms if LAYER_OF[room] > LAYER_OF[here]}
    assert not above, f"{here} (layer {LAYER_OF[here]}) must not import {above}"


def test_docstrings_start_with_a_noun_or_a_verb():
    """A reader learns first what a thing is: not "What…", "Whether…", "How…"."""
    riddles, found = ("What", "Whether", "Those that", "Where ", "How ", "Who ", "Which ", "The same"), []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                said = ast.get_docstring(node) or ""
                found += [f"{path.name}: {said.splitlines()[0]}"] if said.startswith(riddles) else []
    assert not found
