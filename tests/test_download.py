import hashlib
import io
import sys
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from models.weights import find_weights
from pretrained import download as module
from tests.conftest import ROOT, run


def test_each_released_file_has_its_repository():
    assert set(module.FILES) == {
        "FlexVAE.pth", "FlexVARd16-epo179.pth", "FlexVARd20-epo249.pth", "FlexVARd24-epo349.pth",
        "SARd16-epo179.pth", "SARd20-epo249.pth", "SARd24-epo349.pth",
        "vae_ch160v4096z32.pth", "var_d16.pth", "var_d20.pth", "var_d24.pth", "var_d30.pth", "var_d36.pth",
        "FlowAR-S.pth", "FlowAR-L.pth", "FlowAR-H.pth",
    }  # fmt: skip
    assert {module.FILES[name] for name in module.FILES if name.startswith("Flex")} == {"jiaosiyu1999/FlexVAR"}
    assert {module.FILES[name] for name in module.FILES if name.startswith("SAR")} == {"ZGZzz/SAR"}
    listed = (ROOT / "pretrained/README.md").read_text()
    assert all(f"`{name}` | `{repository}`" in listed for name, repository in module.FILES.items())


def test_a_file_is_fetched_once_from_its_repository(monkeypatch, tmp_path):
    asked = []

    def fetch(repository, name, local_dir):
        asked.append((repository, name))
        local_dir.mkdir(exist_ok=True)
        (local_dir / name).write_text("weights")
        return str(local_dir / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    monkeypatch.setattr(module, "published_digest", lambda name: hashlib.sha256(b"weights").hexdigest())
    for _ in range(2):
        assert module.download("SARd16-epo179.pth", tmp_path).read_text() == "weights"
    assert asked == [("ZGZzz/SAR", "SARd16-epo179.pth")]


def test_a_download_that_is_something_else_is_removed(monkeypatch, tmp_path):
    def fetch(repository, name, local_dir):
        local_dir.mkdir(exist_ok=True)
        (local_dir / name).write_text("not the weights")
        return str(local_dir / name)

    asked = []

    def metadata(url):
        asked.append(url)
        return SimpleNamespace(etag=hashlib.sha256(b"weights").hexdigest())  # of a large file it is the SHA-256

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", metadata)
    with pytest.raises(ConnectionError, match=r"FlexVAE.pth came damaged, and was removed: its SHA-256 is"):
        module.download("FlexVAE.pth", tmp_path)
    assert not list(tmp_path.rglob("*.pth"))
    assert asked == ["https://huggingface.co/jiaosiyu1999/FlexVAR/resolve/main/FlexVAE.pth"]


def test_offline_is_a_plain_message(monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(ConnectionError, match=r"could not fetch FlexVAE.pth .*no connection.*put it at"):
        module.download("FlexVAE.pth", tmp_path)
    done = run(sys.executable, "pretrained/download.py", "SARd16-epo179.pth", check=False, HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert done.stderr.startswith("error: could not fetch SARd16-epo179.pth")
    assert len(done.stderr.strip().splitlines()) == 1


def test_command_line_lists_and_refuses_unknown_names():
    assert "FlexVARd24-epo349.pth" in run(sys.executable, "pretrained/download.py").stdout
    done = run(sys.executable, "pretrained/download.py", "SARd17.pth", check=False)
    assert done.returncode == 1
    assert "SARd17.pth is no released file" in done.stderr


def test_a_missing_released_file_says_how_to_get_it():
    with pytest.raises(ValueError, match=r"python pretrained/download.py FlexVAE.pth fetches it"):
        find_weights("nowhere/FlexVAE.pth")


@pytest.mark.parametrize(("answer", "fetched"), [("y\n", ["FlexVAE.pth"]), ("\n", [])])
def test_only_a_person_at_a_terminal_is_asked(answer, fetched, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(module, "download", calls.append)
    stdin = io.StringIO(answer)
    monkeypatch.setattr("sys.stdin", stdin)
    module.offer(tmp_path / "FlexVAE.pth")
    assert calls == []  # no terminal
    stdin.isatty = lambda: True
    module.offer(tmp_path / "my-own.pth")
    module.offer(tmp_path / "FlexVAE.pth")
    assert calls == fetched
