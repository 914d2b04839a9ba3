import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from PIL import Image

from evaluate import main as evaluate
from experiments.figures import main as figures
from models import Guidance, SamplingConfig, ScaleSchedule, generate
from models.editing import inpaint
from models.flow_head import FlowSampler, FlowTarget, euler_times
from models.flow_layers import TimeEmbedding, apply_rope, rope_tables
from models.flowar import FlowAR, FlowARConfig
from models.kl_vae import KLAutoencoder, KLConfig
from models.sampling import sample_codes
from models.weights import load_flexvar, save_weights
from sar_trainer import SARTrainer
from tests import recipes
from tests.conftest import ALONE, config_of, manifest, tool, worst
from train import build, build_model, main
from utils.data.datasets import CodeBatch, open_dataset
from utils.runtime.files import read_json

SCHEDULE = ScaleSchedule((1, 2, 4))


def flowar(**more) -> FlowAR:
    sizes = {"depth": 2, "width": 64, "num_classes": 10, "codebook_dim": 4, "sides": SCHEDULE.sides}
    config = FlowARConfig(**{**sizes, "flow_depth": 2, "flow_width": 64, "dropout": 0.0, **more})
    return recipes.fill(config.build(), 12, recipes.flowar_value)


@pytest.fixture(params=[False, True], ids=["plain", "cross"])
def model(request) -> FlowAR:
    return flowar(flow_cross=request.param)


@pytest.fixture(scope="module")
def vae() -> KLAutoencoder:
    """16×16 pixels ↔ 4×4 latents of 4 channels."""
    config = KLConfig(32, (1, 1, 1), 1, z_channels=4, encoder_attention=(2,), scaling=0.8)
    return recipes.fill(config.build(), 5, recipes.flowar_value).requires_grad_(False)


@pytest.fixture
def batch(vae) -> CodeBatch:
    torch.manual_seed(0)
    return CodeBatch(torch.tensor([3, 7]), vae.tokenize(recipes.plain_images(3, 2, 16), SCHEDULE.sides))


# ------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("name", ["FlowAR-S", "FlowAR-B (assumed, not released)", "FlowAR-L", "FlowAR-H"])
def test_full_size_keys_shapes_and_sizes_are_those_of_the_released_files(name):
    wanted, sizes = manifest()[name], manifest()[name]["config"]
    given = {key: torch.empty(shape, device="meta") for key, shape in wanted["tensors"].items()}
    found = FlowARConfig(**FlowARConfig.sizes_of(FlowARConfig.adapted(given)))
    assert (found.depth, found.width, found.heads) == (sizes["depth"], sizes["width"], sizes["heads"])
    assert (found.flow_depth, found.flow_width) == (sizes["head_depth"], sizes["head_width"])
    assert found.flow_cross == sizes["cross"]
    with torch.device("meta"):
        model = FlowAR(found)
    kept = {key: shape for key, shape in wanted["tensors"].items() if key != "mask" and "rope" not in key}
    assert {key: list(t.shape) for key, t in model.state_dict().items() if key != "layout"} == kept
    assert sum(p.numel() for p in model.parameters()) == wanted["parameters"]


