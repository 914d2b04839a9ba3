"""The reference models, rebuilt from the recipe that made them, and small runs to train."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from models import VQVAE, FlexVAR, FlexVARConfig, ScaleSchedule, VQVAEConfig
from models.kl_vae import KLConfig
from models.pipeline import SARPipeline
from models.residual_vqvae import ResidualVQVAEConfig
from models.weights import save_weights
from tests import recipes
from utils.config.training import TrainConfig
from utils.runtime.distributed import Ranks, ranks
from utils.runtime.flags import parse

# Autograd starts its threads at the first backward: none here, where there is no GPU. After a FakeTensorMode it would
# start some for the devices that this pretends, and the forks below could not run backward.
torch.ones(1, requires_grad=True).sum().backward()

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests/data"
ALONE = Ranks(0, 1, torch.device("cpu"))


def manifest() -> dict:
    """Keys and shapes of the released files."""
    return json.loads(gzip.decompress((DATA / "checkpoint_manifest.json.gz").read_bytes()))


def fill(module: nn.Module, seed: int) -> nn.Module:
    """Fill a model by FlexVAR's recipe."""
    return recipes.fill(module, seed, recipes.flexvar_value)


@pytest.fixture(scope="session")
def expected() -> dict[str, Tensor]:
    """What the released implementation computes with the reference models, and the images it was given."""
    values = load_file(DATA / "flexvar/expected.safetensors")
    values = {name: v if v.is_floating_point() else v.long() for name, v in values.items()}  # stored as int16
    return {"images": recipes.plain_images(13, 2, 64), "labels": torch.tensor([3, 7]), **values}


@pytest.fixture(scope="session")
def vae() -> VQVAE:
    return fill(VQVAE(VQVAEConfig(base_width=32, z_channels=64, codebook_size=128)), 11).requires_grad_(False)


@pytest.fixture
def model() -> FlexVAR:
    config = FlexVARConfig(depth=2, width=128, num_classes=10, codebook_size=128, drop_path=0.1)
    return fill(FlexVAR(config), 12)


@pytest.fixture(scope="session")
def schedule() -> ScaleSchedule:
    return ScaleSchedule((1, 2, 3, 4))


@pytest.fixture(scope="session")
def small_vae_file(tmp_path_factory) -> Path:
    """A tokenizer with random weights: 16×16 pixels ↔ 4×4 latents, 32 codes."""
    torch.manual_seed(0)
    config = VQVAEConfig(32, (1, 1, 1), res_blocks=1, z_channels=32, codebook_size=32, codebook_dim=8)
    path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    save_weights(VQVAE(config), path)
    return path


@pytest.fixture(scope="session")
def small_residual_file(tmp_path_factory) -> Path:
    """A residual tokenizer by the recipe: 16×16 pixels ↔ 4×4 latents, 32 codes."""
    config = ResidualVQVAEConfig(32, (1, 1, 1), 1, z_channels=8, codebook_size=32, codebook_dim=8, counted_scales=3)
    path = tmp_path_factory.mktemp("vae") / "residual.safetensors"
    save_weights(recipes.fill(config.build(), 5, recipes.var_value), path)
    return path


@pytest.fixture(scope="session")
def small_kl_file(tmp_path_factory) -> Path:
    """A KL autoencoder by the recipe: 16×16 pixels ↔ 4×4 latents of 4 channels."""
    config = KLConfig(32, (1, 1, 1), 1, z_channels=4, encoder_attention=(2,))
    path = tmp_path_factory.mktemp("vae") / "kl.safetensors"
    save_weights(recipes.fill(config.build(), 5, recipes.flowar_value), path)
    return path


@pytest.fixture
def flags(small_vae_file, tmp_path) -> list[str]:
    """A run of seconds: digits at 16×16, two blocks of width 64, three steps."""
    return [
        "--dataset=digits", "--workers=0", f"--vae_ckpt={small_vae_file}", "--depth=2", "--width=64", "--pn=1_2_4",
        "--schedule=fixed", "--bs=8", "--max_steps=3", "--lr=1e-2", "--log_every=1", "--eval_images=16",
        "--vis_num_samples=4", f"--out_dir={tmp_path / 'run'}",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def saved(tmp_path_factory, vae):
    """A pipeline of random weights: 64×64 images of ten classes."""
    model = fill(FlexVAR(FlexVARConfig(depth=2, width=128, num_classes=10, codebook_size=128)), 12)
    path = tmp_path_factory.mktemp("eval") / "pipeline"
    SARPipeline.of(vae, model, ScaleSchedule((1, 2, 3, 4))).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """Twelve pictures in a folder."""
    path = tmp_path_factory.mktemp("real") / "images"
    path.mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        pixels = np.kron(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8), np.ones((16, 16, 1), dtype=np.uint8))
        Image.fromarray(pixels).save(path / f"{i}.png")
    return path


