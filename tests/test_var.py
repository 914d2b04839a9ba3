import re
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from evaluate import main as evaluate
from experiments.figures import main as figures
from models import Guidance, SamplingConfig, ScaleSchedule, build_vae_var, generate
from models.editing import inpaint
from models.flexvar import FlexVAR, FlexVARConfig
from models.head import sample_tokens
from models.pipeline import SARPipeline, open_pipeline
from models.residual_vqvae import ResidualVQVAE, ResidualVQVAEConfig
from models.sampling import sample_codes
from models.var import VAR, VARConfig
from models.weights import load_flexvar, load_strictly, save_weights
from sar_trainer import SARTrainer
from student_forcing import STUDENT_FORCING
from tests import recipes
from tests.conftest import ALONE, ROOT, config_of, manifest, tool, worst
from train import build, main
from utils.config.training import DataConfig
from utils.data.datasets import CodeBatch, open_dataset
from utils.evaluations.exposure_bias import Exposure, ValidationSet
from utils.runtime.files import read_json

SCHEDULE = ScaleSchedule((1, 2, 3, 4))


def var_of(**more) -> VAR:
    sizes = {"depth": 2, "width": 128, "num_classes": 10, "codebook_size": 64, "codebook_dim": 8, "drop_path": 0.1}
    return recipes.fill(VARConfig(**{**sizes, "sides": SCHEDULE.sides, **more}).build(), 12, recipes.var_value)


@pytest.fixture
def model() -> VAR:
    return var_of()


@pytest.fixture(scope="module")
def residual() -> ResidualVQVAE:
    """64×64 pixels ↔ 4×4 latents."""
    config = ResidualVQVAEConfig(32, (1, 1, 1, 1, 1), 1, z_channels=8, codebook_size=64, codebook_dim=8)
    return recipes.fill(config.build(), 5, recipes.var_value).requires_grad_(False)


@pytest.fixture
def make(flags, residual, model):
    """A trainer around the two, at rest."""

    def make(*more: str, kind: type = SARTrainer):
        config = config_of(flags, "--model=var", "--pn=1_2_3_4", *more)
        trainer = kind(config, model, residual, open_dataset(config.data, 64, 0, "train"), None, ALONE)
        model.eval()
        return trainer

    return make


@pytest.fixture
def batch(residual) -> CodeBatch:
    return CodeBatch(torch.tensor([3, 7]), residual.tokenize(recipes.plain_images(3, 2, 64), SCHEDULE.sides))


# ------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(("depth", "millions"), [(16, 310.3), (20, 600.9), (24, 1033.4), (30, 2010.0), (36, 2353.9)])
def test_full_size_keys_and_shapes_are_those_of_the_released_files(depth, millions):
    sides = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32) if depth == 36 else (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    with torch.device("meta"):
        model = VAR(VARConfig(depth=depth, sides=sides, shared_aln=depth == 36))
    wanted = manifest()[f"var_d{depth}.pth"]["tensors"]
    del wanted["attn_bias_for_masking"]  # rebuilt for each pass
    assert {name: list(t.shape) for name, t in model.state_dict().items()} == wanted
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_says_what_it_is(shared, tmp_path):
    model = var_of(shared_aln=shared, sides=(1, 3, 4))
    masked = {**model.state_dict(), "attn_bias_for_masking": torch.zeros(1, 1, 26, 26)}
    torch.save(masked, tmp_path / "var.pth")
    found = load_flexvar(tmp_path / "var.pth")
    assert isinstance(found, VAR)
    assert (found.config.sides, found.config.shared_aln, found.config.depth) == ((1, 3, 4), shared, 2)
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in found.state_dict().items())
    save_weights(found, tmp_path / "again.safetensors")
    assert load_flexvar(tmp_path / "again.safetensors").config == found.config


