import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from models.class_names import default_names, find_class, imagenet_classes, split_classes
from models.pipeline import SARPipeline, open_pipeline, to_bytes
from models.scales import ScaleSchedule
from models.weights import save_weights
from tests.conftest import run
from utils.runtime.checkpoint import MODEL, Checkpoints, RunState

NAMES = [f"animal {letter}" for letter in "abcdefghij"]


@pytest.fixture
def pipeline(vae, model, schedule):
    return SARPipeline.of(vae, model, schedule, NAMES)


def same(a, b):
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a, b, strict=True))


def test_imagenet_names_are_there_offline():
    names = imagenet_classes()
    assert len(names) == 1000
    assert names[207] == "golden retriever"
    assert default_names(3) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("name", "wanted"), [("golden retriever", 207), ("Golden Retriever", 207), ("88", 88), (88, 88), (" macaw ", 88)]
)
def test_classes_are_found_by_name_or_id(name, wanted):
    assert find_class(name, imagenet_classes()) == wanted


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("golden retreiver", "did you mean golden retriever"),
        ("xyzzy", r"these are known \(tench, goldfish, .*1000 in all"),
        ("1000", "1000 is out of range"),
        ("-1", r"out of range: this model knows 0…999 \(tench"),
    ],
)
def test_unknown_classes_suggest_the_nearest(name, message):
    with pytest.raises(ValueError, match=message):
        find_class(name, imagenet_classes())


ODD = ScaleSchedule((1, 4, 7))  # released models take side 7 greedily


def drawn_at_seven(pipeline, **options):
    """Whether side 7 depends on the seed, all coarser codes being equal."""
    held = {}

    def hold(s, codes):
        return held.setdefault(s, codes) if s != 7 else codes

    first, second = (pipeline.codes(3, seed=seed, edit=hold, **options)[7] for seed in (0, 1))
    return not torch.equal(first, second)


def test_released_weights_take_odd_sides_greedily_and_a_runs_own_are_drawn(vae, model, tmp_path):
    for name, weights in (("vae", vae), ("model", model)):
        save_weights(weights, tmp_path / f"{name}.safetensors")
    files = tmp_path / "vae.safetensors", tmp_path / "model.safetensors"
    released = SARPipeline.from_files(*files, ODD)
    assert not drawn_at_seven(released)
    assert "sides 7 are taken greedily" in released.greedy_sides(released.sampling_config())
    (tmp_path / "run").mkdir()
    save_weights(model, tmp_path / "run/model.safetensors")
    described = {"model": {"pn": "1_4_7", "vae_ckpt": str(files[0]), "supervision": "image"}}
    (tmp_path / "run/config.json").write_text(json.dumps(described))
    own = open_pipeline(str(tmp_path / "run"))
    assert own.schedule == ODD
    assert own.supervision == "image"
    assert drawn_at_seven(own)
    assert own.greedy_sides(own.sampling_config()) == ""
    assert not drawn_at_seven(own, max_pn=4)  # asked for
    own.save_pretrained(tmp_path / "saved")  # what it is goes along
    again = SARPipeline.from_pretrained(tmp_path / "saved")
    assert (again.supervision, again.max_pn) == ("image", None)
    assert drawn_at_seven(again)


def test_images_do_not_depend_on_how_many_there_are(pipeline):
    all_of_them = pipeline(["animal a", 3], n=2, seed=5)
    assert all_of_them[0].size == (64, 64)
    assert same(all_of_them[2:], pipeline("animal d", n=2, seed=7))
    with pytest.raises(ValueError, match="at least one class"):
        pipeline([])
    with pytest.raises(ValueError, match="did you mean animal b"):
        pipeline("animel b")


def test_steps_end_with_the_image(pipeline):
    steps = pipeline.steps("animal a", n=2, seed=5)
    assert [images[0].size for images in steps.values()] == [(16, 16), (32, 32), (48, 48), (64, 64)]
    assert same(steps[4], pipeline("animal a", n=2, seed=5))


def test_saved_and_loaded_from_a_directory(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "p")
    assert {"config.json", "model.safetensors"} <= {p.name for p in (tmp_path / "p").iterdir()}
    again = SARPipeline.from_pretrained(str(tmp_path / "p"))
    assert again.class_names == NAMES
    assert again.schedule == pipeline.schedule
    assert not again.training
    assert same(again("animal c", seed=1), pipeline("animal c", seed=1))
    assert same(open_pipeline(str(tmp_path / "p"))("animal c", seed=1), pipeline("animal c", seed=1))
    with pytest.raises(ValueError, match="has its own tokenizer"):
        open_pipeline(str(tmp_path / "p"), vae_ckpt="other.pth")


def test_half_a_file_is_refused(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "p")
    weights = load_file(tmp_path / "p/model.safetensors")
    save_file(dict(list(weights.items())[::2]), tmp_path / "p/model.safetensors")
    with pytest.raises(RuntimeError, match="Missing key"):
        SARPipeline.from_pretrained(str(tmp_path / "p"))


def test_pushed_to_the_hub_is_what_was_saved(pipeline, tmp_path, monkeypatch):
    uploaded = {}

    def upload(self, *, repo_id, folder_path, **kwargs):
        uploaded[repo_id] = sorted(p.name for p in folder_path.iterdir())

    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo", lambda self, repo_id, **k: type("R", (), {"repo_id": repo_id})
    )
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    pipeline.push_to_hub("someone/sar")
    assert {"config.json", "model.safetensors"} <= set(uploaded["someone/sar"])


