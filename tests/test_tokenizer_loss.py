import pytest
import torch
import torch.nn.functional as F

from models import VQVAE, VQVAEConfig
from models.discriminator import Discriminator, hinge_loss
from utils.config.tokenizer import TokenizerLossConfig
from utils.tokenizer.losses import MultiScaleLoss, Opponent, entropy_term

IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def tokenizer() -> VQVAE:
    """16×16 pixels ↔ 4×4 latents, 32 codes."""
    torch.manual_seed(0)
    return VQVAE(VQVAEConfig(32, (1, 1, 1), res_blocks=1, z_channels=32, codebook_size=32, codebook_dim=8))


@pytest.fixture
def judge() -> Discriminator:
    torch.manual_seed(1)
    return Discriminator(16, 1)


def plainly(vae, images, s):
    """Reconstruction, target, and the gap between vectors and rows, by the obvious formula."""
    z = F.normalize(F.interpolate(vae.encode(images), s, mode="area"), dim=1)  # (B, D, s, s)
    rows = vae.codebook[torch.cdist(z.permute(0, 2, 3, 1).reshape(-1, 8), vae.codebook).argmin(1)]
    rows = rows.view(len(images), s, s, 8).permute(0, 3, 1, 2)
    made = vae.decoder(vae.post_quant_conv(z + (rows - z).detach()))
    return made, F.interpolate(images, 4 * s, mode="area"), (rows - z).square().mean()


def test_loss_at_one_scale_by_the_obvious_formula(tokenizer):
    config = TokenizerLossConfig(l1=0.5, l2=2.0, commitment=0.25)
    found = MultiScaleLoss(tokenizer, config)(IMAGES, [2])
    made, target, gap = plainly(tokenizer, IMAGES, 2)
    wanted = 0.5 * (made - target).abs().mean() + 2 * (made - target).square().mean() + 1.25 * gap
    assert found.loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_loss_of_several_scales_is_their_mean(tokenizer):
    loss = MultiScaleLoss(tokenizer, TokenizerLossConfig())
    each = [loss(IMAGES, [s]).loss.item() for s in (1, 2, 4)]
    assert loss(IMAGES, [1, 2, 4]).loss.item() == pytest.approx(sum(each) / 3, rel=1e-5)


def test_gradients_reach_encoder_decoder_and_codebook(tokenizer):
    vae, config = tokenizer, TokenizerLossConfig(commitment=0)
    loss = MultiScaleLoss(vae, config)
    loss(IMAGES, [1, 4]).loss.backward()
    assert vae.decoder.conv_in.weight.grad.abs().sum() > 0
    assert vae.encoder.conv_in.weight.grad.abs().sum() > 0  # straight through the quantiser
    # What the codebook gets is the codebook term's alone: rows towards vectors.
    found, vae.quantize.embedding.weight.grad = vae.quantize.embedding.weight.grad, None
    gaps = []
    for s in (1, 4):
        z = vae.resize(vae.encode(IMAGES), s).detach()
        gaps.append(F.mse_loss(F.embedding(vae.quantize.nearest(z), vae.codebook), z))
    torch.stack(gaps).mean().backward()
    assert torch.allclose(found, vae.quantize.embedding.weight.grad, atol=1e-7)
    assert found.abs().sum() > 0


@pytest.mark.parametrize("adaptive", [True, False])
def test_adversarial_loss_by_the_obvious_formula(adaptive, tokenizer, judge):
    """Value, weight and every gradient of the generator's step; the discriminator's weights get none."""
    vae, last = tokenizer, tokenizer.decoder.conv_out.weight
    config = TokenizerLossConfig(l1=1, disc_weight=0.3, disc_adaptive=adaptive, commitment=0.1)
    found = MultiScaleLoss(vae, config)(IMAGES, [2, 4], judge)
    found.loss.backward()
    assert all(p.grad is None for p in judge.parameters())
    gradients = {name: p.grad.clone() for name, p in vae.named_parameters()}
    vae.zero_grad()
    parts = [plainly(vae, IMAGES, s) for s in (2, 4)]
    reconstruction = sum((a - b).abs().mean() + (a - b).square().mean() for a, b, _ in parts) / 2
    adversarial = -sum(judge(a).mean() for a, _, _ in parts) / 2
    weight = torch.tensor(0.3)
    if adaptive:
        norms = [torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (reconstruction, adversarial)]
        weight = 0.3 * (norms[0] / (norms[1] + 1e-4)).detach()
    assert found.parts["adversarial_weight"].item() == pytest.approx(weight.item(), rel=1e-4)
    codebook = []
    for s in (2, 4):
        z = vae.resize(vae.encode(IMAGES), s)
        rows = F.embedding(vae.quantize.nearest(z), vae.codebook)
        codebook.append(F.mse_loss(rows, z.detach()) + 0.1 * F.mse_loss(z, rows.detach()))
    loss = reconstruction + weight * adversarial + sum(codebook) / 2
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-4)
    loss.backward()
    for name, p in vae.named_parameters():
        assert torch.allclose(gradients[name], p.grad, rtol=1e-3, atol=1e-6), name