def test_what_a_var_is_not_is_said(tmp_path):
    weights = var_of().state_dict()
    torch.save({k: v for k, v in weights.items() if "scale_mul" not in k}, tmp_path / "plain.pth")
    with pytest.raises(ValueError, match=r"does not normalise queries and keys \(attn_l2_norm\)"):
        load_flexvar(tmp_path / "plain.pth")
    other = var_of(sides=(1, 5))  # 26 tokens, as 1, 3, 4 has
    with pytest.raises(ValueError, match=r"another shape: lvl_embed.weight \(2, 128\)"):
        load_strictly(var_of(sides=(1, 3, 4)), other.state_dict(), "other")
    same_shapes = var_of(sides=(1, 3, 4)).state_dict()
    same_shapes["lvl_1L"] = same_shapes["lvl_1L"].flip(1)
    with pytest.raises(ValueError, match="another layout: lvl_1L"):
        load_strictly(var_of(sides=(1, 3, 4)), same_shapes, "other")


def test_initial_weights():
    torch.manual_seed(0)
    std = (1 / 256 / 3) ** 0.5
    for shared in (False, True):
        model = VAR(VARConfig(depth=4, width=256, num_classes=50, codebook_size=300, shared_aln=shared))
        assert model.pos_1LC.std().item() == pytest.approx(std, rel=0.05)
        assert model.lvl_embed.weight.std().item() == pytest.approx(std, rel=0.05)
        assert model.lvl_1L[0].bincount().tolist() == [1, 4, 9, 16, 25, 36, 64, 100, 169, 256]
        if shared:
            gates, rest = model.blocks[1].ada_gss[:, :, :2], model.blocks[1].ada_gss[:, :, 2:]
            assert gates.std().item() == pytest.approx(1e-3 / 16, rel=0.1)
            assert rest.std().item() == pytest.approx(0.5 / 16, rel=0.1)
            assert model.shared_ada_lin[1].weight.std().item() == pytest.approx(std, rel=0.05)  # not scaled
        else:
            assert model.blocks[1].ada_lin[1].weight[:512].std().item() == pytest.approx(1e-3 * std, rel=0.05)
    assert not any(hasattr(block, "ada_lin") for block in model.blocks)
    kept = {name for name, _ in model.named_parameters() if name.endswith(VAR.no_decay)}
    assert {"pos_1LC", "pos_start", "lvl_embed.weight", "blocks.0.ada_gss", "blocks.0.attn.scale_mul_1H11"} <= kept
    assert "class_emb.weight" not in kept


# ---------------------------------------------------------------------------------------------- one schedule


def test_another_schedule_is_refused_by_name(model, residual, tmp_path, flags):
    wrong = ScaleSchedule((1, 2, 4))
    with pytest.raises(ValueError, match="knows the scales 1_2_3_4 and no others, such as 1_2_4"):
        generate(model, residual, torch.tensor([1]), wrong, SamplingConfig(), [0])
    with pytest.raises(ValueError, match="no others, such as 1_2_4"):
        model.inputs(torch.zeros(1, 21, dtype=torch.long), residual.pathway, wrong)
    save_weights(model, tmp_path / "var.safetensors")
    save_weights(residual, tmp_path / "vae.safetensors")
    files = str(tmp_path / "var.safetensors"), str(tmp_path / "vae.safetensors")
    assert open_pipeline(*files).schedule == SCHEDULE  # without being told
    with pytest.raises(ValueError, match="no others, such as 1_2_4"):
        open_pipeline(*files, pn="1_2_4")
    with pytest.raises(SystemExit):
        config_of(flags, "--model=var", "--schedule=flexvar", "--pn=4_8_16")