@pytest.fixture
def spy(tmp_path) -> Path:
    """A stand-in for Python that writes its arguments down."""
    path = tmp_path / "python"
    path.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "--" "$@" >> "$(dirname "$0")/calls"\n')
    path.chmod(0o755)
    return path


def calls_of(spy: Path) -> list[list[str]]:
    """The arguments of each call of the stand-in."""
    if not (spy.parent / "calls").exists():
        return []
    return [call.strip().split("\n") for call in (spy.parent / "calls").read_text().split("--\n")[1:]]


def config_of(flags: list[str], *more: str) -> TrainConfig:
    return parse(TrainConfig, [*flags, *more])


def run(*command: str | Path, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """A real process of the project, from its root."""
    done = subprocess.run(
        [str(c) for c in command], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **env}, text=True,
        capture_output=True, timeout=1500,
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def torchrun(processes: int, *command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return run(*launcher, *command, **env)


def on_ranks(processes: int, function: Callable[[], None]) -> None:
    """Runs a function on several ranks, forks of this process: as under torchrun, without seconds of imports."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as logs:
        free.bind(("127.0.0.1", 0))
        env = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
        free.close()
        sys.stdout.flush()
        children = {}
        for rank in range(processes):
            log = Path(logs) / f"{rank}.log"
            child = os.fork()
            if child == 0:
                run_as_rank(function, log, {**env, "RANK": rank, "LOCAL_RANK": rank})
            children[child] = log
        failed, deadline = [], time.monotonic() + 300
        while children:
            for child in list(children):
                ended, status = os.waitpid(child, os.WNOHANG)
                if not ended:
                    continue
                log = children.pop(child)
                if status:
                    failed.append(log.read_text())
                    deadline = min(deadline, time.monotonic() + 5)  # for those that wait for this one
            for child in children if time.monotonic() > deadline else ():
                os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
        assert not failed, "\n".join(failed)


def run_as_rank(function: Callable[[], None], log: Path, env: dict[str, object]) -> None:
    """The life of a forked rank: it never returns."""
    status = 1
    try:
        os.environ.update({name: str(value) for name, value in env.items()})
        torch.set_num_threads(1)  # a fork that asks for the threads of its parent waits for ever
        os.sched_getaffinity = lambda _: {0}  # and so may not believe that it has more cores
        file = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
        function()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def tool_on_ranks(processes: int, main: Callable[[], None], *arguments: str | Path) -> None:
    """Runs a command line's `main` on several ranks."""
    on_ranks(processes, lambda: print(tool(main, *arguments, check=True)))


def train_on_two_ranks(directory: Path, runs: dict[str, list[str]]) -> None:
    """Runs of train.py by their names and flags, one after the other in one process group, into DIRECTORY/NAME."""
    from train import build

    def train() -> None:
        with ranks() as me:
            for name, flags in runs.items():
                build(config_of(flags, f"--out_dir={directory / name}"), me).fit()

    on_ranks(2, train)


def tool(main: Callable[[], None], *arguments: str | Path, check: bool = False) -> tuple[int, str, str]:
    """Runs a command line's `main` here, without a new process: status, stdout, stderr."""
    out, err, status, threads = io.StringIO(), io.StringIO(), 0, torch.get_num_threads()
    with patch.object(sys, "argv", ["tool", *map(str, arguments)]), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as end:  # a message is what Python would print, with status 1
            status = end.code or 0 if isinstance(end.code, int | None) else 1
            print("" if isinstance(end.code, int | None) else end.code, file=err)
        finally:
            torch.set_num_threads(threads)
    assert not check or status == 0, out.getvalue() + err.getvalue()
    return status, out.getvalue(), err.getvalue()


@pytest.fixture
def stages_here(monkeypatch):
    """Stages of the quickstart and of studies run here, one after the other, without a new process for each."""
    import train
    import train_tokenizer
    from experiments import quickstart, study_cifar10
    from utils.data import code_cache

    entries = {"train.py": train, "train_tokenizer.py": train_tokenizer, "utils.data.code_cache": code_cache}

    def launch(command, processes=0):
        began = time.perf_counter()
        name, *flags = [word for word in command if word != "-m"]
        tool(entries[name].main, *flags, check=True)
        return time.perf_counter() - began

    for module in (quickstart, study_cifar10):
        monkeypatch.setattr(module, "launch", launch)
    pool = SimpleNamespace(map=map)  # signals can be caught in the main thread only
    monkeypatch.setattr(study_cifar10, "ThreadPoolExecutor", lambda _: nullcontext(pool))


def worst(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest wanted value."""
    assert found.shape == wanted.shape
    return ((found - wanted).abs().max() / wanted.abs().max()).item()
