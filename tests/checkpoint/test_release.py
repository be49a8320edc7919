"""Exports beside what they must not touch, from bases that are odd, and of runs that made parts anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_vlm.checkpoint import opening
from lightning_vlm.checkpoint.model_card import model_card
from lightning_vlm.checkpoint.opening import open_pretrained
from lightning_vlm.checkpoint.release import release
from lightning_vlm.checkpoint.trained import open_trained
from lightning_vlm.checkpoint.verify import verify
from lightning_vlm.checkpoint.weight_files import WeightFiles
from lightning_vlm.cli import main
from lightning_vlm.schema import DataError
from tests.fixtures.released_folders import write_12b, write_omni, write_weights


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_12b(tmp_path / "base")
    return tmp_path / "base"


def save_run(base: Path, run: Path, name: str | None = None, **options: Any) -> Path:
    """The checkpoint of a run that has not moved a weight, without the run."""
    model, _ = open_pretrained(base, options.get("from_scratch") or [])
    path = run / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    callbacks = options.pop("callbacks", {})
    hyperparameters = {"model_id": name or str(base), **options}
    torch.save({"state_dict": state, "hyper_parameters": hyperparameters, "callbacks": callbacks}, path)
    return path


# What must not be replaced


@pytest.mark.parametrize("out", ["base", "run", "run/checkpoints", ".", "notes"])
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["", "overwrite"])
def test_what_is_needed_or_no_export_is_never_replaced(base, tmp_path, capsys, monkeypatch, out, overwrite):
    save_run(base, tmp_path / "run")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").write_text("three years")
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(["export", "run", out, *overwrite]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {(tmp_path / out).resolve()}: ")
    assert "name another folder" in said
    assert ("pass --overwrite" in said) == (out == "notes" and not overwrite)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "card",
    [
        None,
        "# A model\n\nmade with lightning-vlm\n",
        "---\ntags: [image-text-to-text]\n---\n",
        "---\ntags: my-lightning-vlm-notes\n---\n",
        "---\nlightning-vlm\n---\n",
        "---\ntags: [lightning-vlm\n---\n",
    ],
)
def test_what_only_looks_like_an_export_is_not_replaced(base, tmp_path, card):
    """A model of other tools has a config too, and a card."""
    trained = open_trained(save_run(base, tmp_path / "run"))
    other = tmp_path / "other"
    other.mkdir()
    for name in ("config.json", "adapter_config.json", "model.safetensors"):
        (other / name).write_text("{}")
    if card is not None:
        (other / "README.md").write_text(card)
    before = {path: path.read_bytes() for path in other.iterdir()}
    message = (
        r"other: it has no README.md with the tag lightning-vlm: it is no export, and --overwrite would delete it; na"
    )
    with pytest.raises(DataError, match=message):
        release(trained, other, overwrite=True)
    assert {path: path.read_bytes() for path in other.iterdir()} == before


def test_an_earlier_export_is_known_also_when_its_card_was_edited(base, tmp_path):
    trained, out = open_trained(save_run(base, tmp_path / "run")), tmp_path / "out"
    release(trained, out)
    (out / "README.md").write_text("---\nlicense: other\ntags:\n- vision\n- lightning-vlm\n---\n\n# Mine\n")
    (out / "old").write_text("of the export before")
    release(trained, out, overwrite=True)
    assert not (out / "old").exists()
    assert (out / "README.md").read_text().startswith("---\npipeline_tag: ")


def test_a_file_is_no_folder_to_replace(base, tmp_path):
    (tmp_path / "out").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(DataError, match=r"out: there is a file, expected a folder or nothing; name another"):
            release(open_trained(save_run(base, tmp_path / f"run{overwrite}")), tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out").read_text() == "mine"
    with pytest.raises(DataError, match=r"no folder can be made there \(.*\); name another folder"):
        release(open_trained(tmp_path / "runTrue" / "checkpoints" / "last.ckpt"), tmp_path / "out" / "inside")


def test_an_export_inside_its_base_leaves_the_base_as_it_was(base, tmp_path):
    before = {path: path.read_bytes() for path in base.iterdir()}
    release(open_trained(save_run(base, tmp_path / "run")), base / "out")
    assert {path: path.read_bytes() for path in base.iterdir() if path.is_file()} == before
    assert (base / "out" / "model.safetensors").read_bytes() == before[base / "model.safetensors"]


# Bases


def test_a_downloaded_base_has_all_that_a_local_one_has(base, tmp_path, monkeypatch):
    """Links into a store, as the hub's tools lay them out, with the code that vLLM and transformers ask a config of."""
    asked = {}

    def download(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        snapshot = tmp_path / "snapshots" / "1"
        snapshot.mkdir(parents=True, exist_ok=True)
        for number, file in enumerate(sorted(base.iterdir())):
            if any(file.match(pattern) for pattern in allow_patterns) and not (snapshot / file.name).exists():
                (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
        return str(snapshot)

    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted(base.iterdir())):
        (tmp_path / "blobs" / str(number)).write_bytes(file.read_bytes())
    monkeypatch.setattr(opening, "snapshot_download", download)
    path = save_run(base, tmp_path / "run", "nvidia/some-12B")
    release(open_trained(path), tmp_path / "out")
    assert list(asked) == ["nvidia/some-12B"]
    exported = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir() if file.name != "README.md"}
    assert exported == {file.name: file.read_bytes() for file in base.iterdir()}
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
    assert "base_model: nvidia/some-12B" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("name", ["base", "./base", "no/such/base"])
