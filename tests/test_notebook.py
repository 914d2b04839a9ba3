import json
import sys

from models import SARPipeline
from tests.conftest import ROOT, run

NOTEBOOK = ROOT / "demo_inference.ipynb"


def test_it_is_committed_without_outputs():
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_it_runs_from_top_to_bottom(vae, model, schedule, tmp_path):
    SARPipeline.of(vae, model, schedule).save_pretrained(tmp_path / "p")
    env = {"SAR_CKPT": str(tmp_path / "p"), "FLEXVAR_CKPT": str(tmp_path / "p")}
    command = [sys.executable, "-m", "nbconvert", "--to=notebook", "--execute", NOTEBOOK, "--output", tmp_path / "out"]
    run(*command, **env)
    cells = json.loads((tmp_path / "out.ipynb").read_text())["cells"]
    pictures = [o for c in cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == 6
