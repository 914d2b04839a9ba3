"""12. Every flag of train.py, changed by itself, changes what a run does."""

import dataclasses
import shutil

import numpy as np
import pytest
from PIL import Image

from models import VQVAE, FlexVAR, FlexVARConfig, VQVAEConfig
from models.weights import save_weights
from tests.conftest import ALONE, fill
from tests.faults.harness import attempt, lines_of, log_of
from utils.config.training import DataConfig, TrainConfig
from utils.data.code_cache import CacheConfig, CacheFlags, build
from utils.runtime.files import digest

SIXTEEN = "--pn=1_2_3_4_5_6_8_10_13_16"
HYBRID = ["--model=hybrid", "--first_side=2", "--vis_num_samples=2"]
# Another value of each flag, and what both runs that are compared have in common.
CHANGED: dict[str, tuple[str, list[str]]] = {
    "dataset": ("folder", []),
    "data_path": ("B", ["--dataset=folder", "--data_path=A"]),
    "augment": ("flip", ["--dataset=folder", "--data_path=A"]),
    "on_bad_image": ("skip", ["--dataset=folder", "--data_path=bad"]),
    "bad_image_limit": ("0.5", ["--dataset=folder", "--data_path=bad", "--on_bad_image=skip"]),
    "vae_ckpt": ("other_vae.safetensors", []),
    "init_ckpt": ("model.safetensors", []),
    "first_side": ("3", [*HYBRID, "--pn=1_2_3_4"]), "hybrid_shared_positions": ("true", HYBRID),
    "hybrid_cross_scale": ("true", [*HYBRID, "--pn=1_2_3_4"]),
    "depth": ("3", []), "width": ("128", []), "num_classes": ("12", []), "aln": ("0.1", []), "alng": ("0.5", []),
    "label_drop": ("0.9", []), "pn": ("1_4", []), "supervision": ("image", []),
    "schedule": ("flexvar", [SIXTEEN, "--bs=2", "--micro_batch=2"]),
    "bs": ("16", []), "micro_batch": ("8", []), "ep": ("0.01", []), "max_steps": ("3", []), "lr": ("1e-4", []),
    "steps": ("3", []), "wp": ("0.5", []), "wpe": ("0.5", ["--ep=0.02"]), "twd": ("0.9", []), "tclip": ("0.01", []),
    "precision": ("bf16", []), "ema": ("0.5", []), "label_smoothing": ("0.2", []), "twde": ("9", ["--ep=0.02"]),
    "lr_decay": ("cosine", ["--ep=0.02", "--wpe=0.1"]),
    "training_mode": ("sf_full", ["--csf_weight=0.01"]),
    "sf_hybrid_from": ("4", ["--training_mode=sf_hybrid", "--sf_hybrid_from=2", "--csf_weight=0.01"]),
    "csf_weight": ("3", []), "ssr": ("last", []), "ssr_steps": ("2", []), "ssr_share": ("0.3", []),
    "scale_weights": ("equal", []),
    "rollout": ("argmax", []), "csf_target": ("ground_truth", []),
    "sf_top_k": ("2", []), "sf_top_p": ("0.1", []), "sf_cfg_scale": ("30", []),
    "code_cache": ("codes", ["--seed=3"]), "checkpoint_activations": ("true", []),
    "exp_name": ("other", []), "seed": ("9", []), "save_every_steps": ("1", ["--keep=9"]),
    "save_every_minutes": ("0.0001", ["--keep=9"]), "keep": ("1", []),
    "keep_every_epochs": ("1", ["--bs=650", "--micro_batch=650", "--keep=1"]),
    "vis_cfg_scale": ("40", ["--vis_num_samples=2"]), "vis_every": ("1", ["--vis_num_samples=2"]),
    "vis_num_samples": ("2", []), "vis_ema": ("true", ["--vis_num_samples=2", "--ema=0.99"]),
    "eval_every": ("1", []), "eval_images": ("32", []), "logger_type": ("tensorboard", []), "log_every": ("1", []),
}  # fmt: skip
# Those that one undisturbed process cannot show, and the test that does.
ELSEWHERE = {
    "workers": "tests/test_images.py: the error comes from a worker",
    "compile": "tests/test_speed.py",
    **dict.fromkeys(["shared_aln", "rollout_canvas"], "tests/test_var.py, tests/test_every_generator.py"),
    **dict.fromkeys(
        [
            "heads",
            "flow_depth",
            "flow_width",
            "flow_cross",
            "dropout",
            "latent_scaling",
            "latent_patch",
            "rollout_steps",
        ],
        "tests/test_flowar.py, tests/test_every_generator.py",
    ),
    "parallel": "tests/test_speed.py: two ranks",
    "encode_tf32": "tests/test_vqvae.py: on a GPU",
    **dict.fromkeys(["noise", "noise_neighbours", "noise_per", "noise_max"], "tests/test_rivals.py"),
    **dict.fromkeys(["cca_beta", "cca_lambda"], "tests/test_rivals.py"),
    **dict.fromkeys(["image_column", "label_column"], "tests/test_sources.py"),
    "out_dir": "all of this file",
    "check": "tests/test_scripts.py",
    "allow_change": "below",
    "reset_class_embedding": "tests/test_trainer.py",
    "model": "tests/test_hybrid.py",
    "on_nonfinite": "tests/test_finite.py",
    "max_skipped": "tests/test_finite.py",
    "timeout_minutes": "tests/faults/test_signals.py",
    **dict.fromkeys([f"wandb_{k}" for k in ("project", "entity", "run_name", "tags", "notes")], "tests/test_log.py"),
}