def test_a_relative_base_is_looked_for_and_not_downloaded(base, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(opening, "snapshot_download", lambda *args, **options: pytest.fail("asked the hub"))
    save_run(base, tmp_path / "run", name)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["export", "../run", "out"]) == 1
    assert f"it was trained from {name!r}, which is no folder here" in capsys.readouterr().err
    assert main(["export", "../run", "out", "--base", "../bsae"]) == 1
    assert "error: --base: '../bsae' is not a folder" in capsys.readouterr().err
    assert main(["export", "../run", "out", "--base", "../base"]) == 0


def test_cards_name_no_place_of_a_disk(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").mkdir()
    base.rename(tmp_path / "secret" / "base")
    path = save_run(tmp_path / "secret" / "base", tmp_path / "run", "secret/base")
    card = model_card(open_trained(path), "out", 1)
    assert "base_model" not in card
    assert "| trained from | base |" in card


def test_a_base_without_a_processor_is_exported_and_told(base, tmp_path):
    for file in base.iterdir():
        if "token" in file.name or "process" in file.name or file.suffix == ".jinja":
            file.unlink()
    record = {"RunRecord": {"processor": {"processor_class": "NemotronVLProcessor"}}}
    result = release(open_trained(save_run(base, tmp_path / "run", callbacks=record)), tmp_path / "out")
    [note] = result.notes
    assert note.startswith("there is no tokenizer in this folder: ")
    assert note in (tmp_path / "out" / "README.md").read_text()


def test_a_base_whose_processor_cannot_be_loaded_is_told(base, tmp_path):
    (base / "preprocessor_config.json").write_text('{"image_processor_type": ')
    record = {"RunRecord": {"processor": {"processor_class": "NemotronVLProcessor", "max_num_tiles": 3}}}
    trained = open_trained(save_run(base, tmp_path / "run", callbacks=record))
    with pytest.warns(UserWarning, match="base: its processor cannot be loaded") as told:
        result = release(trained, tmp_path / "out")
    [message] = [str(warning.message) for warning in told if "cannot be loaded" in str(warning.message)]
    assert message.startswith(f"{base}: its processor cannot be loaded (")
    assert message.endswith("; processor_config.json gets the settings of the training")
    assert json.loads((tmp_path / "out" / "processor_config.json").read_text()) == record["RunRecord"]["processor"]
    assert result.notes == []


# Parts that were made anew


def test_what_is_new_may_have_another_shape_than_in_the_base(base, tmp_path):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "projector_hidden_size": 40}))
    release(open_trained(save_run(base, tmp_path / "run", from_scratch=["projector"])), tmp_path / "out")
    before, after = WeightFiles(base), WeightFiles(tmp_path / "out")
    assert list(after) == list(before)
    assert (before["mlp1.1.weight"].shape, after["mlp1.1.weight"].shape) == ((48, 128), (40, 128))
    assert open_pretrained(tmp_path / "out")[0].config.projector_hidden_size == 40


# What is in few folders


def test_indices_of_the_summary_may_be_there_and_as_many_as_they_are(base, tmp_path):
    key = "vision_model.radio_model.summary_idxs"
    files = WeightFiles(base)
    weights = {key: files.read(key) for key in files}
    write_weights(base, {**weights, key: torch.tensor([0, 1, 2, 3])}, 1)
    assert open_pretrained(base)[0].vision_model.summary_idxs.tolist() == [0, 1, 2, 3]
    release(open_trained(save_run(base, tmp_path / "run")), tmp_path / "out", check=lambda t, f: verify(t, f, None))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_a_run_without_a_sample_is_verified_on_text(tmp_path, make_theirs):
    """The first tokens of a vocabulary have placeholders among them."""
    write_omni(tmp_path / "omni", make_theirs("ME*-", sound=True, moe_intermediate_size=48))
    trained = open_trained(save_run(tmp_path / "omni", tmp_path / "run"))
    assert verify(trained, tmp_path / "omni", None) > 0


def test_another_dtype_is_told_in_the_config_of_each_part(base, tmp_path):
    config = json.loads((base / "config.json").read_text())
    config["llm_config"]["torch_dtype"] = "bfloat16"
    (base / "config.json").write_text(json.dumps(config))
    release(open_trained(save_run(base, tmp_path / "run")), tmp_path / "out", dtype=torch.float32)
    config["torch_dtype"] = config["llm_config"]["torch_dtype"] = "float32"
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_config_alone_does_not_say_what_dtype_random_weights_have(base, tmp_path, dtype):
    """A run that took the config of a folder and no weights is stored as it was trained."""
    path = save_run(base, tmp_path / "run", init="random")
    content = torch.load(path, weights_only=True)
    content["state_dict"] = {name: value.to(dtype) for name, value in content["state_dict"].items()}
    torch.save(content, path)
    release(open_trained(path), tmp_path / "out")
    assert {tensor.dtype for tensor in WeightFiles(tmp_path / "out").values()} == {dtype}
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "out"))
    assert before["torch_dtype"] == "bfloat16"
    assert after == {**before, "torch_dtype": str(dtype).removeprefix("torch.")}


def test_an_index_without_metadata_is_an_index(make_theirs, tmp_path):
    write_omni(tmp_path / "base", make_theirs("ME*-"))
    index = tmp_path / "base" / "model.safetensors.index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "metadata": None}))
    trained = open_trained(save_run(tmp_path / "base", tmp_path / "run"))
    release(trained, tmp_path / "same")
    assert (tmp_path / "same" / index.name).read_bytes() == index.read_bytes()
    release(trained, tmp_path / "wide", dtype=torch.float32)
    files = WeightFiles(tmp_path / "wide")
    assert files.index is not None
    assert files.index["metadata"] == {"total_size": files.num_bytes}
