import math

import pytest
import torch
import torch.nn.functional as F

from models.flexvar import FlexVAR, FlexVARConfig, sinusoids
from models.sampling import check_labels, evaluating
from models.scales import ScaleSchedule, shift_all
from tests.conftest import manifest, worst


def test_teacher_forced_logits_equal_the_released_ones(vae, model, schedule, expected):
    inputs = shift_all(expected["vae.codes"], vae.codebook, schedule)
    assert worst(inputs, expected["teacher.inputs"]) < 1e-5
    with torch.no_grad():
        logits = model(expected["labels"], inputs, schedule)
        null = model(torch.full((2,), model.null_class), inputs, schedule)
    assert worst(logits, expected["teacher.logits"]) < 1e-5
    assert worst(null, expected["teacher.logits_null_class"]) < 1e-5
    loss = F.cross_entropy(logits.flatten(0, 1), expected["vae.codes"].flatten())
    assert worst(loss.view(1), expected["teacher.loss"]) < 1e-5


@pytest.mark.parametrize(("depth", "millions"), [(16, 315.6), (20, 607.5), (24, 1041.3)])
def test_full_size_keys_and_shapes_are_those_of_the_released_files(depth, millions):
    with torch.device("meta"):
        model = FlexVAR(FlexVARConfig(depth=depth))
    wanted = manifest()[f"FlexVAR-d{depth}"]["tensors"]
    del wanted["attn_bias_for_masking"]  # depends on the schedule a file was saved with
    assert {name: list(t.shape) for name, t in model.state_dict().items()} == wanted
    buffers = sum(t.numel() for t in model.buffers())
    assert round((sum(p.numel() for p in model.parameters()) + buffers) / 1e6) == pytest.approx(millions, abs=1.5)


def test_a_scale_sees_itself_and_coarser_ones_only(vae, model, schedule, expected):
    inputs = shift_all(expected["vae.codes"], vae.codebook, schedule)
    with torch.no_grad():
        before = model(expected["labels"], inputs, schedule)
        changed = inputs.clone()
        changed[:, 4:13] += 1.0  # the inputs of side 3
        after = model(expected["labels"], changed, schedule)
    same = (before - after).abs().amax(dim=(0, 2)) == 0
    assert same[:5].all()
    assert not same[5:].any()


def test_nothing_in_the_model_remembers_a_schedule(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = set(vars(model))
    for sides in [(1, 2), (1, 2, 3, 4, 6), (1, 7)]:
        schedule = ScaleSchedule(sides)
        model(torch.tensor([1]), torch.randn(1, schedule.total - 1, 32), schedule)
    assert set(vars(model)) == attributes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_initial_weights():
    torch.manual_seed(0)
    model = FlexVAR(FlexVARConfig(depth=4, width=256, num_classes=50, codebook_size=300, alng=1e-3, aln=0.5))
    std, width = math.sqrt(1 / 256 / 3), 256
    block = model.blocks[2]

    def spread(tensor):
        return tensor.std().item()

    assert spread(model.word_embed.weight) == pytest.approx(std, rel=0.05)
    assert spread(model.class_emb.weight) == pytest.approx(std, rel=0.05)
    assert spread(block.attn.mat_qkv.weight) == pytest.approx(std, rel=0.05)
    assert spread(block.ffn.fc1.weight) == pytest.approx(std, rel=0.05)
    assert spread(block.attn.proj.weight) == pytest.approx(std / math.sqrt(8), rel=0.05)
    assert spread(block.ffn.fc2.weight) == pytest.approx(std / math.sqrt(8), rel=0.05)
    assert spread(model.head.weight) == pytest.approx(0.02 * std, rel=0.05)
    assert spread(block.ada_lin[1].weight[: 2 * width]) == pytest.approx(1e-3 * std, rel=0.05)
    assert spread(block.ada_lin[1].weight[2 * width :]) == pytest.approx(0.5 * std, rel=0.05)
    assert spread(model.head_nm.ada_lin[1].weight) == pytest.approx(0.5 * std, rel=0.05)
    assert torch.allclose(block.attn.scale_mul_1H11, torch.full((1, 4, 1, 1), math.log(4)))
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    assert all((p == 0).all() for p in biases)
    assert torch.equal(model.pos_1LC, sinusoids(256, 32))


def test_position_map_by_its_definition():
    found = sinusoids(8, 4)
    for k in range(4):
        omega = math.exp(-2 * k * math.log(10000) / 8)
        for y in range(4):
            for x in range(4):
                assert found[0, 2 * k, y, x].item() == pytest.approx(math.sin(y * omega), abs=1e-6)
                assert found[0, 2 * k + 1, y, x].item() == pytest.approx(math.cos(x * omega), abs=1e-6)


def test_temperature_is_clamped_at_a_hundred(model, schedule):
    inputs, labels = torch.randn(1, 29, 32), torch.tensor([0])
    with torch.no_grad():
        model.blocks[0].attn.scale_mul_1H11.fill_(math.log(100))
        at_bound = model(labels, inputs, schedule)
        model.blocks[0].attn.scale_mul_1H11.fill_(50.0)
        assert torch.equal(model(labels, inputs, schedule), at_bound)


def test_drop_path_keeps_the_mean_and_rests_in_evaluation():
    torch.manual_seed(0)
    model = FlexVAR(FlexVARConfig(depth=12, width=64, codebook_size=8))
    assert [round(b.drop_path, 6) for b in model.blocks] == [round(0.05 * i / 11, 6) for i in range(12)]
    block = model.blocks[-1]
    branch = torch.ones(20_000, 1, 1)
    kept = block.keep_path(branch)
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / 0.95])
    assert kept.mean().item() == pytest.approx(1, abs=0.01)
    with evaluating(block):
        assert block.keep_path(branch) is branch


@pytest.mark.parametrize(
    ("labels", "message"), [([], "non-empty"), ([3, 10], "10 is out of range"), ([-1], "-1 is out of range")]
)
def test_wrong_labels_are_named(labels, message):
    with pytest.raises(ValueError, match=message):
        check_labels(torch.tensor(labels, dtype=torch.long), 10)


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="100"):
        FlexVARConfig(depth=2, width=100)