def test_files_released_and_our_own_say_what_they_are(tmp_path):
    own = flowar(attention_heads=2, width=128)
    save_weights(own, tmp_path / "own.safetensors")
    assert replace(load_flexvar(tmp_path / "own.safetensors").config, dropout=0.0) == own.config
    released = flowar(width=96, attention_heads=4, sides=(1, 2, 4, 8, 16), flow_width=128)
    weights = {k: torch.nn.Parameter(t) for k, t in released.state_dict().items() if k != "layout"}
    weights |= {"mask": torch.zeros(1, 1, 341, 341), "encoder_blocks.0.attn.rope.freqs": torch.zeros(6)}
    torch.save(weights, tmp_path / "FlowAR.pth")
    found = load_flexvar(tmp_path / "FlowAR.pth")
    assert (found.config.heads, found.config.sides) == (4, (1, 2, 4, 8, 16))
    assert all(torch.equal(t, released.state_dict()[k]) for k, t in found.state_dict().items())
    sizes = ["--width=96", f"--depth={released.config.depth}", "--heads=4", "--flow_width=128"]
    sizes += [f"--flow_depth={released.config.flow_depth}", "--pn=1_2_4_8_16"]
    start = ["--model=flowar", "--schedule=fixed", f"--init_ckpt={tmp_path / 'FlowAR.pth'}", "--csf_weight=0"]
    config = config_of(start, *sizes)
    config = replace(config, run=replace(config.run, out_dir=str(tmp_path / "run")))
    vae = KLConfig(32, (1, 1, 1, 1, 1), 1, z_channels=4, scaling=1.0).build()
    model = build_model(config, vae, ["a", "b"])  # training goes on from such a file
    assert all(torch.equal(t, released.state_dict()[k]) for k, t in model.state_dict().items())
    weights["encoder_pos_embed_learned"] = torch.zeros(1, 21, 96)
    torch.save(weights, tmp_path / "FlowAR.pth")
    with pytest.raises(ValueError, match="it has 21 tokens, and does not say of which scales"):
        load_flexvar(tmp_path / "FlowAR.pth")


def test_another_schedule_and_tokenizers_without_scaling_are_refused(vae, flags, small_kl_file):
    with pytest.raises(ValueError, match="knows the scales 1_2_4 and no others, such as 1_4"):
        generate(flowar(), vae, torch.tensor([1]), ScaleSchedule((1, 4)), SamplingConfig(), [0])
    status, _, said = tool(main, *flags, "--model=flowar", f"--vae_ckpt={small_kl_file}", "--csf_weight=0")
    assert status == 1
    assert "train.py takes it as --latent_scaling" in said
    status, _, said = tool(main, *flags, "--model=flowar", "--csf_weight=0", "--latent_scaling=1")
    assert "needs a tokenizer of the latent pathway" in said


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--schedule=flexvar", "--pn=4_8_16"], "--schedule fixed"),
        (["--ssr=last"], "--ssr all"),
        (["--parallel=fsdp"], "--parallel ddp"),
        (["--csf_target=teacher_soft"], "--csf_target teacher or ground_truth or velocity only"),
        (["--sf_top_k=5"], "--sf_top_k 900"),
        (["--training_mode=sf_full"], "--training_mode teacher_forcing or csfl only"),
        (["--label_smoothing=0.1"], "--label_smoothing 0.0 only"),
        (["--alng=0.5"], "--alng 0.001 only"),
        (["--compile"], "--compile False only"),
    ],
)
def test_what_it_cannot_do_is_refused(more, message, flags, capsys):
    with pytest.raises(SystemExit):
        config_of(flags, "--model=flowar", *more)
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- the head


def test_times_are_the_published_grids():
    assert len(euler_times(25)) - 1 == len(euler_times(24)) - 1 == 24
    grid = euler_times(4)
    assert grid == pytest.approx([1, 0.3, 0.25, 0.125, 0])
    assert euler_times(50) == pytest.approx([1 - i / 50 for i in range(51)])
    for n in (2, 3, 25, 50, 51):
        times = euler_times(n)
        assert times[0] == 1
        assert times[-1] == 0
        assert times == sorted(times, reverse=True)
    with pytest.raises(ValueError, match="2 steps at least"):
        euler_times(1)


def test_times_are_truncated_in_single_precision():
    embed, seen = TimeEmbedding(8), []
    embed.mlp.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    t = torch.tensor([[0.65, 0.56, 0.68, 0.1239]])
    embed(t)
    whole = torch.tensor([650.0, 560.0, 680.0, 123.0])
    omega = torch.tensor([10000 ** (-k / 128) for k in range(128)])
    angles = whole[None, :, None] * omega
    assert torch.allclose(seen[0], torch.cat([angles.cos(), angles.sin()], -1), atol=1e-3)


