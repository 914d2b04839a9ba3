import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import parity
from tests.conftest import DATA, tool


@pytest.mark.parametrize("name", ["flexvar", "var", "flowar"])
def test_every_tensor_is_as_the_released_implementation_computed_it(name, capsys):
    assert parity.compare(DATA / name) == []
    said = capsys.readouterr().out.splitlines()
    assert len(said) >= len(load_file(DATA / name / "expected.safetensors"))
    assert all(line.endswith("ok") for line in said)


def test_what_is_off_is_named_and_the_status_says_so(tmp_path):
    shutil.copytree(DATA / "flexvar", tmp_path / "data")
    tensors = load_file(DATA / "flexvar/expected.safetensors")
    keep = {n: tensors[n] for n in ("vae.codes", "teacher.logits", "teacher.loss")}
    keep["vae.codes"][1, 3] += 1
    keep["teacher.logits"] = keep["teacher.logits"] * (1 + 3e-5)
    save_file({**keep, "of.nothing": torch.zeros(1)}, tmp_path / "data/expected.safetensors")
    status, out, _ = tool(parity.main, tmp_path)
    assert status == 1
    lines = out.splitlines()
    assert [line.split()[0].removeprefix("data/") for line in lines if line.endswith("OFF")] == [
        "vae.codes",
        "teacher.logits",
    ]
    assert lines[-1] == "3 off: vae.codes, teacher.logits, of.nothing"
    status, _, err = tool(parity.main, tmp_path / "nothing")
    assert status == 2
    assert "holds no config.json" in err
