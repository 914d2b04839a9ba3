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


def test_where_the_project_is_not_its_first_cell_fetches_it(vae, model, schedule, tmp_path):
    """As on Colab: the notebook alone, in an empty folder."""
    SARPipeline.of(vae, model, schedule).save_pretrained(tmp_path / "p")
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"][:3]  # fetch, check, load
    (tmp_path / "empty").mkdir()
    code = f"import sys; sys.path[:] = [p for p in sys.path if p not in ('', {str(ROOT)!r})]\n" + "\n".join(sources)
    env = {"SAR_CKPT": str(tmp_path / "p"), "FLEXVAR_CKPT": str(tmp_path / "p"), "PYTHONPATH": ""}
    code = f"import os; os.chdir({str(tmp_path / 'empty')!r})\n{code}"
    done = run(sys.executable, "-c", code, check=False, SAR_REPOSITORY="", **env)
    assert "set REPOSITORY to its address" in done.stderr
    done = run(sys.executable, "-c", code, SAR_REPOSITORY=str(ROOT), **env)
    assert "64×64 images of 10 classes" in done.stdout
    assert (tmp_path / "empty/SAR/models/pipeline.py").is_file()