def test_tokenizers_and_models_of_other_pathways_are_refused(model, residual, small_vae_file, flags, tmp_path, capsys):
    save_weights(model, tmp_path / "var.safetensors")
    save_weights(residual, tmp_path / "vae.safetensors")
    save_weights(FlexVAR(FlexVARConfig(1, 64, 10, 64, 8)), tmp_path / "flexvar.safetensors")
    with pytest.raises(ValueError, match=r"needs a tokenizer of the residual pathway, like pretrained/vae_ch160"):
        SARPipeline.from_files(small_vae_file, tmp_path / "var.safetensors")
    with pytest.raises(ValueError, match=r"needs a tokenizer of the upsampling pathway, like pretrained/FlexVAE.pth"):
        SARPipeline.from_files(tmp_path / "vae.safetensors", tmp_path / "flexvar.safetensors")
    for more in (["--model=var"], [f"--vae_ckpt={tmp_path / 'vae.safetensors'}"]):
        status, _, said = tool(main, *flags, *more)
        assert status == 1
        assert "needs a tokenizer of the" in said.strip().splitlines()[-1]
    for more, message in {
        "--supervision=image": "--model var goes with --supervision latent only",
        "--schedule=flexvar": "--model var goes with --schedule fixed only",
    }.items():
        with pytest.raises(SystemExit):
            config_of(flags, "--model=var", "--pn=4_8_16", more)
        assert message in capsys.readouterr()[1]
    for more in (["--rollout_canvas=one_step"], ["--csf_target=requantised"], ["--shared_aln"]):
        with pytest.raises(SystemExit):
            config_of(flags, *more)
        assert "--model" in capsys.readouterr()[1]


# ------------------------------------------------------------------------------------------------ sampling


def test_guidance_grows_to_the_last_scale_however_many_there_are():
    model = var_of(sides=tuple(range(1, 15)))
    weights = Guidance("ramp", 3.0).weights(model.config.sides, None, model.config.ramp_end)
    assert weights == pytest.approx([3 * i / 13 for i in range(14)])


def test_no_side_of_a_released_var_is_taken_greedily(residual, tmp_path):
    sides = (1, 2, 7, 9)  # of which FlexVAR's rule would take two greedily
    save_weights(var_of(sides=sides), tmp_path / "var.safetensors")
    save_weights(residual, tmp_path / "vae.safetensors")
    pipeline = open_pipeline(str(tmp_path / "var.safetensors"), str(tmp_path / "vae.safetensors"))
    assert pipeline.schedule.sides == sides
    assert pipeline.greedy_sides(pipeline.sampling_config()) == ""


def test_smooth_pictures_depend_on_their_own_seed_and_differ_from_drawn_ones(model, residual):
    sampling = SamplingConfig(Guidance("ramp", 2.0), 20, 0.9, more_smooth=True)

    def draw(labels, seeds, how=sampling):
        return generate(model, residual, torch.tensor(labels), SCHEDULE, how, seeds)

    together = draw([1, 2, 1], [3, 4, 5])
    assert worst(draw([2], [4])[0], together[1]) < 5e-3  # soft weights magnify the roundings of another batch
    assert not torch.allclose(together[0], together[2], atol=1e-2)
    drawn = draw([1, 2, 1], [3, 4, 5], SamplingConfig(Guidance("ramp", 2.0), 20, 0.9))
    assert not torch.allclose(together, drawn, atol=1e-2)
    vectors = sample_codes(model, residual.pathway, torch.tensor([1]), SCHEDULE, sampling, [3])
    assert {s: v.shape for s, v in vectors.items()} == {s: (1, s * s, 8) for s in SCHEDULE.sides}


def test_smoothness_is_refused_where_it_means_nothing(model, residual, vae):
    sampling = SamplingConfig(more_smooth=True)
    flexvar = FlexVAR(FlexVARConfig(1, 64, 10, 128, 32))
    with pytest.raises(ValueError, match="more_smooth mixes embeddings"):
        generate(flexvar, vae, torch.tensor([1]), SCHEDULE, sampling, [0])
    image = torch.zeros(1, 3, 64, 64)
    with pytest.raises(ValueError, match="more_smooth is for pictures from scratch"):
        inpaint(model, residual, image, image[:, :1], torch.tensor([1]), SCHEDULE, sampling, [0])


