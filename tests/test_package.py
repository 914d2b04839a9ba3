"""`pip install .`: one package, sar, that needs no checkout; and what pyproject and requirements.txt say alike."""

import os
import subprocess
import sys
import tomllib
import zipfile

import pytest
from PIL import Image

from scripts.build_wheel import MODULES, PACKAGES, renamed, write_package
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def listed(path) -> set[str]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / path).read_text().splitlines())
    return {line for line in lines if line}


def elsewhere(directory, *command) -> list[str]:
    """Lines that a process prints which sees the installed copy and no checkout."""
    env = {**os.environ, "PYTHONPATH": str(directory), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *command]
    done = subprocess.run(command, cwd=directory, env=env, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip().splitlines()


def test_dependencies_stand_in_pyproject_and_the_lists_repeat_them():
    assert listed("requirements.txt") == set(PROJECT["dependencies"])
    assert listed("tests/requirements.txt") == set(PROJECT["optional-dependencies"]["dev"])
    assert set(PROJECT["optional-dependencies"]["demo"]) <= listed("tests/requirements.txt")


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("from models.scales import ScaleSchedule", "from sar.models.scales import ScaleSchedule"),
        ("from models import VQVAE", "from sar.models import VQVAE"),
        ("    from utils.runtime.files import read_json", "    from sar.utils.runtime.files import read_json"),
        ("from trainer import Trainer", "from sar.trainer import Trainer"),
        ("from sar_trainer import SARTrainer", "from sar.sar_trainer import SARTrainer"),
        ("from modelscope import x", "from modelscope import x"),
        ("from torch.utils.data import Dataset", "from torch.utils.data import Dataset"),
        ("import utils.runtime.threads  # noqa", "import sar.utils.runtime.threads  # noqa"),
        ("import sampleinfo", "import sampleinfo"),
    ],
)
def test_imports_of_neighbours_are_renamed_and_others_stay(line, wanted):
    assert renamed(f"x = 1\n{line}\n") == f"x = 1\n{wanted}\n"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The package as a wheel holds it, and nothing else of the checkout."""
    folder = tmp_path_factory.mktemp("site")
    write_package(ROOT, folder / "sar", PROJECT["version"])
    return folder


def test_an_installed_copy_is_one_package(installed, saved):
    draw = f"open_pipeline({str(saved)!r})([3], seed=1, cfg=1.0, top_k=0)[0].tobytes().hex()"
    code = "import sar, sys, sar.train, sar.train_tokenizer, sar.evaluate, sar.demo\n"
    code += "from sar.models import SARPipeline, open_pipeline, build_vae_var, VAR\n"
    code += f"print({draw})\nprint(sar.__version__, sorted(set(sys.modules) & set({(*PACKAGES, *MODULES)!r})))"
    picture, about = elsewhere(installed, "-c", code)[-2:]
    assert about == f"{PROJECT['version']} []"
    code = f"from models import open_pipeline\nprint({draw})"
    assert elsewhere(ROOT, "-c", code)[-1] == picture  # a checkout draws the same


def test_its_commands_are_functions_and_run_as_modules(installed, saved):
    code = "from importlib import import_module\n"
    for place in PROJECT["scripts"].values():
        module, _, name = place.partition(":")
        code += f"assert callable(import_module({module!r}).{name})\n"
    elsewhere(installed, "-c", code)
    elsewhere(installed, "-m", "sar.sample", "--ckpt", str(saved), "--classes=3", "--out=picture.png")
    assert Image.open(installed / "picture.png").size[0] >= 64
    code = "from sar.pretrained.download import HERE; print(HERE)"
    assert elsewhere(installed, "-c", code)[-1] == str(installed / "pretrained")  # not among the package's files


@pytest.mark.parametrize("module", ["sar.train"])
def test_an_installed_copy_trains(module, installed, flags, tmp_path):
    elsewhere(installed, "-m", module, *flags)
    assert (tmp_path / "run/checkpoints/step_0000003/model.safetensors").is_file()
    elsewhere(installed, "-m", "sar.utils.runtime.checkpoint", "verify", str(tmp_path / "run"))


def test_a_wheel_is_built_of_a_checkout(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*command, tmp_path, ROOT], check=True, cwd=tmp_path, timeout=300, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("sar-*.whl"))).namelist()
    assert {n.split("/")[0] for n in names} == {"sar", f"sar-{PROJECT['version']}.dist-info"}
    sources = [p for name in PACKAGES for p in (ROOT / name).rglob("*.py")]
    assert {f"sar/{p.relative_to(ROOT)}" for p in sources} <= set(names)
    assert {f"sar/{name}.py" for name in MODULES} <= set(names)