def test_rotary_positions_by_their_definition():
    cos, sin = rope_tables((2, 4), 4, 16, torch.device("cpu"))
    x = torch.randn(1, 1, 20, 16)
    found = apply_rope(x, (cos, sin))
    for place, (n, row, column) in enumerate(
        [(2, r, c) for r in range(2) for c in range(2)] + [(4, r, c) for r in range(4) for c in range(4)]
    ):
        for k in range(8):
            position = (row if k < 4 else column) * 4 / n
            angle = position * 10000 ** (-2 * (k % 4) / 8)
            a, b = x[0, 0, place, 2 * k].item(), x[0, 0, place, 2 * k + 1].item()
            turned = a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)
            assert found[0, 0, place, 2 * k : 2 * k + 2].tolist() == pytest.approx(turned, abs=1e-5)


@torch.no_grad()
def test_scales_at_once_are_scales_one_by_one(model):
    head, z = model.head, torch.randn(2, 21, 64)
    x, t = torch.randn(2, 21, 4), torch.rand(2, 3)
    together = head(x, t, z, SCHEDULE.sides, 4)
    for i, s in enumerate(SCHEDULE.sides):
        span = SCHEDULE.span(i)
        alone = head(x[:, span], t[:, i : i + 1], z[:, span], (s,), 4)
        assert worst(alone, together[:, span]) < 1e-5


@torch.no_grad()
def test_euler_and_its_guidance_by_their_definitions(model):
    head, noise = model.head, torch.randn(2, 16, 4)
    z, z_u, weight, interval = torch.randn(2, 16, 64), torch.randn(2, 16, 64), 1.5, 0.28
    calls = []
    handle = head.register_forward_hook(lambda _, given, out: calls.append(len(given[0])))
    found = head.integrate(noise, euler_times(4), z, z_u, weight, interval, (4,), 4)
    handle.remove()
    assert calls == [2, 2, 4, 4]  # the unconditional half is not computed above the interval
    x, times = noise.double(), euler_times(4)
    for a, b in pairwise(times):
        t = torch.full((2, 1), a)
        v = head(x.float(), t, z, (4,), 4).double()
        if a <= interval:
            v_u = head(x.float(), t, z_u, (4,), 4).double()
            v = v_u + (1 + weight) * (v - v_u)
        x = x + (b - a) * v
    assert worst(found.double(), x) < 1e-5


def test_guidance_grows_from_none_to_cfg():
    model = flowar(sides=(1, 2, 4, 8, 16))
    weights = model.guidance_weights(SamplingConfig(Guidance("ramp", 4.3)), model.config.sides)
    assert weights == pytest.approx([3.3 * i / 4 for i in range(5)])
    assert not model.guided(SamplingConfig(Guidance("ramp", 1.0)), model.config.sides)
    assert not model.guided(SamplingConfig(Guidance("none", 5.0)), model.config.sides)
    assert model.guidance_weights(SamplingConfig(Guidance("constant", 3.0)), (1, 2)) == [2.0, 2.0]


# ------------------------------------------------------------------------------------------------ training


@pytest.fixture
def make(flags, vae, model):
    def make(*more: str):
        config = config_of(flags, "--model=flowar", "--latent_scaling=0.8", *more)
        trainer = SARTrainer(config, model, vae, open_dataset(config.data, 16, 0, "train"), None, ALONE)
        model.eval()
        return trainer

    return make


def plain_loss(model, z, first, tokens, time, noise, wanted=None):
    """Σ (s²/S²)·mean squared error, scale by scale."""
    total = 0.0
    for i, s in enumerate(SCHEDULE.sides[first:]):
        span = slice(
            SCHEDULE.offsets[first + i] - SCHEDULE.offsets[first],
            SCHEDULE.offsets[first + i + 1] - SCHEDULE.offsets[first],
        )
        t, x, e = time[:, i, None, None], tokens[:, span], noise[:, span]
        v = model.head((1 - t) * x + t * e, time[:, i : i + 1], z[:, span], (s,), 4)
        target = e - x if wanted is None else wanted[:, span]
        total = total + s * s / 16 * (v - target).square().mean()
    return total