def test_painting_holds_the_canvas_of_the_known_region(model, residual):
    images, labels = recipes.blocky_images(3, 2, 64), torch.tensor([1, 2])
    masks = torch.zeros(2, 1, 64, 64)
    masks[..., 32:] = 1
    how = SamplingConfig(Guidance("ramp", 1.5), 20, 0.9)
    painted = inpaint(model, residual, images, masks, labels, SCHEDULE, how, [1, 2])
    assert torch.equal(painted[..., :32], images[..., :32])
    free = generate(model, residual, labels, SCHEDULE, how, [1, 2]).clamp(-1, 1)
    assert not torch.allclose(painted[..., 32:], free[..., 32:], atol=1e-2)
    whole = inpaint(model, residual, images, torch.ones_like(masks), labels, SCHEDULE, how, [1, 2])
    assert torch.allclose(whole, free, atol=1e-5)
    nothing = inpaint(model, residual, images, torch.zeros_like(masks), labels, SCHEDULE, how, [1, 2])
    assert torch.equal(nothing, images)


# ------------------------------------------------------------------------------------------------ training


def plain_step(trainer, model, batch, seed):
    """A SAR step on VAR written out, with canvases of its own."""
    sar, labels, truth, vae = trainer.config.sar, batch.labels, batch.tokens(SCHEDULE), trainer.vae

    def residuals(tokens):
        found = []
        for i, part in enumerate(SCHEDULE.split(tokens)):
            grid = vae.codebook[part].transpose(1, 2).unflatten(2, (SCHEDULE.sides[i],) * 2)
            grid = F.interpolate(grid, (4, 4), mode="bicubic") if i < 3 else grid
            conv = vae.quantize.quant_resi["qresi_ls"][i]  # four scales: one each
            found.append((grid + F.conv2d(grid, conv.weight, conv.bias, padding=1)) / 2)
        return found

    def resized(canvases):
        parts = [
            F.adaptive_avg_pool2d(c, s).flatten(2).transpose(1, 2) for c, s in zip(canvases, (2, 3, 4), strict=True)
        ]
        return torch.cat(parts, dim=1)

    true = residuals(truth)
    inputs = resized([sum(true[: i + 1]) for i in range(3)])
    logits = model(labels, inputs, SCHEDULE)
    loss = F.cross_entropy(logits.flatten(0, 1), truth.flatten())
    with torch.no_grad():
        guided = logits.detach()
        if sar.rollout == "cfg":
            null = model(torch.full_like(labels, model.null_class), inputs, SCHEDULE)
            pairs = enumerate(zip(SCHEDULE.split(logits), SCHEDULE.split(null), strict=True))
            guided = torch.cat([c + sar.sf_cfg_scale * 0.5 * (1 + i / 3) * (c - u) for i, (c, u) in pairs], dim=1)
        torch.manual_seed(seed)
        uniforms = torch.rand(truth.shape)
        top_k = 1 if sar.rollout == "argmax" else sar.sf_top_k
        rollout = sample_tokens(guided, top_k, sar.sf_top_p, uniforms)
        own = residuals(rollout)
    one_step = sar.rollout_canvas == "one_step"
    fed = [(sum(true[:i]) if one_step else sum(own[:i])) + own[i] for i in range(3)]
    if sar.csf_target == "requantised":
        target = [rollout[:, :1]]
        for i in range(1, 4):
            left = F.adaptive_avg_pool2d(sum(true[:i]) + own[i] - fed[i - 1], SCHEDULE.sides[i])
            target.append(torch.cdist(left.flatten(2).transpose(1, 2), vae.codebook[None]).argmin(-1))
        target = torch.cat(target, dim=1)
    else:
        target = truth if sar.csf_target == "ground_truth" else rollout
    if sar.ssr == "all":
        second, asked = model(labels, resized(fed), SCHEDULE)[:, 1:], slice(1, None)
    else:
        ends, asked = ScaleSchedule((1, 4)), slice(14, None)
        second = model(labels, resized(fed)[:, 13:], ends, start=False)[:, 1:]
    csf = F.cross_entropy(second.flatten(0, 1), target[:, asked].flatten())
    return loss + sar.csf_weight * csf


