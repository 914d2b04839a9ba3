"""Estimates against what really happens on a CPU, and against known numbers."""

import pytest
import torch

from models import VQVAE, FlexVARConfig, ScaleSchedule
from models.scales import DEFAULT_SCHEDULE
from tests.conftest import ALONE, ROOT, config_of, tool
from tests.test_every_generator import MORE, files, flags_of  # noqa: F401
from train import build, main, sized_model
from utils.config.training import SARConfig
from utils.training.estimate import SIZES, Estimate, estimate, kept, products, shapes_only, table, without_values

TF = SARConfig(training_mode="teacher_forcing")


def saved_bytes(trainer, batch) -> int:
    """Bytes that autograd really keeps of a pass of teacher forcing."""
    own = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    seen = {}

    def count(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return x

    schedule, tokens = trainer.config.model.scales, batch.tokens(trainer.config.model.scales)
    inputs = trainer.inputs(tokens, schedule)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        loss = trainer.predict(batch.labels, inputs, tokens, schedule).loss
    found = sum(seen.values())
    del loss
    return found


@pytest.mark.parametrize("kind", ["flexvar", "hybrid", "var", "flowar"])
def test_what_autograd_keeps_is_what_it_keeps(kind, files, tmp_path):  # noqa: F811
    flags = [*flags_of(kind, files), "--logger_type=none", f"--out_dir={tmp_path}"]
    trainer = build(config_of(flags, "--pn=1_2_4", "--width=128"), ALONE)
    real, counted, schedule = [], [], trainer.config.model.scales
    for n in (2, 6):
        images, labels = torch.rand(n, 3, 16, 16), torch.zeros(n, dtype=torch.long)
        trainer.model.train()
        real.append(saved_bytes(trainer, trainer.encode(images, labels, schedule)))
    with torch.device("meta"):
        model, vae = trainer.model.config.build(), trainer.vae.config.build()
    with shapes_only(torch.float32):
        without_values(model), without_values(vae)
        counted = [kept(model, vae, schedule, schedule, n) for n in (2, 6)]
    assert counted[1] - counted[0] == pytest.approx(real[1] - real[0], rel=0.08)


@pytest.mark.parametrize(("depth", "teraflop"), [(16, 0.305), (24, 0.986)])
def test_counted_products_are_the_known_ones(depth, teraflop):
    with torch.device("meta"):
        model, vae = FlexVARConfig(depth=depth).build(), VQVAE()
    with shapes_only(torch.bfloat16):
        without_values(model), without_values(vae)
        found = products(model, vae, DEFAULT_SCHEDULE, DEFAULT_SCHEDULE)
    assert found / 1e12 == pytest.approx(teraflop, rel=0.02)


def test_what_costs_more_is_estimated_to_cost_more():
    config, vae = FlexVARConfig(depth=2, width=256), VQVAE()
    schedule = ScaleSchedule((1, 2, 4, 8))

    def found(sar=TF, dtype=torch.bfloat16, **more) -> Estimate:
        return estimate(config, vae, schedule, sar, dtype, **more)

    plain, sar, last = found(), found(SARConfig()), found(SARConfig(ssr="last"))
    assert plain.image < last.image < sar.image == pytest.approx(2 * plain.image, rel=0.05)
    assert plain.flops < last.flops < sar.flops
    argmax, guided = (found(SARConfig(rollout=r), cached=True) for r in ("argmax", "cfg"))
    assert (guided.flops - argmax.flops) * 6 == pytest.approx(argmax.flops, rel=0.01)  # one forward more than six
    assert found(dtype=torch.float32).image > 1.3 * plain.image
    assert found(checkpointed=True).image < 0.5 * plain.image
    assert found(averages=1).fixed - plain.fixed == 4 * plain.parameters
    assert found(cached=True).flops < plain.flops
    cca = found(SARConfig(training_mode="cca"), cached=True)
    once = found(cached=True)
    assert (cca.flops / once.flops, cca.image / once.image) == (pytest.approx(8 / 3), 2)
    assert cca.fixed - once.fixed == 4 * once.parameters
    naive = [found(SARConfig(training_mode="sf_full", rollout=r), cached=True).flops for r in ("sample", "cfg")]
    assert naive[1] - once.flops == pytest.approx(2 * (naive[0] - once.flops))
    assert 1 < naive[0] / once.flops < 4 / 3  # the last scale feeds nothing
    deeper = found(SARConfig(ssr_steps=2), cached=True).flops - guided.flops  # a rollout more, and a pass
    assert deeper == pytest.approx(guided.flops - once.flops)
    assert plain.micro_batch(80) > plain.micro_batch(24) > 0
    assert not torch.is_autocast_enabled("cuda")  # nothing of it stays


def test_check_prints_the_cost_of_the_given_flags(flags):
    status, out, said = tool(main, *flags, "--check")
    assert status == 0, said
    assert "estimate: csfl of a flexvar of 0 M parameters in bf16, 21 tokens" in out
    assert "--micro_batch: " in out
    for part in ("fit 24 GB", "fit 40 GB", "fit 80 GB", "h on one A100", "GB a checkpoint"):
        assert part in out
    more = tool(main, *flags, "--check", "--training_mode=teacher_forcing")[1]
    assert more.splitlines()[1] != out.splitlines()[1]


def test_without_an_estimate_the_check_goes_on(flags, monkeypatch):
    monkeypatch.setattr("train.estimate", lambda *args: torch.zeros(2) @ torch.zeros(3))
    status, out, said = tool(main, *flags, "--check")
    assert (status, out) == (0, "")
    assert "no estimate of what it costs: " in said


@pytest.mark.parametrize("kind", MORE)
def test_every_generator_can_be_estimated(kind, files, tmp_path):  # noqa: F811
    config = config_of([*flags_of(kind, files), f"--out_dir={tmp_path}"])
    vae = build(config, ALONE).vae
    found = estimate(sized_model(config.model, vae, 10), vae, config.model.scales, config.sar)
    assert found.image > 0
    assert found.flops > 0


@pytest.mark.parametrize("sizes", [SIZES[:1], pytest.param(SIZES, marks=pytest.mark.slow)])
def test_the_tables_of_the_documentation_are_true(sizes):
    found = table(sizes).splitlines()[2:]
    assert len(found) == len(sizes)
    page = (ROOT / "docs/benchmarks.md").read_text()
    assert [row for row in found if row not in page] == []
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in found]
    cost = {name: [cell.split(" ")[0] for cell in rest] for name, *rest in cells}
    lines = {line.split("|")[1].strip(): line for line in (ROOT / "README.md").read_text().splitlines() if "|" in line}
    if len(sizes) > 1:
        sar = [cost[f"d{depth} SAR, all scales"] for depth in (16, 20, 24)]
        fits, hours = (" | ".join(", ".join(row[part]) for row in sar) for part in (slice(3), slice(4, 6)))
        assert lines["largest `--micro_batch` in 24, 40, 80 GB"].endswith(f"| {fits} |")
        assert lines["hours on one A100, one H100"].endswith(f"| {hours} |")