@pytest.mark.parametrize("rollout", ["argmax", "sample", "cfg"])
@pytest.mark.parametrize("target", ["teacher", "velocity", "ground_truth"])
def test_a_step_equals_the_plain_one_in_loss_and_gradient(rollout, target, make, model, vae, batch):
    drawn = [] if rollout == "argmax" else ["--rollout_steps=4"]
    scale = ["--sf_cfg_scale=2"] if rollout == "cfg" else []
    trainer = make(f"--rollout={rollout}", f"--csf_target={target}", "--csf_weight=0.7", *drawn, *scale)
    labels, tokens = batch.labels, batch.tokens(SCHEDULE)
    torch.manual_seed(5)
    found, metrics = trainer.compute_loss(batch, SCHEDULE)
    found.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    torch.manual_seed(5)
    start = torch.randn(2, 21, 4)
    inputs = vae.pathway.inputs(tokens, SCHEDULE)
    z = model(labels, inputs, SCHEDULE)
    with torch.no_grad():
        null = model(torch.full_like(labels, 10), inputs, SCHEDULE)
    time, noise = torch.rand(2, 3), torch.randn(2, 21, 4)
    loss = plain_loss(model, z, 0, tokens, time, noise)
    with torch.no_grad():
        parts = []
        for i, s in enumerate(SCHEDULE.sides):
            span = SCHEDULE.span(i)
            times, weight = ([1.0, 0.0] if rollout == "argmax" else euler_times(4)), (2 - 1) * i / 2
            guided = (null[:, span], weight) if rollout == "cfg" and weight else (None, None)
            parts.append(model.head.integrate(start[:, span], times, z[:, span], *guided, 0.9, (s,), 4))
        rolled = torch.cat(parts, dim=1)
        t = time.repeat_interleave(torch.tensor(SCHEDULE.lengths), dim=1).unsqueeze(-1)
        points = (1 - t) * tokens + t * noise
        velocity = model.head(points, time, z, SCHEDULE.sides, 4)
    if target != "teacher":  # what the last scale draws feeds nothing: it is not drawn
        rolled[:, 5:] = 0
    fed = vae.pathway.inputs(rolled, SCHEDULE)
    second = model(labels, fed, SCHEDULE)[:, 1:]
    if target == "teacher":
        fresh = torch.rand(2, 2), torch.randn(2, 20, 4)
        csf = plain_loss(model, second, 1, rolled[:, 1:], *fresh)
    else:
        wanted = velocity[:, 1:] if target == "velocity" else None
        csf = plain_loss(model, second, 1, tokens[:, 1:], time[:, 1:], noise[:, 1:], wanted)
    wanted_loss = loss + 0.7 * csf
    wanted_loss.backward()
    assert found.item() == pytest.approx(wanted_loss.item(), rel=1e-4)
    for name, p in model.named_parameters():
        assert worst(gradients[name], p.grad) < 2e-3, name
    assert {"loss_tf", "loss_csf", "loss_side/4", "student_loss_side/2"} <= set(metrics)


def test_dropout_acts_in_training_only(vae, batch):
    model, tokens = flowar(dropout=0.5), batch.tokens(SCHEDULE)
    inputs = vae.pathway.inputs(tokens, SCHEDULE)
    with torch.no_grad():
        assert torch.equal(model(batch.labels, inputs, SCHEDULE), model(batch.labels, inputs, SCHEDULE))
        model.train()
        assert not torch.allclose(
            model(batch.labels, inputs, SCHEDULE), model(batch.labels, inputs, SCHEDULE), atol=1e-2
        )


def test_half_precision_stays_near_and_its_path_in_full(model, vae, batch):
    tokens = batch.tokens(SCHEDULE)
    inputs, point = vae.pathway.inputs(tokens, SCHEDULE), FlowTarget(tokens, torch.rand(2, 3), torch.randn(2, 21, 4))
    sampler = FlowSampler(0, 21, torch.randn(2, 21, 4), 4)
    with torch.no_grad():
        whole = model(batch.labels, inputs, SCHEDULE, point, sampler=sampler)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(batch.labels, inputs, SCHEDULE, point, sampler=sampler)
    assert half.loss.dtype == half.velocity.dtype == half.sampled.dtype == torch.float32
    assert half.loss.item() == pytest.approx(whole.loss.item(), rel=0.05)
    assert worst(half.sampled, whole.sampled) < 0.1


