import random
import re
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from evaluate import main as evaluate
from models import Guidance, ScaleSchedule, generate
from models.head import Sampler
from models.hybrid import HybridConfig, HybridVAR, MaskedInputs, draw_share
from models.pipeline import SARPipeline, open_pipeline
from models.sampling import SamplingConfig, sample_codes
from models.scales import UpsamplingPathway
from models.weights import load_flexvar, load_strictly, read_state_dict, save_weights
from tests.conftest import ALONE, config_of, fill, tool
from tests.test_trainer import assert_same, lines_of, weights_of
from train import build
from utils.config.training import DataConfig
from utils.evaluations.exposure_bias import Exposure, ValidationSet
from utils.runtime.files import read_json

SCHEDULE = ScaleSchedule((2, 3, 4))
TF = "--training_mode=teacher_forcing"


def hybrid(**more) -> HybridVAR:
    sizes = {"depth": 3, "width": 128, "num_classes": 10, "codebook_size": 32, "codebook_dim": 8, "first_side": 2}
    return fill(HybridVAR(HybridConfig(**sizes, drop_path=0.0, **more)), 12)


@pytest.fixture(params=["plain", "shared positions", "cross scale"])
def model(request) -> HybridVAR:
    return hybrid(shared_positions=request.param == "shared positions", cross_scale=request.param == "cross scale")


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, UpsamplingPathway]:
    """Class ids, tokens (4, 29), pathway."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(32, (4, SCHEDULE.total), generator=generator)
    return (
        torch.tensor([1, 2, 3, 10]),
        tokens,
        UpsamplingPathway(F.normalize(torch.randn(32, 8, generator=generator), dim=1)),
    )


def test_what_is_hidden_is_what_is_asked(model, batch):
    labels, tokens, pathway = batch
    for share, m in ((0.0, 0), (0.6, 3), (1.0, 4)):
        inputs = model.mask(tokens, pathway, SCHEDULE, share)
        assert (inputs.hidden.sum(1) == m).all()
        asked = model(labels, inputs, SCHEDULE, tokens).token_weights.bool()
        assert torch.equal(asked[:, :4], inputs.hidden)
        assert asked[:, 4:].all()  # all of the finer sides
    found = {tuple(model.mask(tokens, pathway, SCHEDULE, 0.5).hidden[0].tolist()) for _ in range(40)}
    assert len(found) == 6  # any two of four


def test_what_is_sampled_stands_among_the_true_codes(model, batch):
    """A rollout at the hidden positions; the truth at those that the model was shown."""
    labels, tokens, pathway = batch
    inputs = model.mask(tokens, pathway, SCHEDULE, 0.5)
    found = model(labels, inputs, SCHEDULE, tokens, sampler=Sampler(0, SCHEDULE.total)).sampled
    hidden = F.pad(inputs.hidden, (0, SCHEDULE.total - 4), value=True)
    assert torch.equal(found, torch.where(hidden, model(labels, inputs, SCHEDULE).argmax(-1), tokens))


def test_shares_are_a_normal_cut_to_its_range():
    torch.manual_seed(0)
    shares = [draw_share() for _ in range(4000)]
    assert min(shares) >= 0.7
    assert max(shares) <= 1
    generator = random.Random(1)
    inside = [x for x in (generator.gauss(1, 0.25) for _ in range(9000)) if 0.7 <= x <= 1]
    assert sum(shares) / 4000 == pytest.approx(sum(inside) / len(inside), abs=0.01)


def test_a_hidden_input_does_not_know_its_code(model, batch):
    """No gradient reaches the embedding of a hidden position; of a revealed one it does."""
    labels, tokens, pathway = batch
    inputs = model.mask(tokens, pathway, SCHEDULE, 0.5)
    codes = inputs.codes.requires_grad_()
    model(labels, inputs, SCHEDULE)[:, :4].sum().backward()
    assert (codes.grad[inputs.hidden] == 0).all()
    assert (codes.grad[~inputs.hidden] != 0).any(-1).all()


def test_who_sees_whom(model, batch):
    """Gradients of a side's logits by the inputs: its own first, others only with cross-scale, the first side never."""
    labels, tokens, pathway = batch
    inputs = pathway.inputs(tokens, SCHEDULE).requires_grad_()
    codes = pathway.embed(tokens[:, :4]).requires_grad_()
    hidden = torch.zeros(4, 4, dtype=torch.bool)
    seen = []
    for part in SCHEDULE.split(model(labels, MaskedInputs(inputs, codes, hidden), SCHEDULE)):
        found = torch.autograd.grad(part.square().sum(), (codes, inputs), retain_graph=True, materialize_grads=True)
        seen.append([bool(g.any()) for g in (found[0], *found[1].split((9, 16), 1))])
    cross = model.config.cross_scale
    assert seen == [[True, False, False], [False, True, False], [False, cross, True]]


