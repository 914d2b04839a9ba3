"""13. Without git, without a GPU, from a directory that cannot be written, with spaces and other letters in every path;
14. an evaluation killed midway on 1, 2 and 3 ranks."""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.faults.harness import children, killed
from tests.test_evaluate import flags as evaluation_flags
from tests.test_evaluate import numbers, report_of


def obey_permissions() -> None:
    """Take from root what lets it write where nobody may."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability)  # PR_CAPBSET_DROP, takes effect with the exec


@pytest.mark.faults
def test_odd_places(tiny, tmp_path):
    """A copy of the code without .git; as a user who may write nowhere but in --out_dir."""
    where = tmp_path / "a place with ü"
    shutil.copytree(ROOT, where / "code", ignore=shutil.ignore_patterns(".git", ".venv", "out", "tests", "*.pyc"))
    vae = next(f for f in tiny if f.startswith("--vae_ckpt=")).partition("=")[2]
    shutil.copy(vae, where / "tökenizer.safetensors")
    (where / "out ä").mkdir()
    for path in (where / "out ä", *where.rglob("*")):
        path.chmod(0o777 if path.name == "out ä" else 0o555 if path.is_dir() else 0o444)
    flags = [*tiny, f"--vae_ckpt={where / 'tökenizer.safetensors'}", f"--out_dir={where / 'out ä/run 1'}"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HOME": str(where / "out ä"), "PYTHONDONTWRITEBYTECODE": "1"}
    for expected in ("steps 0 to 12", "finished at step 12"):
        done = subprocess.run(
            [sys.executable, "train.py", *flags],
            cwd=where / "code",
            env=env,
            preexec_fn=obey_permissions,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert not (where / "code/out").exists()
        assert expected in done.stderr
    probe = [sys.executable, "-c", "open('x', 'w')"]
    denied = subprocess.run(probe, cwd=where / "code", preexec_fn=obey_permissions, capture_output=True)
    assert b"PermissionError" in denied.stderr  # so the directory really could not be written
    start = json.loads((where / "out ä/run 1/starts.jsonl").read_text().splitlines()[0])
    assert start["git"] == ""
    assert start["command"][0] == "train.py"


@pytest.fixture(scope="module")
def judged(saved, real, tmp_path_factory):
    """The evaluation that nothing disturbed."""
    out = tmp_path_factory.mktemp("judged")
    flags = [str(f) for f in evaluation_flags(saved, real, out, "--save_npz=true", "--num_samples=5", "--batch=2")]
    subprocess.run([sys.executable, *flags], cwd=ROOT, check=True, capture_output=True)
    return out


@pytest.mark.faults
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_an_evaluation_killed_midway(ranks, judged, saved, real, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    more = ["--save_npz=true", "--num_samples=5", "--batch=2"]
    command += [str(f) for f in evaluation_flags(saved, real, tmp_path, *more)]
    env, features, kills = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}, tmp_path / "features", 0
    for wanted in (4, 12):
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and len(list(features.glob("[0-9]*.safetensors"))) < wanted:
            time.sleep(0.01)
        workers = children(process.pid)
        kills += process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(0.5)
        assert not killed(workers)
    assert kills == 2
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    assert report_of(tmp_path)["samples"] == 50
    assert np.array_equal(*(np.load(p / "samples.npz")["arr_0"] for p in (tmp_path, judged)))
    assert numbers(report_of(tmp_path)) == pytest.approx(numbers(report_of(judged)), rel=1e-6, abs=1e-9)