def test_a_step_equals_the_plain_one_in_loss_and_gradient(make, model, batch):
    for ssr, rollout, target, canvas in product(
        ("all", "last"), ("argmax", "sample", "cfg"), ("teacher", "ground_truth", "requantised"),
        ("accumulated", "one_step"),
    ):  # fmt: skip
        drawn = [] if rollout == "argmax" else ["--sf_top_k=20", "--sf_top_p=0.9"]
        scale = ["--sf_cfg_scale=2"] if rollout == "cfg" else []
        more = [f"--ssr={ssr}", f"--rollout={rollout}", f"--csf_target={target}", f"--rollout_canvas={canvas}"]
        trainer = make(*more, "--csf_weight=0.7", *drawn, *scale)
        wanted = plain_step(trainer, model, batch, seed=5)
        wanted.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        torch.manual_seed(5)
        found, _ = trainer.compute_loss(batch, SCHEDULE)
        found.backward()
        assert worst(found.detach().view(1), wanted.detach().view(1)) < 1e-5, more
        for name, p in model.named_parameters():
            assert worst(p.grad, gradients[name]) < 1e-4, (name, *more)
        model.zero_grad()


@pytest.mark.parametrize("mode", STUDENT_FORCING)
def test_naive_schedules_feed_what_sampling_would(mode, make, model, residual, batch):
    at = ["--sf_hybrid_from=3"] if mode == "sf_hybrid" else []
    trainer = make(f"--training_mode={mode}", "--rollout=argmax", *at, kind=STUDENT_FORCING[mode])
    trainer.step = 1  # of alternate, the self-fed turn
    fed, truth = trainer.roll_out(batch, SCHEDULE), batch.tokens(SCHEDULE)
    feeds = [*trainer.self_fed(SCHEDULE)[1:], False]
    inputs = model.inputs(fed, residual.pathway, SCHEDULE)
    with torch.no_grad():
        likeliest = model(batch.labels, inputs, SCHEDULE).argmax(-1)
    for i, own in enumerate(feeds):
        span = SCHEDULE.span(i)
        assert torch.equal(fed[:, span], (likeliest if own else truth)[:, span])
    if mode == "sf_full":
        drawn = sample_codes(model, residual.pathway, batch.labels, SCHEDULE, SamplingConfig(top_k=1), [0, 0])
        assert torch.equal(
            fed[:, : SCHEDULE.offsets[-2]], torch.cat(list(drawn.values()), 1)[:, : SCHEDULE.offsets[-2]]
        )


def test_label_smoothing_is_torchs_own_and_rests_in_evaluation(make, model, batch):
    trainer = make("--training_mode=teacher_forcing", "--label_smoothing=0.1", kind=STUDENT_FORCING["sf_full"])
    tokens = batch.tokens(SCHEDULE)
    inputs = trainer.inputs(tokens, SCHEDULE)
    logits = model(batch.labels, inputs, SCHEDULE)
    for training, share in ((True, 0.1), (False, 0.0)):
        model.head.train(training)  # the rest stays at rest: no drop path
        wanted = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), label_smoothing=share)
        gradients = torch.autograd.grad(wanted, list(model.head.parameters()), retain_graph=True)
        found = trainer.predict(batch.labels, inputs, tokens, SCHEDULE).loss
        assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
        for a, b in zip(torch.autograd.grad(found, list(model.head.parameters())), gradients, strict=True):
            assert worst(a, b) < 1e-4