def test_loss_by_the_obvious_formula(flags, tmp_path):
    """Cross-entropy at the hidden positions of the first side and at all finer ones, one mean."""
    trainer = build(config_of(flags, "--model=hybrid", "--first_side=2", TF, "--label_drop=0"), ALONE)
    assert trainer.config.model.scales.sides == (2, 4)
    images, labels = next(iter(trainer.loader()))
    schedule = trainer.schedule()
    batch = trainer.encode(images, labels, schedule)
    tokens = batch.tokens(schedule)
    trainer.model.eval()
    for share in (0.25, 0.75, 1.0):
        torch.manual_seed(1)
        inputs = trainer.model.mask(tokens, trainer.pathway, schedule, share)
        trainer.inputs = lambda *_, inputs=inputs: inputs
        loss, metrics = trainer.compute_loss(batch, schedule)
        with torch.no_grad():
            logits = trainer.model(labels, inputs, schedule)
        each = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
        hidden = inputs.hidden
        kept = torch.cat([each[:, :4][hidden], each[:, 4:].flatten()])
        assert loss.item() == pytest.approx(kept.mean().item(), rel=1e-5)
        assert metrics["loss_side/2"].item() == pytest.approx(each[:, :4][hidden].mean().item(), rel=1e-5)


def test_held_out_everything_is_hidden(batch):
    """In training a share of the positions, which the step decides and all images have in common."""
    model, (labels, _, pathway) = hybrid(), batch
    schedule, model.config = ScaleSchedule((8, 9)), HybridConfig(first_side=8)
    tokens = torch.zeros(len(labels), schedule.total, dtype=torch.long)

    def hidden(seed):
        torch.manual_seed(seed)
        counts = model.inputs(tokens, pathway, schedule).hidden.sum(1)
        assert (counts == counts[0]).all()  # the same for all images
        return int(counts[0])

    assert {hidden(seed) for seed in range(12)} == {64}
    model.train()
    assert len({hidden(seed) for seed in range(12)}) > 6
    assert hidden(3) == hidden(3)


def test_second_pass_runs_the_finer_sides_only(model, batch):
    labels, tokens, pathway = batch
    inputs = model.inputs(tokens, pathway, SCHEDULE)
    whole = model(labels, inputs, SCHEDULE)
    assert torch.allclose(model(labels, inputs, SCHEDULE, first=1), whole[:, 4:], atol=1e-5)
    assert torch.allclose(model(labels, inputs, SCHEDULE, first=2), whole[:, 13:], atol=1e-5)


def test_sampling_walks_as_training_sees(model, batch):
    """The finer sides' cached logits are those of one pass; so are the first side's, at each step of its filling."""
    labels, tokens, pathway = batch
    state = model.init_cache(labels, SCHEDULE.total)
    inputs = pathway.inputs(tokens, SCHEDULE)
    hidden = torch.tensor([True, False, False, True]).expand(4, -1)
    codes = pathway.embed(tokens[:, :4])
    with torch.no_grad():
        whole = SCHEDULE.split(model(labels, MaskedInputs(inputs, codes, hidden), SCHEDULE))
        assert torch.allclose(model.first_logits(state, codes, hidden, 1)[0], whole[0], atol=1e-5)
        for s, x, wanted in zip((3, 4), inputs.split((9, 16), 1), whole[1:], strict=True):
            assert torch.allclose(model.decode_scale(state, x, s), wanted, atol=1e-5)


@pytest.mark.parametrize(("steps", "counts"), [(1, [4]), (2, [2, 2]), (3, [1, 2, 1]), (8, [1, 1, 1, 1])])
def test_positions_are_revealed_along_a_cosine(steps, counts, batch, monkeypatch):
    """K = 1 reveals all at once; later steps see what was revealed before, in an order of each image's own."""
    model, seen = hybrid(), []
    inner = model.first_logits

    def watch(state, codes, hidden, halves):
        seen.append(hidden.clone())
        return inner(state, codes, hidden, halves)

    monkeypatch.setattr(model, "first_logits", watch)
    labels, _, pathway = batch
    sample_codes(model, pathway, labels[:3], SCHEDULE, SamplingConfig(fill_steps=steps), [1, 2, 3])
    left = [int(hidden[0].sum()) for hidden in seen] + [0]
    revealed = [a - b for a, b in pairwise(left)]
    assert sum(revealed) == 4
    cosine = [round(4 * (0.5 - 0.5 * torch.cos(torch.tensor(torch.pi * j / steps)).item())) for j in range(steps + 1)]
    assert revealed == [b - a for a, b in pairwise(cosine) if b > a] == counts
    if len(seen) > 1:
        assert len({tuple(row.tolist()) for row in seen[1]}) > 1


def test_images_do_not_depend_on_their_batch(batch):
    model, (labels, _, pathway) = hybrid(), batch
    draw = SamplingConfig(Guidance("ramp", 2.0), top_k=20, top_p=0.9)
    together = sample_codes(model, pathway, labels[:3], SCHEDULE, draw, [5, 6, 7])
    for i, seed in enumerate((5, 6, 7)):
        alone = sample_codes(model, pathway, labels[i : i + 1], SCHEDULE, draw, [seed])
        assert all(torch.equal(alone[s][0], codes[i]) for s, codes in together.items())
    again = sample_codes(model, pathway, labels[:1], SCHEDULE, draw, [8])
    assert not all(torch.equal(again[s][0], codes[0]) for s, codes in together.items())


