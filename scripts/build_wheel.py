"""Build hook of `pip install .`: one package, `sar`, from the sources as they lie here.

`models` and `utils` are too common to install as they are, so `models/scales.py` becomes `sar/models/scales.py`, and
what it imports of its neighbours is written with `sar.` in front. Nothing else changes, and no copy is kept.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGES = ("models", "utils", "pretrained")
MODULES = (
    *("train", "trainer", "sar_trainer", "student_forcing", "noisy_context", "contrastive_alignment"),
    *("train_tokenizer", "evaluate", "sample", "demo"),
)
OWN = re.compile(rf"^(\s*)(from|import) ({'|'.join((*PACKAGES, *MODULES))})(?=[. ]|$)", re.MULTILINE)
FACE = '''"""Self-Autoregressive Refinement: `from sar.models import SARPipeline`."""

__version__ = "{version}"
'''


def renamed(source: str) -> str:
    """A module's text with its neighbours imported from `sar`."""
    return OWN.sub(lambda found: f"{found[1]}{found[2]} sar.{found[3]}", source)


def write_package(root: Path, out: Path, version: str) -> None:
    """Write the package `sar` of a checkout to a directory."""
    files = [p for name in PACKAGES for p in sorted((root / name).rglob("*.py"))]
    for path in [*files, *(root / f"{name}.py" for name in MODULES)]:
        target = out / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(renamed(path.read_text(encoding="utf-8")), encoding="utf-8")
    for name in PACKAGES:
        (out / name / "__init__.py").touch()
    (out / "__init__.py").write_text(FACE.format(version=version), encoding="utf-8")


class CustomBuildHook(BuildHookInterface):
    """See the module."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        self.folder = tempfile.TemporaryDirectory()
        write_package(Path(self.root), Path(self.folder.name), self.metadata.version)
        if version == "editable":  # as uv sync and pip install -e ask for it
            self.app.display_warning("sar is installed as it is now: later changes here need another installation")
            build_data["force_include_editable"] = {self.folder.name: "sar"}
        build_data["force_include"][self.folder.name] = "sar"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        self.folder.cleanup()