def test_exposure_is_measured_with_one_own_residual(small_residual_file, flags, tmp_path):
    """After one own step the canvas holds true residuals but for the last: Eq. 6 in its one-step reading."""
    more = [*flags, f"--vae_ckpt={small_residual_file}", "--model=var", "--training_mode=teacher_forcing"]
    build(config_of(more), ALONE).fit()
    data = ValidationSet.of(str(tmp_path / "run"), DataConfig(dataset="digits"), n=5)
    found, pathway, model = Exposure.of(data, seed=1), data.pipeline.vae.pathway, data.pipeline.model
    drawn, truth, schedule = data.drawn(1, on_truth=True), data.tokens, data.schedule
    with torch.no_grad():
        logits = model(data.labels, pathway.inputs(drawn, schedule, truth), schedule)
    span = schedule.span(1)  # of the first scale that is fed: what finer ones see differs, true inputs of coarser ones
    wanted = F.cross_entropy(logits[:, span].flatten(0, 1), truth[:, span].flatten()).item()
    assert found.one_step[1] == pytest.approx(wanted, rel=1e-4)
    one = data.tokens.clone()
    one[:, schedule.span(1)] = drawn[:, schedule.span(1)]
    with torch.no_grad():
        last = model(data.labels, pathway.inputs(one, schedule), schedule, truth[:, schedule.span(2)], first=2)
    assert found.one_step[2] == pytest.approx(last.loss.item(), rel=1e-4)
    pictures = data.pictures(truth)
    assert {s: p.shape for s, p in pictures.items()} == dict.fromkeys((1, 2, 4), (5, 3, 16, 16))


@pytest.fixture(scope="module")
def run_of_var(small_residual_file, tmp_path_factory):
    """A VAR that was trained for a few steps on digits, with its tokenizer."""
    path = tmp_path_factory.mktemp("var") / "run"
    build(
        config_of(
            [
                *("--dataset=digits", "--workers=0", f"--vae_ckpt={small_residual_file}", "--model=var", "--depth=1"),
                *("--width=64", "--pn=1_2_3_4", "--schedule=fixed", "--bs=8", "--max_steps=2", "--logger_type=none"),
                *("--vis_num_samples=0", "--eval_images=0", f"--out_dir={path}"),
            ]
        ),
        ALONE,
    ).fit()
    return path


@pytest.mark.parametrize("name", ["tf-vs-ar", "trajectory", "sf-inputs", "exposure-bias"])
def test_the_papers_figures_can_be_drawn_of_it(name, run_of_var, tmp_path):
    out = tmp_path / ("figure.md" if name == "exposure-bias" else "figure.png")
    tool(figures, name, "--ckpt", run_of_var, "--dataset=digits", "--n=2", "--out", out, check=True)
    if out.suffix == ".png":
        assert Image.open(out).width > 100
    else:
        assert len([line for line in out.read_text().splitlines() if line.startswith("| run |")]) == 4
    status, _, said = tool(
        figures, "supervision", "--ckpt", run_of_var, "--dataset=digits", "--out", tmp_path / "f.png"
    )
    assert status == 1
    assert "--supervision latent" in said


def test_its_tokenizer_is_judged_by_what_each_scale_adds(small_residual_file, real, tmp_path):
    command = ["--reconstruct", real, "--image_size=16", "--features=efficientnet_lite0", "--pn=1_2_4"]
    tool(evaluate, *command, "--vae_ckpt", small_residual_file, "--out_dir", tmp_path / "r", check=True)
    rows = read_json(tmp_path / "r/report.json")["sides"]
    assert [(row["side"], row["pixels"]) for row in rows] == [(1, 16), (2, 16), (4, 16)]


def test_its_tokenizer_is_judged_by_a_schedule_that_somebody_has(small_residual_file, real, tmp_path):
    """Of 32 pixels no schedule is known, and what the codes are depends on it."""
    command = ["--reconstruct", real, "--image_size=32", "--features=efficientnet_lite0", "--out_dir", tmp_path / "r"]
    status, _, said = tool(evaluate, *command, "--vae_ckpt", small_residual_file)
    assert status == 1
    assert "this tokenizer's codes depend on all sides, and these images end at 8: name --pn" in said


def test_it_is_evaluated_at_any_scale_in_full_size(run_of_var, real, tmp_path):
    command = ["--ckpt", run_of_var, "--features=efficientnet_lite0", "--num_samples=1", "--num_classes_eval=8"]
    command += ["--reference", real, "--image_size=16", "--eval_scale=2", "--out_dir", tmp_path / "e"]
    tool(evaluate, *command, check=True)
    settings = read_json(tmp_path / "e/report.json")["settings"]
    assert (settings["evaluated_side"], settings["max_pn"]) == (2, None)


# --------------------------------------------------------------------------------------- the released ways in