def test_guidance_is_a_half_ramp_over_the_steps(batch, monkeypatch):
    import models.hybrid as module

    model, weights = hybrid(), []
    monkeypatch.setattr(module, "guide", lambda c, u, w: weights.append(w) or c)
    labels, _, pathway = batch
    sample_codes(model, pathway, labels[:2], SCHEDULE, SamplingConfig(Guidance("ramp", 3.0), fill_steps=2), [1, 2])
    assert weights == [3.0 * 0.5 * 1.5, 3.0]
    sample_codes(model, pathway, labels[:2], SCHEDULE, SamplingConfig(Guidance("none", 3.0), fill_steps=2), [1, 2])
    assert len(weights) == 2


def test_weights_and_pipelines_know_what_they_are(vae, tmp_path):
    torch.save(fill(hybrid(cross_scale=True), 4).state_dict(), tmp_path / "cross.pth")
    with pytest.raises(ValueError, match="another layout: layout"):
        load_strictly(hybrid(), read_state_dict(tmp_path / "cross.pth"), "cross.pth")
    for options in ({}, {"shared_positions": True, "cross_scale": True}):
        sizes = {"depth": 2, "width": 64, "num_classes": 5, "codebook_size": 128, "codebook_dim": 32, "first_side": 2}
        model = fill(HybridConfig(**sizes, **options).build(), 4)
        save_weights(model, tmp_path / "hybrid.safetensors")
        loaded = load_flexvar(tmp_path / "hybrid.safetensors").eval()
        assert isinstance(loaded, HybridVAR)
        assert (loaded.config.shared_positions, loaded.config.cross_scale) == (bool(options), bool(options))
        SARPipeline.of(vae, model, SCHEDULE).save_pretrained(tmp_path / f"pipeline{len(options)}")
        again = open_pipeline(str(tmp_path / f"pipeline{len(options)}"), pn="1_2_4")
        assert again.schedule.sides == (2, 4)
        drawn = [
            generate(m, vae, torch.tensor([1]), SCHEDULE, SamplingConfig(Guidance("ramp", 2.0), 0, 0.9), [3])
            for m in (model, loaded, again.model)
        ]
        assert torch.equal(drawn[0], drawn[1])
        assert torch.equal(drawn[0], drawn[2])


def test_a_run_resumes_and_is_evaluated_at_its_first_side(flags, real, tmp_path):
    """SAR on the hybrid: two steps and one more are three, to the bit; FID@2 decodes the first side's codes."""
    more = [*flags, "--model=hybrid", "--first_side=2", "--save_every_steps=2", "--sf_top_k=0"]
    trainer = build(config_of(more, "--max_steps=2"), ALONE)
    trainer.fit()
    build(config_of(more), ALONE).fit()
    build(config_of(more, f"--out_dir={tmp_path / 'whole'}"), ALONE).fit()
    assert_same(weights_of(tmp_path / "run"), weights_of(tmp_path / "whole"))
    data = ValidationSet.of(str(tmp_path / "run"), DataConfig(dataset="digits"), n=3)
    assert data.drawn(seed=0).shape == data.tokens.shape == (3, 4 + 16)
    exposure = Exposure.of(data, seed=0)
    assert len(exposure.forced) == len(exposure.one_step) == len(exposure.own) == 2
    lines = [line for line in lines_of(tmp_path / "run") if "train/loss" in line]
    assert lines[-1]["step"] == 3
    assert {"train/loss_tf", "train/loss_csf", "train/loss_side/2", "train/student_loss_side/4"} <= set(lines[-1])
    assert not any(name.startswith("train/student_loss_side/2") for name in lines[-1])
    judge = ["--ckpt", tmp_path / "run", "--features=efficientnet_lite0", "--num_samples=1", "--eval_scale=2"]
    judge += ["--reference", real, "--image_size=16", "--out_dir", tmp_path / "judged", "--num_classes_eval=8"]
    tool(evaluate, *judge, check=True)
    report = read_json(tmp_path / "judged/report.json")
    assert report["settings"]["evaluated_side"] == 2
    assert report["frechet_distance_efficientnet_lite0"] > 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--schedule=flexvar", "--pn=4_8_16"], "--model hybrid goes with --schedule fixed"),
        (["--ssr=last"], "--model hybrid goes with --ssr all only"),
        (["--parallel=fsdp"], "--parallel ddp only"),
        (["--training_mode=sf_full", "--csf_weight=0.01"], "--training_mode teacher_forcing or csfl only"),
        (["--first_side=4"], "needs finer sides than --first_side 4"),
        (["--first_side=3"], r"the first side 3 is none of the scales \(1, 2, 4\)"),
    ],
)
def test_what_the_hybrid_cannot_do_is_refused(more, message, flags, capsys):
    with pytest.raises(SystemExit):
        config_of(flags, "--model=hybrid", *(["--first_side=2"] if "first" not in more[0] else []), *more)
    assert re.search(message, capsys.readouterr().err)
