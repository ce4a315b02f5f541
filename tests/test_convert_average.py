"""The mean of adapters: what peft says with it is the mean of what they add, and strangers are refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("peft")
pytest.importorskip("gguf")

from conftest import ROOT
from test_convert_adapter import change
from tiny_gguf import add_lora, torch_logits
from tiny_models import make_llama

from parrot_edge.convert.adapter import read_updates, scaled_alpha
from parrot_edge.convert.average import average_adapters
from parrot_edge.errors import ModelError, OutputError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

RECORD = {"role": "ask", "base": {"name": "tiny"}, "invocation": [1, 2], "recipe": {"seed": 0}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of one base: one/, two/ (another rank and alpha) and three/ (rank-stabilised)."""
    folder = tmp_path_factory.mktemp("made")
    add_lora(make_llama(), folder / "one", seed=1)
    add_lora(make_llama(), folder / "two", seed=2, r=2, lora_alpha=7)
    add_lora(make_llama(), folder / "three", seed=3, use_rslora=True)
    return folder


@pytest.fixture
def three(made: Path, tmp_path: Path) -> list[Path]:
    """Copies of the three, to be changed."""
    return [Path(shutil.copytree(made / name, tmp_path / name)) for name in ("one", "two", "three")]


def read_products(folder: Path) -> dict[str, np.ndarray]:
    """What an adapter adds to each module, (out, in)."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = scaled_alpha(config) / config["r"]
    return {module: scale * (up @ down) for module, (down, up) in read_updates(folder, config["r"]).items()}


def test_mean_has_the_largest_part_of_what_the_adapters_add(three: list[Path], tmp_path: Path) -> None:
    kept = average_adapters(three, tmp_path / "mean", scale=0.8)
    members, mean = [read_products(folder) for folder in three], read_products(tmp_path / "mean")
    assert set(mean) == set(members[0])
    held = whole = 0.0
    for module, values in mean.items():
        exact = 0.8 * sum(member[module] for member in members) / 3
        sizes = np.linalg.svd(exact, compute_uv=False)
        assert np.linalg.norm(exact - values) == pytest.approx(np.linalg.norm(sizes[4:]), rel=1e-5)
        held, whole = held + np.sum(sizes[:4] ** 2), whole + np.sum(sizes**2)
    assert 0.4 < kept == pytest.approx(held / whole, rel=1e-6)
    assert kept < 0.99


def test_mean_of_an_adapter_with_itself_says_the_same(made: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    assert average_adapters([made / "one", made / "one"], tmp_path / "mean") == pytest.approx(1)
    said = [
        torch_logits(PeftModel.from_pretrained(make_llama(), folder).eval())
        for folder in (made / "one", tmp_path / "mean")
    ]
    assert np.abs(said[0] - torch_logits(make_llama())).max() > 0.1
    np.testing.assert_allclose(said[1], said[0], atol=1e-4)


def test_rank_above_the_size_of_a_matrix_is_filled_up(tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        add_lora(make_llama(), tmp_path / name, seed=seed, r=40)
    narrow = [read_products(tmp_path / name) for name in ("one", "two")]
    assert average_adapters([tmp_path / "one", tmp_path / "two"], tmp_path / "mean") > 0.5
    mean = read_products(tmp_path / "mean")
    module = min(mean, key=lambda module: mean[module].shape[0])
    assert mean[module].shape[0] < 40
    np.testing.assert_allclose(mean[module], (narrow[0][module] + narrow[1][module]) / 2, atol=1e-5)


def test_record_lists_the_members(three: list[Path], tmp_path: Path) -> None:
    for number, folder in enumerate(three):
        (folder / "training.json").write_text(json.dumps({**RECORD, "data": {"rows": number}}))
        (folder / "recipe.yaml").write_text(f"seed: {number}\n")
    average_adapters(three, tmp_path / "mean", scale=0.5)
    record = json.loads((tmp_path / "mean" / "training.json").read_text())
    members = record.pop("mean_of")
    assert record == {**RECORD, "scale": 0.5}
    assert [member["data"] for member in members] == [{"rows": 0}, {"rows": 1}, {"rows": 2}]
    assert len({member["sha256"] for member in members}) == 3
    assert (tmp_path / "mean" / "recipe.yaml").read_text() == "seed: 0\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mean", "one", "three", "two"]


STRANGERS: dict[str, dict[str, Any]] = {
    "role": {"role": "chat"},
    "base": {"base": {"name": "other"}},
    "invocation": {"invocation": [3]},
}


@pytest.mark.parametrize("differs", STRANGERS)
def test_adapter_of_another_kind_is_refused(differs: str, three: list[Path], tmp_path: Path) -> None:
    for folder in three:
        (folder / "training.json").write_text(json.dumps(RECORD))
    change(three[1] / "training.json", **STRANGERS[differs])
    with pytest.raises(ModelError, match=f"two has another {differs} than .*one; average"):
        average_adapters(three, tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_activated_and_plain_adapters_have_no_mean(three: list[Path], tmp_path: Path) -> None:
    change(three[2] / "adapter_config.json", alora_invocation_tokens=[1, 2])
    with pytest.raises(ModelError, match="three has another invocation than"):
        average_adapters(three, tmp_path / "mean")


def test_adapters_of_different_modules_have_no_mean(made: Path, tmp_path: Path) -> None:
    add_lora(make_llama(), tmp_path / "few", target_modules=["q_proj"])
    with pytest.raises(ModelError, match="few has another set of modules than"):
        average_adapters([made / "one", tmp_path / "few"], tmp_path / "mean")


def test_one_adapter_has_no_mean(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="takes two adapters or more"):
        average_adapters([made / "one"], tmp_path / "mean")


def test_existing_folder_is_replaced_by_force_alone(made: Path, tmp_path: Path) -> None:
    (tmp_path / "mean").mkdir()
    (tmp_path / "mean" / "mine").touch()
    folders = [made / "one", made / "two"]
    with pytest.raises(OutputError, match="mean exists; choose another name or pass --force"):
        average_adapters(folders, tmp_path / "mean")
    assert (tmp_path / "mean" / "mine").exists()
    average_adapters(folders, tmp_path / "mean", force=True)
    assert sorted(path.name for path in (tmp_path / "mean").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_place_that_cannot_be_written_is_named(made: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written: No such file or directory; free some space"):
        average_adapters([made / "one", made / "two"], tmp_path / "nowhere" / "mean")


def test_script_tells_what_the_rank_holds_and_errors_in_a_sentence(made: Path, tmp_path: Path) -> None:
    script = [sys.executable, ROOT / "convert" / "average_adapters.py"]
    done = subprocess.run(
        [*script, made / "one", made / "two", "-o", tmp_path / "mean"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert "% of the mean's sum of squares" in done.stderr
    again = subprocess.run([*script, made / "one", "-o", tmp_path / "mean"], capture_output=True, text=True)
    assert (again.returncode, again.stderr.count("\n")) == (1, 1)
    assert again.stderr.startswith("Error: a mean takes two adapters")