SNIPPET = """
import torch
from models import VQVAE, build_vae_var
vae, var = build_vae_var(V=4096, Cvae=32, ch=160, share_quant_resi=4, device='cpu', patch_nums=(1, 2, 3, 4),
                         num_classes=1000, depth=16, shared_aln=False)
vae.load_state_dict(torch.load('vae_ch160v4096z32.pth', map_location='cpu'), strict=True)
var.load_state_dict(torch.load('var_d16.pth', map_location='cpu'), strict=True)
vae.eval(), var.eval()
for p in vae.parameters(): p.requires_grad_(False)
for p in var.parameters(): p.requires_grad_(False)
label_B = torch.tensor((1, 2, 3), device='cpu')
with torch.inference_mode():
    images = var.autoregressive_infer_cfg(B=3, label_B=label_B, cfg=4, top_k=900, top_p=0.95, g_seed=0,
                                          more_smooth=SMOOTH)
"""


@pytest.mark.parametrize("smooth", [False, True])
def test_the_released_snippet_runs_as_it_stands(smooth, model, tmp_path, monkeypatch):
    sizes = ResidualVQVAEConfig(32, z_channels=8, codebook_size=64, codebook_dim=8, counted_scales=4)
    vae = recipes.fill(sizes.build(), 5, recipes.var_value)
    torch.save(vae.state_dict(), tmp_path / "vae_ch160v4096z32.pth")
    torch.save({**model.state_dict(), "attn_bias_for_masking": torch.zeros(1, 1, 30, 30)}, tmp_path / "var_d16.pth")
    monkeypatch.chdir(tmp_path)
    snippet = SNIPPET.replace("SMOOTH", str(smooth))
    for full, small in {"V=4096": "V=64", "Cvae=32": "Cvae=8", "ch=160": "ch=32", "=1000": "=10", "=16": "=2"}.items():
        snippet = re.sub(rf"{full}\b", small, snippet)
    scope: dict = {}
    exec(snippet, scope)
    images = scope["images"]
    assert images.shape == (3, 3, 64, 64)
    assert images.min() >= 0
    assert images.max() <= 1
    sampling = SamplingConfig(Guidance("ramp", 4), 900, 0.95, more_smooth=smooth)
    wanted = generate(model, vae.eval(), torch.tensor([1, 2, 3]), SCHEDULE, sampling, [0, 1, 2])
    assert torch.allclose(images, (wanted.clamp(-1, 1) + 1) / 2, atol=1e-6)


def test_the_released_call_names_wrong_requests(model):
    with pytest.raises(ValueError, match="share_quant_resi must be 4, got 1"):
        build_vae_var(V=64, Cvae=8, ch=32, share_quant_resi=1, patch_nums=(1, 2), depth=1)
    _, var = build_vae_var(V=64, Cvae=8, ch=32, patch_nums=(1, 2), depth=1, num_classes=10, shared_aln=True)
    with pytest.raises(ValueError, match="B is 2, but label_B holds 3 labels"):
        var.autoregressive_infer_cfg(2, [1, 2, 3])
    with pytest.raises(ValueError, match="10 is out of range"):
        var.autoregressive_infer_cfg(2, 10)


def test_smooth_pictures_from_the_command_line(model, residual, tmp_path):
    from sample import main as sample

    SARPipeline.of(residual, model, SCHEDULE).save_pretrained(tmp_path / "p")
    command = [sample, "--ckpt", tmp_path / "p", "--classes=1,2", "--n=1", "--cfg=1"]
    for name, more in {"drawn": [], "smooth": ["--more_smooth"], "again": ["--more_smooth"]}.items():
        tool(*command, *more, "--out", tmp_path / f"{name}.png", "--steps", tmp_path / f"{name}.gif", check=True)
    drawn, smooth, again = (Image.open(tmp_path / f"{n}.png").tobytes() for n in ("drawn", "smooth", "again"))
    assert smooth == again != drawn
    assert (ROOT / "scripts/train_SAR_VAR_d16.sh").is_file()