def test_the_discriminators_step_does_not_leak_into_the_tokenizer(tokenizer, judge):
    found = MultiScaleLoss(tokenizer, TokenizerLossConfig(disc_weight=1.0))(IMAGES, [4], judge)
    loss, described = Opponent(judge)(found.real, found.made)
    loss.backward()
    assert all(p.grad is None for p in tokenizer.parameters())
    assert all(p.grad.abs().sum() > 0 for p in judge.parameters() if p.ndim > 1)  # the last bias may balance to 0
    wanted = 0.5 * (F.relu(1 - judge(IMAGES)).mean() + F.relu(1 + judge(found.made[0])).mean())
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert described["logits_real"].item() == pytest.approx(judge(IMAGES).mean().item(), rel=1e-4)


def test_a_discriminator_learns_to_tell(judge):
    """The hinge loss has the right sign: it falls, and real images get the higher logits."""
    real, made = torch.rand(8, 3, 12, 12), torch.rand(8, 3, 12, 12) * 0.5
    optimizer = torch.optim.Adam(judge.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        hinge_loss(judge(real), judge(made)).backward()
        optimizer.step()
    assert hinge_loss(judge(real), judge(made)) < 0.2
    assert judge(real).mean() > judge(made).mean()


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_smallest_image_leaves_one_patch(layers):
    judge = Discriminator(16, layers)
    assert judge(torch.zeros(1, 3, judge.smallest, judge.smallest)).shape == (1, 1, 1, 1)
    with pytest.raises(RuntimeError):
        judge(torch.zeros(1, 3, judge.smallest - 2**layers, judge.smallest - 2**layers))


def test_logits_do_not_depend_on_the_batch(judge):
    assert torch.allclose(judge(IMAGES)[:1], judge(IMAGES[:1]), atol=1e-6)


def test_small_resolutions_are_not_judged(tokenizer):
    judge = Discriminator(16, 2)  # from 12 pixels on: side 4 of 1, 2, 4
    loss = MultiScaleLoss(tokenizer, TokenizerLossConfig(disc_weight=1.0))
    found = loss(IMAGES, [1, 2, 4], judge)
    assert found.parts["adversarial"].item() == pytest.approx(-judge(found.made[-1]).mean().item(), rel=1e-5)


def test_entropy_term_wants_each_choice_sure_and_all_alike():
    rows = torch.eye(4)
    sure = entropy_term(torch.eye(4), rows)  # each its own row, all rows alike
    same = entropy_term(torch.eye(4)[:1].expand(4, -1), rows)  # all the same row
    unsure = entropy_term(torch.full((4, 4), 0.5), rows)  # as near to every row
    assert sure.item() == pytest.approx(-torch.tensor(4.0).log().item(), abs=1e-5)
    assert same.item() == pytest.approx(0, abs=1e-5)
    assert unsure.item() == pytest.approx(0, abs=1e-5)


def test_entropy_terms_gradient_is_finite_and_right():
    """Where choices are certain, too: there most probabilities are 0."""
    torch.manual_seed(0)
    z, rows = F.normalize(torch.randn(6, 4), dim=1), F.normalize(torch.randn(9, 4), dim=1)
    for vectors in (rows[:6], -rows[:6], z):
        vectors = vectors.clone().requires_grad_()
        entropy_term(vectors, rows).backward()
        assert vectors.grad.isfinite().all()
    near = F.normalize(torch.ones(9, 4) + 0.1 * torch.randn(9, 4), dim=1)  # choices that are not certain
    found, wanted = (near[:6].clone().requires_grad_() for _ in range(2))
    entropy_term(found, near).backward()
    choice = (-(torch.cdist(wanted, near).square()) / 0.01).softmax(-1)
    (torch.special.entr(choice).sum(-1).mean() - torch.special.entr(choice.mean(0)).sum()).backward()
    tangent = wanted.grad - (wanted.grad * near[:6]).sum(-1, keepdim=True) * near[:6]  # unit vectors stay unit vectors
    of_found = found.grad - (found.grad * near[:6]).sum(-1, keepdim=True) * near[:6]
    assert torch.allclose(of_found, tangent, rtol=1e-3, atol=1e-4)
    assert tangent.abs().max() > 1e-2
