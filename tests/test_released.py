import re

import pytest
import torch

from models import VQVAE, Guidance, SamplingConfig, ScaleSchedule, VQVAEConfig, build_vae_var, generate
from models.released import ReleasedFlexVAR
from models.weights import save_weights
from tests.conftest import ROOT, fill, worst


@pytest.fixture
def files(vae, model, tmp_path):
    """The reference models as released files: a tokenizer, and a training checkpoint of the transformer."""
    torch.save({"model": vae.state_dict()}, tmp_path / "vae.pth")
    weights = {**model.state_dict(), "attn_bias_for_masking": torch.zeros(1, 1, 30, 30)}
    torch.save({"epoch": 1, "iter": 0, "trainer": {"var_wo_ddp": weights}, "args": {}}, tmp_path / "var.pth")
    return tmp_path / "vae.pth", tmp_path / "var.pth"


def test_the_readme_snippet_runs_as_it_stands(files, tmp_path, monkeypatch):
    """With a small model's sizes and files put in, and nothing else changed."""
    readme = (ROOT / "README.md").read_text()
    snippet = next(code for code in re.findall(r"```python\n(.*?)```", readme, re.S) if "build_vae_var" in code)
    for full, small in {
        "V=8912": "V=128",
        "num_classes=1000": "num_classes=10",
        "depth=16": "depth=2",
        "'pretrained/FlexVAE.pth'": repr(str(files[0])),
        "'pretrained/SARd16-epo179.pth'": repr(str(files[1])),
        "top_k=900, top_p=0.95": "top_k=900, top_p=0.95, infer_patch_nums=(1, 2, 3, 4)",
    }.items():
        assert full in snippet, full
        snippet = snippet.replace(full, small)
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(snippet.replace("[207, 88, 970, 980]", "[1, 2, 3, 4]"), scope)
    assert scope["images"].shape == (4, 3, 64, 64)
    assert (tmp_path / "samples.png").stat().st_size > 1000


def test_released_arguments_have_their_released_meaning(vae, model, expected):
    released = ReleasedFlexVAR(model.config)
    released.load_state_dict(model.state_dict())
    common = {"vqvae": vae, "B": 2, "label_B": expected["labels"], "top_k": 1, "cfg": 1.5}
    sides = (1, 2, 3, 4)
    ramp = released.autoregressive_infer_cfg(**common, infer_patch_nums=sides)
    assert worst(ramp, expected["sample.greedy.ramp1.5.images"]) < 2e-5
    constant = released.autoregressive_infer_cfg(**common, infer_patch_nums=sides, used_llamagen_cfg=True)
    assert torch.equal(constant, vae.decode(expected["sample.greedy.constant1.5.tokens"][:, -16:], 4))
    larger = released.autoregressive_infer_cfg(**common, infer_patch_nums=(1, 2, 3, 4, 6))
    assert worst(larger[..., ::8, ::8], expected["sample.greedy.larger.images"]) < 2e-5
    drawn = released.autoregressive_infer_cfg(vae, 2, [3, 7], g_seed=5, cfg=1.5, top_k=20, infer_patch_nums=sides)
    schedule = ScaleSchedule(sides)
    assert torch.equal(
        drawn, generate(model, vae, expected["labels"], schedule, SamplingConfig(Guidance("ramp", 1.5), 20), [5, 6])
    )
    assert released.autoregressive_infer_cfg(vae, 3, 4, infer_patch_nums=(1, 2)).shape == (3, 3, 32, 32)
    assert released.autoregressive_infer_cfg(vae, 3, infer_patch_nums=(1, 2)).shape == (3, 3, 32, 32)
    torch.manual_seed(1)
    first = released.autoregressive_infer_cfg(vae, 1, 4, infer_patch_nums=sides)
    second = released.autoregressive_infer_cfg(vae, 1, 4, infer_patch_nums=sides)
    assert not torch.equal(first, second)  # without g_seed, the global generator moves on


def test_wrong_requests_are_named(vae, model, files):
    released = fill(ReleasedFlexVAR(model.config), 1)
    with pytest.raises(ValueError, match="B is 3, but label_B holds 2"):
        released.autoregressive_infer_cfg(vae, 3, [1, 2])
    with pytest.raises(ValueError, match="10 is out of range"):
        released.autoregressive_infer_cfg(vae, 1, 10)
    with pytest.raises(ValueError, match="128 × 32, not V × Cvae = 8912 × 32"):
        build_vae_var(vae_ckpt=files[0], depth=1)
    with pytest.raises(ValueError, match="attn_l2_norm must be True"):
        build_vae_var(depth=1, attn_l2_norm=False)
    with pytest.raises(TypeError, match="'deep'"):
        build_vae_var(depth=1, deep=2)
    with pytest.raises(ValueError, match="more_smooth"):
        released.autoregressive_infer_cfg(vae, 1, 1, more_smooth=True)


def test_flexvars_tokenizer_makes_it_flexvar_whatever_else_is_named(tmp_path):
    """FlexVAR's code comes from VAR's, and has its arguments."""
    config = VQVAEConfig(32, (1, 1), res_blocks=1, z_channels=32, codebook_size=64, codebook_dim=8)
    save_weights(VQVAE(config), tmp_path / "vae.safetensors")
    sizes = {"V": 64, "Cvae": 8, "ch": 160, "share_quant_resi": 4, "depth": 1, "num_classes": 10}
    more = {"patch_nums": (1, 2, 3), "flash_if_available": True, "fused_if_available": False, "init_std": -1}
    vae, model = build_vae_var(**sizes, **more, vae_ckpt=tmp_path / "vae.safetensors")
    assert vae.config == config
    assert type(model).__name__ == "ReleasedFlexVAR"
    assert type(build_vae_var(**sizes, **more)[1]).__name__ == "ReleasedVAR"
