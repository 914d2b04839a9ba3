"""What --compile, --checkpoint_activations and --parallel do to a run: nothing but speed and memory."""

import json
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from models import FlexVAR, FlexVARConfig
from models.scales import draw_schedule
from tests.conftest import ALONE, config_of, tool_on_ranks, worst
from train import build, main
from utils.runtime.checkpoint import newest_checkpoint
from utils.runtime.distributed import alone


def weights_of(directory, name="model"):
    return load_file(newest_checkpoint(directory) / f"{name}.safetensors")


def assert_close(a, b, tolerance):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() <= tolerance, name


def test_activation_checkpointing_changes_nothing_but_memory(flags, tmp_path):
    kept = {}
    for name in ("plain", "checkpointed"):
        more = ["--checkpoint_activations"] if name == "checkpointed" else []
        trainer = build(config_of(flags, *more, "--max_steps=2", f"--out_dir={tmp_path / name}"), ALONE)
        sizes = []  # of what autograd keeps for backward
        pack, batches = lambda x, to=sizes: to.append(x.numel()) or x, iter(trainer.loader())
        images, labels = next(batches)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            trainer.micro_loss(images, labels)
        kept[name] = sum(sizes)
        trainer.fit()
    assert_close(weights_of(tmp_path / "plain"), weights_of(tmp_path / "checkpointed"), 0)  # drop path included
    assert kept["checkpointed"] < 0.6 * kept["plain"]


# Which graphs are made does not depend on the backend: without one, the check takes seconds.
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_blocks_compute_the_same_and_compile_once(backend, model, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.manual_seed(0)
    compiled = FlexVAR(model.config)
    compiled.load_state_dict(model.state_dict())
    for block in compiled.blocks:
        block.compile_parts()
    for module in (model, compiled):
        module.train()
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters

    def gradients(module, schedule, labels, inputs):
        torch.manual_seed(1)  # drop path
        logits = module(labels, inputs, schedule)
        loss = logits.logsumexp(-1).mean()
        return logits.detach(), torch.autograd.grad(loss, list(module.parameters()))

    graphs = 0
    for step in range(200):
        schedule = draw_schedule(0, step)
        labels, inputs = torch.tensor([1, 2]), torch.randn(2, schedule.total - 1, 32)
        if step % 50 == 0:  # compared now and then; a forward of each schedule is enough to see a recompile
            (a, da), (b, db) = (gradients(m, schedule, labels, inputs) for m in (model, compiled))
            assert worst(b, a) < 1e-5
            assert all(worst(x, y) < 1e-4 for x, y in zip(db, da, strict=True))
        else:
            compiled(labels, inputs, schedule)
        if step < 2 or step % 20 == 0:
            with torch.no_grad():
                compiled(labels, inputs, schedule)
        if step == 1:
            graphs = counters["stats"]["unique_graphs"]
            assert graphs > 0
    assert counters["stats"]["unique_graphs"] == graphs, "a schedule led to a recompile"


@pytest.mark.slow
def test_a_compiled_run_trains_saves_and_samples(flags, tmp_path):
    trainer = build(config_of(flags, "--compile", "--ema=0.5", "--max_steps=2"), ALONE)
    calls = []
    block = trainer.model.blocks[0]
    before = block.before_attention
    block.before_attention = lambda *args: calls.append(1) or before(*args)
    trainer.fit()
    assert calls  # the compiled form is what runs
    plain = build(config_of(flags, "--ema=0.5", "--max_steps=2", f"--out_dir={tmp_path / 'plain'}"), ALONE)
    plain.fit()
    for name in ("model", "ema"):
        assert_close(weights_of(tmp_path / "run", name), weights_of(tmp_path / "plain", name), 1e-3)


def test_sharded_training_equals_ddp(flags, tmp_path):
    """DDP's last two steps again, fully sharded over the ranks: the same weights and average, saved whole."""
    ddp, fsdp = tmp_path / "ddp", tmp_path / "fsdp"
    common = [*flags, "--ema=0.5", "--save_every_steps=2", "--max_steps=4", "--vis_ema", "--vis_every=1"]
    tool_on_ranks(2, main, *common, f"--out_dir={ddp}")
    half = "checkpoints/step_0000002"
    shutil.copytree(ddp / half, fsdp / half)
    tool_on_ranks(2, main, *common, "--parallel=fsdp", f"--out_dir={fsdp}")
    for kind in ("model", "ema"):
        before = load_file(ddp / half / f"{kind}.safetensors")
        assert any((before[name] - x).abs().max() > 1e-3 for name, x in weights_of(ddp, kind).items())
        assert_close(weights_of(ddp, kind), weights_of(fsdp, kind), 2e-5)
    moments = [torch.load(run / "checkpoints/step_0000004/state.pt")["optimizer"]["state"] for run in (ddp, fsdp)]
    for a, b in zip(*(m.values() for m in moments), strict=True):
        assert torch.allclose(a["exp_avg"], b["exp_avg"], atol=1e-6)
    assert (fsdp / "samples/step_0000004.png").read_bytes() == (ddp / "samples/step_0000004.png").read_bytes()
    held_out = [json.loads((r / "metrics.jsonl").read_text().splitlines()[-1])["val/loss"] for r in (ddp, fsdp)]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-5)
    alone = build(config_of(common, f"--out_dir={fsdp}"), ALONE)  # and one process can go on from it
    assert alone.step == 4


def test_sharding_and_fp16_contradict_each_other(flags):
    with pytest.raises(SystemExit):
        config_of(flags, "--parallel=fsdp", "--precision=fp16")


def test_a_deep_config_shards_every_block():
    model = FlexVAR(FlexVARConfig(depth=3, width=64, num_classes=2, codebook_size=8, codebook_dim=4))
    owned = {id(p) for unit in model.shard_units() for p in unit.parameters()}
    rest = {name.split(".")[0] for name, p in model.named_parameters() if id(p) not in owned}
    assert rest == {"class_emb", "pos_start", "pos_1LC", "word_embed", "head_nm", "head"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("more", [[], ["--rollout=argmax", "--ssr=last"], ["--checkpoint_activations"]])
def test_a_step_never_waits_for_the_gpu(more, flags):
    trainer = build(config_of(flags, "--max_steps=9", "--log_every=100", *more), alone())
    batches = iter(trainer.loader())
    for _ in range(2):
        trainer.train_step(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trainer.train_step(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
