from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.harness import attempt


@pytest.fixture(scope="session")
def tiny(small_vae_file) -> list[str]:
    """SAR on digits with everything that a resume must bring back: 12 steps, a save every 3, log lines across saves."""
    return [
        "--dataset=digits", "--workers=0", f"--vae_ckpt={small_vae_file}", "--depth=2", "--width=64", "--pn=1_2_4",
        "--schedule=fixed", "--bs=8", "--micro_batch=4", "--max_steps=12", "--lr=1e-3", "--wpe=0.1", "--log_every=4",
        "--save_every_steps=3", "--eval_images=16", "--eval_every=6", "--vis_num_samples=0", "--ema=0.9",
        "--csf_weight=0.5", "--logger_type=none", "--init_ckpt=",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def undisturbed(tiny, tmp_path_factory) -> Path:
    """The run that all others must equal."""
    directory = tmp_path_factory.mktemp("faults") / "undisturbed"
    assert attempt([*tiny, f"--out_dir={directory}"]) == 0, Path(f"{directory}.log").read_text()
    return directory