def test_converter_and_mismatched_files(vae, model, tmp_path):
    torch.save({"model": vae.state_dict()}, tmp_path / "vae.pth")
    torch.save(model.state_dict(), tmp_path / "var.pth")
    files = ["--vae_ckpt", tmp_path / "vae.pth", "--ckpt", tmp_path / "var.pth"]
    run(sys.executable, "-m", "models.pipeline", *files, "--pn", "1_2_3_4", "--out", tmp_path / "p")
    again = SARPipeline.from_pretrained(str(tmp_path / "p"))
    assert again.schedule == ScaleSchedule((1, 2, 3, 4))
    assert torch.equal(again.model.head.weight, model.head.weight)
    small = {**vae.state_dict(), "quantize.embedding.weight": torch.randn(64, 32)}
    torch.save(small, tmp_path / "small.pth")
    with pytest.raises(ValueError, match=r"128 × 32 codebook, .* has one of 64 × 32"):
        SARPipeline.from_files(tmp_path / "small.pth", tmp_path / "var.pth")


def test_a_run_brings_its_tokenizer_scales_and_names(vae, model, tmp_path):
    save_weights(vae, tmp_path / "vae.safetensors")
    (tmp_path / "run").mkdir()
    save_weights(model, tmp_path / "run/model.safetensors")
    described = {"model": {"vae_ckpt": str(tmp_path / "vae.safetensors"), "pn": "1_2_4"}, "class_names": NAMES}
    (tmp_path / "run/config.json").write_text(json.dumps(described))
    opened = open_pipeline(str(tmp_path / "run"))
    assert opened.schedule.sides == (1, 2, 4)
    assert opened.class_names == NAMES
    assert open_pipeline(str(tmp_path / "run"), pn="1_3").schedule.sides == (1, 3)


def test_a_checkpoint_and_its_files_bring_the_runs_description_too(vae, model, tmp_path):
    save_weights(vae, tmp_path / "vae.safetensors")
    found = Checkpoints(tmp_path / "run", keep=1)
    found.submit(RunState(3, {}, {}), {MODEL: model.state_dict()}, {}, kept=False)
    found.finish()
    step = found.path(3)
    described = {"model": {"vae_ckpt": str(tmp_path / "vae.safetensors"), "pn": "1_2_4"}, "class_names": NAMES}
    (tmp_path / "run/config.json").write_text(json.dumps(described))
    for ckpt in (tmp_path / "run", step, step / "model.safetensors"):
        assert open_pipeline(str(ckpt)).schedule.sides == (1, 2, 4)
    with pytest.raises(ValueError, match=r"--use_ema takes .* a file"):
        open_pipeline(str(step / "model.safetensors"), use_ema=True)
    with pytest.raises(ValueError, match="no weight file"):
        open_pipeline(str(tmp_path / "typo"))


def test_a_name_that_is_nowhere_is_one_error(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"someone/sar-v1\.0 is no pipeline"):
        open_pipeline("someone/sar-v1.0")


def test_bytes_are_rounded_and_clamped():
    found = to_bytes(torch.tensor([-3.0, -1.0, -0.999, 0.0, 0.5, 1.0, 2.0]))
    assert found.tolist() == [0, 0, 0, 128, 191, 255, 255]


AMBIGUOUS = ["Cat", "cat", "crane, bird", "crane", " spaces ", "3", "É", "crane"]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("Cat", 0), ("cat", 1), (" cat", 1), ("crane, bird", 2), (" spaces ", 4), ("spaces", 4), ("3", 5), (3, 3),
     ("e\u0301", 6), ("7", 7), ("+7", 7)],
)  # fmt: skip
def test_the_exact_name_comes_first(name, wanted):
    assert find_class(name, AMBIGUOUS) == wanted


@pytest.mark.parametrize(("name", "ids"), [("CAT", r"0 \(Cat\), 1 \(cat\)"), ("crane", r"3 \(crane\), 7 \(crane\)")])
def test_what_is_ambiguous_lists_the_ids(name, ids):
    with pytest.raises(ValueError, match=ids):
        find_class(name, AMBIGUOUS)


def test_imagenets_own_twins():
    names = imagenet_classes()
    assert (find_class("cardigan", names), find_class("Cardigan", names)) == (474, 264)
    with pytest.raises(ValueError, match=r"several classes .*264 \(Cardigan\), 474 \(cardigan\)"):
        find_class("CARDIGAN", names)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("crane, bird", ["crane, bird"]),
        ('"crane, bird",Cat', ["crane, bird", "Cat"]),
        ('Cat, "crane, bird"', ["Cat", "crane, bird"]),
        ("crane, bird\n spaces ", ["crane, bird", " spaces "]),
        ("Cat,cat,3", ["Cat", "cat", "3"]),
        ("Crane, Bird", ["Crane, Bird"]),  # in another case
        ("Cat\r3\r\ncat", ["Cat", "3", "cat"]),  # line ends of other systems
        ("", []),
        (",,", []),
    ],
)
def test_names_with_commas_and_spaces_can_be_given(text, wanted):
    assert split_classes(text, AMBIGUOUS) == wanted
