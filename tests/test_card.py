"""Model cards say where weights come from, how they were trained, what was measured, and nothing that is not known."""

import json

import pytest
from huggingface_hub import ModelCard

from evaluate import main as evaluate
from models.card import LICENCES, Origin, card, main
from models.pipeline import SARPipeline, open_pipeline
from pretrained.download import FILES
from tests.conftest import ALONE, config_of, tool
from train import build
from utils.runtime.checkpoint import checkpoints, step_of

REPORT = {
    "fid": 2.05, "inception_score": 267.1, "samples": 50_000, "features": "inception",
    "reference": "/data/VIRTUAL_imagenet256_labeled.npz",
    "settings": {"cfg": 2.2, "guidance": "ramp", "top_k": 900, "images_per_class": 50},
}  # fmt: skip


@pytest.fixture
def run(flags, tmp_path):
    build(config_of(flags, "--logger_type=none", "--csf_weight=0.3"), ALONE).fit()
    return tmp_path / "run"


def test_a_run_is_described_by_its_recipe(run, tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    out = tmp_path / "card.md"
    tool(main, "--ckpt", run, "--report", tmp_path / "report.json", "--out", out, check=True)
    text = out.read_text()
    for line in ("# SAR", "From scratch, 3 steps, on 1,300 images.", "| `--csf_weight` | 0.3 |", "| fid | 2.05 |"):
        assert line in text, line
    assert "guidance ramp, cfg 2.2, top_k 900, images_per_class 50, reference VIRTUAL_imagenet256_labeled.npz" in text
    assert "| samples | 50000 |" in text
    assert "not said" in text  # of a licence nobody spoke
    about = ModelCard(text).data
    assert (about.license, about.library_name, about.base_model) == ("other", "sar", None)


def test_save_pretrained_writes_it_and_the_copy_opens(run, tmp_path):
    pipeline = open_pipeline(str(run))
    pipeline.save_pretrained(tmp_path / "p", model_card_kwargs={"report": REPORT})
    text = (tmp_path / "p/README.md").read_text()
    assert "| `--training_mode` | csfl |" in text
    assert "| fid | 2.05 |" in text
    assert SARPipeline.from_pretrained(tmp_path / "p").describe() == pipeline.describe()


def test_a_teacher_forced_run_is_not_called_sar():
    """out/SAR is the directory of every run that is not named."""
    forced = str(card("x", "FlexVAR", Origin("SAR", "", {"training_mode": "teacher_forcing"}, "3 steps")))
    assert "# FlexVAR" in forced
    assert "Self-Autoregressive" not in forced
    assert "# SAR" in str(card("x", "FlexVAR", Origin("SARd16-epo179.pth")))
    assert "# FlexVAR" in str(card("x", "FlexVAR", Origin("SAR-mine.pth")))


def test_the_settings_of_a_card_are_those_that_an_evaluation_writes(saved, real, tmp_path):
    command = ["--ckpt", saved, "--features=efficientnet_lite0", "--num_samples=1", "--reference", real]
    tool(evaluate, *command, "--out_dir", tmp_path / "e", check=True)
    text = str(card("x", "FlexVAR", Origin(), json.loads((tmp_path / "e/report.json").read_text())))
    assert "guidance ramp, cfg 2.2, top_k 900, top_p 0.95, classes 10, images_per_class 1, reference images" in text


def test_released_bases_bring_their_licence():
    assert set(LICENCES) <= set(FILES.values())
    from_flexvar = Origin("SAR-d16", "pretrained/FlexVARd16-epo179.pth", {"training_mode": "csfl"}, "10 steps")
    found = card("x", "FlexVAR", from_flexvar)
    assert (found.data.license, found.data.base_model) == ("other", "jiaosiyu1999/FlexVAR")
    assert "licensed as jiaosiyu1999/FlexVAR says" in str(found)
    assert card("x", "VAR", Origin("run", "pretrained/var_d16.pth", {}, "1 step")).data.license == "mit"
    assert card("x", "FlowAR", Origin("FlowAR-S.pth")).data.license == "apache-2.0"
    assert "none of these is an FID" in str(card("x", "VAR", Origin(), {**REPORT, "features": "efficientnet_lite0"}))


def test_the_step_is_that_of_the_checkpoint_that_was_opened(flags, tmp_path):
    more = ["--logger_type=none", "--training_mode=teacher_forcing", "--save_every_steps=1"]
    build(config_of(flags, *more), ALONE).fit()
    older, newer = checkpoints(tmp_path / "run")[-2:]
    for ckpt, step in ((older, older), (older / "model.safetensors", older), (tmp_path / "run", newer)):
        assert f"{step_of(step):,} steps" in str(open_pipeline(str(ckpt)).card())


def test_teacher_forcing_says_nothing_of_rollouts(flags, tmp_path):
    flags = [*flags, "--logger_type=none", "--training_mode=teacher_forcing"]
    build(config_of(flags), ALONE).fit()
    text = str(open_pipeline(str(tmp_path / "run")).card())
    assert "# FlexVAR" in text
    assert "rollout" not in text
    assert "Self-Autoregressive" not in text