# ------------------------------------------------------------------------------------- the other entries


@pytest.fixture(scope="module")
def run_of_flowar(small_kl_file, tmp_path_factory):
    path = tmp_path_factory.mktemp("flowar") / "run"
    flags = [
        *("--dataset=digits", "--workers=0", f"--vae_ckpt={small_kl_file}", "--latent_scaling=0.8", "--model=flowar"),
        *("--depth=1", "--width=64", "--flow_width=64", "--flow_depth=1", "--pn=1_2_4", "--schedule=fixed", "--bs=8"),
        *("--max_steps=2", "--logger_type=none", "--vis_num_samples=0", "--eval_images=0", "--csf_weight=0"),
    ]
    build(config_of(flags, f"--out_dir={path}"), ALONE).fit()
    return path


@pytest.mark.parametrize("name", ["tf-vs-ar", "trajectory", "sf-inputs", "supervision"])
def test_the_papers_figures_can_be_drawn_of_it(name, run_of_flowar, tmp_path):
    out = tmp_path / "figure.png"
    tool(figures, name, "--ckpt", run_of_flowar, "--dataset=digits", "--n=2", "--out", out, check=True)
    assert Image.open(out).width > 60


def test_it_has_no_likelihoods(run_of_flowar, tmp_path):
    status, _, said = tool(
        figures, "exposure-bias", "--ckpt", run_of_flowar, "--dataset=digits", "--n=2", "--out", tmp_path / "x.md"
    )
    assert status == 1
    assert "this model's tokens are continuous" in said


def test_it_is_sampled_and_judged_with_its_own_settings(run_of_flowar, real, tmp_path):
    from sample import main as sample

    command = ["--ckpt", run_of_flowar, "--classes=1,2", "--n=1", "--cfg=2", "--flow_steps=4"]
    tool(sample, *command, "--out", tmp_path / "a.png", "--steps", tmp_path / "a.gif", check=True)
    status, _, said = tool(sample, "--ckpt", run_of_flowar, "--classes=1", "--top_k=5", "--out", tmp_path / "b.png")
    assert status == 1
    assert "--top_k has no effect with a FlowAR" in said
    judged = ["--ckpt", run_of_flowar, "--features=efficientnet_lite0", "--num_samples=1", "--num_classes_eval=8"]
    judged += ["--reference", real, "--image_size=16", "--flow_steps=4", "--guidance_interval=0.7"]
    tool(evaluate, *judged, "--out_dir", tmp_path / "e", check=True)
    settings = read_json(tmp_path / "e/report.json")["settings"]
    assert (settings["flow_steps"], settings["guidance_interval"]) == (4, 0.7)
    assert "fill_steps" not in settings


def test_painting_holds_known_latents(model, vae):
    images, masks = recipes.blocky_images(3, 2, 16), torch.zeros(2, 1, 16, 16)
    masks[..., 8:] = 1
    how = SamplingConfig(Guidance("ramp", 2.0), flow_steps=4)
    painted = inpaint(model, vae, images, masks, torch.tensor([1, 2]), SCHEDULE, how, [1, 2])
    assert torch.equal(painted[..., :8], images[..., :8])
    codes = sample_codes(model, vae.pathway, torch.tensor([1, 2]), SCHEDULE, how, [1, 2])
    assert {s: c.shape for s, c in codes.items()} == {s: (2, s * s, 4) for s in SCHEDULE.sides}


@pytest.mark.parametrize(
    "sizes",
    [
        {"flow_cross": True, "flow_width": 128},
        {"flow_depth": 0},
        {"flow_width": 0},
        {"attention_heads": -1},
        {"dropout": 2.0},
    ],
)
def test_sizes_that_no_model_has_are_refused(sizes):
    with pytest.raises(ValueError, match=r"no such sizes|--flow_cross needs|--dropout must"):
        flowar(**{"width": 64, "flow_width": 64, **sizes})
