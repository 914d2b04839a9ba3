"""What README and docs name is there, and says what the code does."""

import re
from dataclasses import fields, is_dataclass

import pytest

from experiments.flags_page import MARK, PAGE, PROGRAMS, generated
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "utils/evaluations/c2i/README.md"]


def test_the_page_of_flags_is_what_the_programs_say():
    written = PAGE.read_text(encoding="utf-8").partition(MARK)[2]
    assert written == generated(), "python -m experiments.flags_page writes it anew"


def names_of(config) -> list[str]:
    """Every flag of a dataclass and of those within it."""
    parts = {f.name: getattr(config, f.name) for f in fields(config)}
    nested = [names_of(part) if is_dataclass(part) else [name] for name, part in parts.items()]
    return [name for names in nested for name in names]


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_flag_is_on_its_page(program):
    part = PAGE.read_text(encoding="utf-8").partition(f"\n## {program}\n")[2].partition("\n## ")[0]
    known = set(re.findall(r"`--(\w+)`", part))
    assert known >= {name for name in names_of(PROGRAMS[program]()) if not name.startswith("_")}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert link.startswith("http") or (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_and_scripts_that_are_named_exist(page):
    rooms = "scripts|models|utils|experiments|benchmarks|tests|docs"
    named = set(re.findall(rf"\b((?:{rooms})/[\w/]+\.(?:py|sh|md|sbatch))", page.read_text(encoding="utf-8")))
    assert not [name for name in named if not (ROOT / name).exists()]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 250
