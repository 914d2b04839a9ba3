"""What must hold of every generator: the same tests, run over the table."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models import Guidance, SamplingConfig
from models.flowar import FlowAR
from models.generators import GENERATORS
from models.head import sample_tokens
from models.hybrid import HybridVAR
from models.pipeline import open_pipeline
from models.sampling import image_uniforms, sample_codes
from models.scales import ScaleSchedule
from models.weights import load_tokenizer
from sar_trainer import SARTrainer
from tests import recipes
from tests.conftest import ALONE, config_of, tool, train_on_two_ranks, worst
from tests.test_trainer import assert_same, lines_of, weights_of
from train import build
from trainer import Trainer
from utils.data import code_cache
from utils.runtime.checkpoint import main as export
from utils.runtime.checkpoint import newest_checkpoint, read_manifest
from utils.runtime.files import read_json

DRAWN = ["--sf_top_k=0"]
MORE = {
    "flexvar": DRAWN,
    "hybrid": [*DRAWN, "--first_side=2"],
    "var": DRAWN,
    "var shared": [*DRAWN, "--shared_aln"],
    "flowar": ["--flow_width=64", "--flow_depth=1", "--latent_scaling=0.8", "--rollout_steps=4"],
    "flowar pixels": [
        *("--flow_width=64", "--flow_depth=1", "--latent_scaling=0.8", "--rollout=sample", "--rollout_steps=4"),
        "--supervision=image_pixels",
    ],
    "flowar cross": ["--flow_width=64", "--flow_depth=1", "--latent_scaling=0.8", "--rollout=sample", "--flow_cross"],
}
assert set(GENERATORS) == {name.split()[0] for name in MORE}


@pytest.fixture(params=MORE)
def kind(request) -> str:
    return request.param


def flags_of(kind: str, files: dict[str, Path]) -> list[str]:
    """The flags of a small run of each kind: digits at 16×16, two blocks of width 64, three steps."""
    name = kind.split()[0]
    small = ["--dataset=digits", "--workers=0", "--depth=2", "--width=64", "--pn=1_2_4", "--schedule=fixed", "--bs=8"]
    small += ["--max_steps=3", "--lr=1e-2", "--log_every=1", "--eval_images=16", "--vis_num_samples=4"]
    vae = f"--vae_ckpt={files[GENERATORS[name].pathway]}"
    return [*small, vae, f"--model={name}", *MORE[kind], "--csf_weight=0.5"]


@pytest.fixture(scope="session")
def files(small_vae_file, small_residual_file, small_kl_file) -> dict[str, Path]:
    """A tokenizer of each pathway."""
    return {"upsampling": small_vae_file, "residual": small_residual_file, "latent": small_kl_file}


@pytest.fixture
def own(kind, files, tmp_path) -> list[str]:
    return [*flags_of(kind, files), f"--out_dir={tmp_path / 'run'}"]


RANKS = ["--micro_batch=4", "--logger_type=none"]


def can_be_sharded(kind: str) -> bool:
    return "fsdp" in GENERATORS[kind.split()[0]].goes_with.get("parallel", ("fsdp",))


@pytest.fixture(scope="session")
def two_ranks(files, tmp_path_factory) -> Path:
    """Every kind trained by two ranks, and sharded where it can be: DIR/KIND, DIR/KIND sharded."""
    directory = tmp_path_factory.mktemp("ranks")
    runs = {kind: [*flags_of(kind, files), *RANKS] for kind in MORE}
    runs |= {f"{kind} sharded": [*runs[kind], "--parallel=fsdp"] for kind in MORE if can_be_sharded(kind)}
    more = {"accumulated": ["--micro_batch=2"], "bf16": ["--precision=bf16"]}
    for name, changed in more.items():
        runs[f"flexvar {name}"] = [*runs["flexvar"], *changed]
        runs[f"flexvar {name} sharded"] = [*runs["flexvar"], *changed, "--parallel=fsdp"]
    train_on_two_ranks(directory, runs)
    return directory


def test_sharded_ranks_accumulate_gradients_as_others_do(two_ranks):
    found, wanted = (weights_of(two_ranks / f"flexvar accumulated{name}") for name in (" sharded", ""))
    assert_same(found, wanted, 2e-5)


def test_a_checkpoint_says_what_a_weight_file_would_not_hold(two_ranks):
    kinds = {"flexvar": {}, "flowar": {"scaling": 0.8}, "flowar pixels": {"through_pixels": True}}
    for kind, wanted in kinds.items():
        found = read_manifest(newest_checkpoint(two_ranks / kind))["beside_weights"]
        assert found.items() >= wanted.items()
        status, _, said = tool(export, "export", two_ranks / kind, two_ranks / f"{kind}.safetensors")
        assert status == bool(wanted), said


def test_sharded_ranks_gather_half_precision_and_train_alike(two_ranks):
    """Weights are gathered in bf16, and kept in fp32."""
    found, wanted = (weights_of(two_ranks / name) for name in ("flexvar bf16 sharded", "flexvar bf16"))
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    losses = [
        [line["train/loss"] for line in lines_of(two_ranks / name) if "train/loss" in line]
        for name in ("flexvar bf16 sharded", "flexvar bf16")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert any(not torch.equal(found[name], wanted[name]) for name in wanted)  # the gathered weights are rounded


def alike(a: Image.Image, b: Image.Image) -> bool:
    """True for equal pictures, but for roundings to the next byte."""
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max()) <= 1


def alone(flags: list[str], *more: str | Path) -> Trainer:
    trainer = build(config_of(flags, *map(str, more)), ALONE)
    trainer.fit()
    return trainer


def test_resume_is_exact_and_images_are_drawn_from_the_run(kind, own, tmp_path):
    common = [*own, "--ema=0.9", "--wpe=0.1", "--twde=0.5"]
    alone(common, f"--out_dir={tmp_path / 'whole'}")
    for steps in (2, 3):
        alone(common, f"--out_dir={tmp_path / 'pieces'}", f"--max_steps={steps}")
    assert_same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "pieces"))
    pipeline = open_pipeline(str(tmp_path / "pieces"))
    assert pipeline.schedule.sides == pipeline.model.trim(pipeline.schedule).sides
    options = {"cfg": 2.0, "top_k": 0, "flow_steps": 6}
    together = pipeline([1, 2], seed=3, **options)
    assert alike(together[1], pipeline(2, seed=4, **options)[0])  # an image depends on its own seed
    assert not alike(together[1], pipeline(2, seed=5, **options)[0])
    pipeline.save_pretrained(tmp_path / "saved")
    again = open_pipeline(str(tmp_path / "saved"))
    first = again([1, 2], seed=3, **options)[0]
    # Its convolutions are laid out otherwise; through pixels that reaches the next scale.
    assert alike(first, together[0]) if "pixels" in kind else first.tobytes() == together[0].tobytes()
    steps = pipeline.steps(1, seed=3, **options)
    assert list(steps) == list(pipeline.schedule.sides)
    assert steps[4][0].tobytes() == pipeline(1, seed=3, **options)[0].tobytes()


def test_weight_zero_is_teacher_forcing_bit_for_bit(own, tmp_path):
    tf = [f for f in own if not f.startswith(("--csf", "--sf", "--rollout"))]
    trainers = [
        alone(tf, "--training_mode=teacher_forcing", f"--out_dir={tmp_path / 'tf'}"),
        alone(tf, "--csf_weight=0", f"--out_dir={tmp_path / 'sar'}"),
    ]
    assert [type(t) for t in trainers] == [Trainer, SARTrainer]
    assert_same(*(t.model.state_dict() for t in trainers))


def test_two_ranks_train_as_one(kind, own, two_ranks, tmp_path):
    alone(own, *RANKS, f"--out_dir={tmp_path / 'one'}")
    for name in (kind, f"{kind} sharded")[: 1 + can_be_sharded(kind)]:
        assert_same(weights_of(two_ranks / name), weights_of(tmp_path / "one"), 2e-5)
        pictures = [(d / "samples/step_0000003.png").read_bytes() for d in (two_ranks / name, tmp_path / "one")]
        assert pictures[0] == pictures[1] or kind.startswith("flowar")  # whose numbers no token rounds


def test_a_run_from_the_cache_equals_one_from_images(own, tmp_path):
    vae = [f for f in own if f.startswith("--vae_ckpt")][-1]
    pn = ["--pn=1_2_4"] if "residual" in vae or "kl." in vae else []
    cached = [
        "--dataset=digits",
        "--workers=0",
        vae,
        *pn,
        *(f for f in own if f.startswith("--supervision")),
        "--image_size=16",
        "--crops=1",
        f"--out={tmp_path / 'codes'}",
    ]
    code_cache.build(code_cache.parse(code_cache.CacheFlags, cached), ALONE)
    assert read_json(tmp_path / "codes/manifest.json")["sides"] == ([1, 2, 4] if pn else [1, 2, 3, 4])
    of_cache = [f"--code_cache={tmp_path / 'codes'}", *(f for f in own if not f.startswith("--dataset"))]
    alone(own, f"--out_dir={tmp_path / 'images'}")
    alone(of_cache, f"--out_dir={tmp_path / 'cache'}")
    images, cached = (lines_of(tmp_path / d) for d in ("images", "cache"))
    if "kl." in vae:  # moments are stored in fp16
        first = [next(line["train/loss"] for line in lines if "train/loss" in line) for lines in (images, cached)]
        assert first[0] == pytest.approx(first[1], rel=2e-3)
    else:
        assert_same(weights_of(tmp_path / "images"), weights_of(tmp_path / "cache"))
        assert images[-1]["val/loss"] == cached[-1]["val/loss"]
    if pn:
        with pytest.raises(ValueError, match=r"of another sides: \[1, 2, 4\], not \[1, 4\]"):
            alone(of_cache, "--pn=1_4", f"--out_dir={tmp_path / 'other'}")


@torch.no_grad()
def test_cached_sampling_equals_the_parallel_pass(own, tmp_path):
    trainer = build(config_of(own, f"--out_dir={tmp_path / 'run'}"), ALONE)
    model, pathway, schedule = trainer.model.eval(), trainer.pathway, trainer.config.model.scales
    for p in model.parameters():  # far from the initial weights, at which logits say little
        p.add_(torch.randn_like(p), alpha=0.1)
    labels, seeds, first = torch.tensor([3, 7, 1]), [5, 6, 7], 1 if isinstance(model, HybridVAR) else 0
    codes = sample_codes(model, pathway, labels, schedule, SamplingConfig(Guidance(), 20, 0.9), seeds)
    tokens = torch.cat(list(codes.values()), dim=1)
    logits = model(labels, model.inputs(tokens, pathway, schedule), schedule, first=first)
    if isinstance(model, FlowAR):  # what conditions the head, scale by scale
        state, canvas, inputs = model.init_cache(labels, schedule.total), pathway.canvas(schedule), None
        for i, (s, wanted) in enumerate(zip(schedule.sides, schedule.split(logits), strict=True)):
            assert worst(model.decode_scale(state, inputs, s), wanted) < 1e-5
            inputs = canvas.add(i, codes[s])
        return
    uniforms = image_uniforms(seeds, model.uniforms_needed(schedule), labels.device)[:, : schedule.total]
    before = schedule.offsets[first]
    assert torch.equal(sample_tokens(logits, 20, 0.9, uniforms[:, before:]), tokens[:, before:])


def test_activations_can_be_computed_again(own, tmp_path):
    runs = [alone(own, f"--out_dir={tmp_path / str(more)}", *more) for more in ([], ["--checkpoint_activations"])]
    assert_same(*(t.model.state_dict() for t in runs), 1e-6)


@torch.no_grad()
def test_painting_holds_the_same_codes_in_half_precision(files):
    images, schedule = recipes.plain_images(3, 2, 16), ScaleSchedule((1, 2, 4))
    for path in files.values():
        vae = load_tokenizer(path, scaling=0.8)
        wanted = vae.known(images, schedule, "latent").at(1)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(vae.known(images, schedule, "latent").at(1), wanted), path