def flags_of_train() -> list[str]:
    groups = [f.default_factory for f in dataclasses.fields(TrainConfig)]
    return [f.name for group in groups for f in dataclasses.fields(group)]


def test_the_table_is_complete():
    known, flags = set(CHANGED) | set(ELSEWHERE), set(flags_of_train())
    assert not flags - known, f"new flags {flags - known}: add them to CHANGED above (another value), or to ELSEWHERE"
    assert not known - flags, f"there are no flags {known - flags}: take them out of CHANGED and ELSEWHERE above"


@pytest.fixture(scope="module")
def place(small_vae_file, tmp_path_factory):
    """Data folders, another tokenizer, weights and a code cache, by the names used above."""
    root = tmp_path_factory.mktemp("flags")
    for name, seed in (("A", 0), ("B", 1), ("bad", 2)):
        rng = np.random.default_rng(seed)
        for i in range(40):
            path = root / name / f"train/{i % 2}/{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(path)
        shutil.copytree(root / name / "train", root / name / "val")
    (root / "bad/train/0/00.png").write_bytes(b"")
    config = VQVAEConfig(32, (1, 1, 1), res_blocks=1, z_channels=32, codebook_size=32, codebook_dim=8)
    save_weights(fill(VQVAE(config), 3), root / "other_vae.safetensors")
    transformer = FlexVARConfig(depth=2, width=64, num_classes=10, codebook_size=32, codebook_dim=8)
    save_weights(fill(FlexVAR(transformer), 4), root / "model.safetensors")
    cache = CacheConfig(out=str(root / "codes"), vae_ckpt=str(small_vae_file), image_size=16, crops=1)
    build(CacheFlags(cache, DataConfig(dataset="digits", workers=0)), ALONE)
    return root


def observe(flags, directory) -> dict[str, object]:
    """What a run does, but for times, its own name, and the record of its flags."""
    status = attempt([*flags, f"--out_dir={directory}"])
    lines = [line.replace(str(directory), "") for line in log_of(directory).splitlines()]
    timed = ("ETA", "the first step took")
    said = [line.split()[0] if any(t in line for t in timed) else line for line in lines]  # the run's name, no speed
    files = {
        str(p.relative_to(directory)): digest(p) if p.suffix in (".png", ".safetensors") else ""
        for p in directory.rglob("*")
        if p.is_file() and "tfevents" not in p.name
    }
    metrics = lines_of(directory) if (directory / "metrics.jsonl").is_file() else []
    return {
        "status": status,
        "said": said,
        "files": files,
        "metrics": metrics,
        "boards": any(directory.glob("tensor*")),
    }


@pytest.mark.faults
@pytest.mark.parametrize("name", CHANGED)
def test_each_flag_reaches_the_run(name, tiny, place, tmp_path):
    value, common = CHANGED[name]

    def absolute(flag):
        name, _, value = flag.partition("=")
        return f"{name}={place / value}" if (place / value).exists() and value else flag

    shared = [absolute(f) for f in [*tiny, "--max_steps=4", "--save_every_steps=2", "--log_every=2", *common]]
    changed = [absolute(f"--{name}={value}")]
    if name == "dataset":
        changed.append(f"--data_path={place / 'A'}")
    other = shared + changed
    if name == "code_cache":  # which is in place of a data set
        other = [flag for flag in other if not flag.startswith("--dataset")]
    runs = [observe(flags, tmp_path / where / "run") for where, flags in (("a", shared), ("b", other))]
    stopped = {"on_bad_image": [1, 1], "bad_image_limit": [1, 0]}  # one image in 40 is bad
    assert [run["status"] for run in runs] == stopped.get(name, [0, 0]), runs[1]["said"]
    assert runs[0] != runs[1]


@pytest.mark.parametrize("change", [["--bs=4"], ["--seed=1"]])
def test_what_cannot_change_is_refused_unless_allowed(change, tiny, tmp_path):
    flags = [*tiny, "--max_steps=3", f"--out_dir={tmp_path / 'run'}"]
    assert attempt(flags) == 0
    assert attempt([*flags, "--max_steps=4", *change]) == 1
    assert f"holds a run with other settings: {change[0].split('=')[0]} " in log_of(tmp_path / "run")
    assert attempt([*flags, "--max_steps=4", *change, "--allow_change=true"]) == 0, log_of(tmp_path / "run")
    assert f"resumed with another setting: {change[0].split('=')[0]} " in log_of(tmp_path / "run")
