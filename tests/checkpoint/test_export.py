"""From a released folder through a training and back: the same files without training, the same model after it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING
from transformers import NemotronH_Omni_Reasoning_V3, NemotronH_Omni_Reasoning_V3_Config

from lightning_vlm import NemotronVL, NemotronVLConfig, NemotronVLModule, VLMDataModule
from lightning_vlm.checkpoint import hf_export
from lightning_vlm.checkpoint.hf_import import import_weights
from lightning_vlm.checkpoint.merged import MergedWeights
from lightning_vlm.checkpoint.opening import open_pretrained, planned_model
from lightning_vlm.checkpoint.release import Release, release
from lightning_vlm.checkpoint.shards import _Plain
from lightning_vlm.checkpoint.trained import find_checkpoint, open_trained
from lightning_vlm.checkpoint.weight_files import WeightFiles
from lightning_vlm.cli import main
from lightning_vlm.models.lora import adapters_of
from lightning_vlm.schema import DataError
from tests.distributed.test_sharded_import import apply
from tests.distributed.test_text_only_ranks import run_ranks
from tests.fixtures.released_folders import ROWS_12B, write_12b, write_omni, write_weights
from tests.fixtures.twins import with_limits_of_config

MIXED = [[5, (2, 6), 3, (4, 4), 9], [8]]


@pytest.fixture(params=["nano", "omni"])
def base(request: Any, tmp_path: Path, make_theirs: Callable[..., Any]) -> Path:
    """A folder as released."""
    folder = tmp_path / request.param
    if request.param == "nano":
        write_12b(folder)
    else:
        write_omni(folder, make_theirs("ME*-", sound=True, moe_intermediate_size=48))
    return folder


@pytest.fixture
def fit(make_task: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Trains two steps, and returns the checkpoint."""

    def fit(folder: Path, precision: Any = "32-true", processor_options: Any = None, **options: Any) -> Path:
        module = NemotronVLModule(str(folder), **{"lr": 1e-3, "generate_on_validation": False, **options})
        rows = str(make_task())
        data = VLMDataModule(train=rows, processor=str(folder), batch_size=4, processor_options=processor_options)
        quiet = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
        trainer = L.Trainer(accelerator="cpu", max_steps=2, precision=precision, **dict.fromkeys(quiet, False))
        trainer.fit(module, datamodule=data)
        path = tmp_path / "run" / "checkpoints" / "last.ckpt"
        trainer.save_checkpoint(path)
        return path

    return fit


def export(checkpoint: Path, out: Path, **options: Any) -> Release:
    return release(open_trained(checkpoint), out, **options)


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


# Nothing trained


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_what_was_not_trained_is_the_same_files(base, fit, tmp_path, precision):
    checkpoint = fit(base, precision, lr=0.0)
    export(checkpoint, tmp_path / "out")
    before, after = digests(base), digests(tmp_path / "out")
    card = after.pop("README.md")
    assert card
    assert after == before


def test_another_writers_order_and_metadata_are_kept(base, fit, tmp_path):
    files = WeightFiles(base)
    weights = {key: files.read(key) for key in files}
    for file in base.glob("*.safetensors*"):
        file.unlink()
    keys = list(weights)[::-1]
    header = hf_export.make_header(
        [hf_export.Entry(key, tuple(weights[key].shape), weights[key].dtype) for key in keys], {"by": "hand"}
    )
    hf_export.write_file(base / "model.safetensors", header, lambda entry: weights[entry.key], lambda done: None)
    export(fit(base, lr=0.0), tmp_path / "out")
    assert digests(base).items() <= digests(tmp_path / "out").items()


# Trained


def as_transformers(folder: Path) -> NemotronH_Omni_Reasoning_V3:
    """The folder in transformers' own class.

    Its config is spelled out: transformers 5.23 knows the 12B by no name, and refuses the Omni's ``model_type:
    parakeet``, which it takes out of a copy of the sound config and then reads the original.
    """
    config, _ = NemotronVLConfig.get_config_dict(folder)
    is_12b = config["model_type"] == "NemotronH_Nano_VL_V2"
    vision = {name: value for name, value in config["vision_config"].items() if name != "args"}
    sound = {name: value for name, value in config.get("sound_config", {}).items() if name != "model_type"}
    theirs = NemotronH_Omni_Reasoning_V3_Config(
        vision_config={**vision, "video_temporal_patch_size": 2, **({"num_registers": 13} if is_12b else {})},
        text_config={**config["llm_config"], **({"vocab_size": ROWS_12B} if is_12b else {})},
        audio_config=sound or None,
        audio_token_id=config.get("sound_context_token_id"),
        **{name: config[name] for name in ("vit_hidden_size", "projector_hidden_size", "img_context_token_id")},
    )
    model = NemotronH_Omni_Reasoning_V3.from_pretrained(folder, dtype=torch.float32, config=theirs).eval()
    return with_limits_of_config(model)


def test_transformers_own_class_reads_what_was_trained(base, fit, tmp_path, make_batch, as_floats):
    checkpoint = fit(base)
    export(checkpoint, tmp_path / "out", dtype=torch.float32)
    trained = open_trained(checkpoint)
    ours, _ = open_pretrained(base)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    ours.load_state_dict(dict(trained), strict=True)
    moved = [name for name, value in ours.state_dict().items() if not torch.equal(value, before[name])]
    assert {name.split(".")[0] for name in moved} >= {"language_model", "vision_model", "multi_modal_projector"}
    batch = make_batch(MIXED)
    with torch.no_grad():
        expected = ours(**batch).logits
        assert torch.equal(as_transformers(tmp_path / "out")(**as_floats(batch, ours)).logits, expected)
        assert torch.equal(open_pretrained(tmp_path / "out")[0](**batch).logits, expected)


def test_trained_weights_are_stored_as_the_base_has_them(base, fit, tmp_path):
    result = export(fit(base), tmp_path / "out")
    before, after = WeightFiles(base), WeightFiles(tmp_path / "out")
    assert {key: (t.file, t.dtype, t.shape, t.offset) for key, t in before.items()} == {
        key: (t.file, t.dtype, t.shape, t.offset) for key, t in after.items()
    }
    assert not torch.equal(before.read("mlp1.1.weight"), after.read("mlp1.1.weight"))
    assert result.num_bytes == before.num_bytes
    pruned = ["vLLM prepares media as in training with: vllm serve FOLDER --video-pruning-rate 0.7"]
    assert (result.base, result.notes) == (base, pruned if base.name == "nano" else [])


def test_another_dtype_spares_what_stays_float32(base, fit, tmp_path):
    export(fit(base), tmp_path / "out", dtype=torch.float16)
    files = WeightFiles(tmp_path / "out")
    kept = {key for key, tensor in files.items() if tensor.dtype != torch.float16}
    expected = {"norm_mean", "norm_std", "e_score_correction_bias", "num_batches_tracked"}
    assert {key.rpartition(".")[2] for key in kept} <= expected
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float16"
    index = tmp_path / "out" / "model.safetensors.index.json"
    if index.is_file():
        assert json.loads(index.read_text())["metadata"]["total_size"] == files.num_bytes


def test_shards_of_ranks_are_put_together(make_theirs, tmp_path):
    write_omni(tmp_path / "omni", make_theirs("ME*-", sound=True, moe_intermediate_size=48))
    run_ranks(partial(save_shards, tmp_path), tmp_path)
    export(tmp_path / "shards", tmp_path / "out")
    assert digests(tmp_path / "omni").items() <= digests(tmp_path / "out").items()


def save_shards(folder: Path, rank: int) -> None:
    """As Lightning's strategy for sharded models saves."""
    files = WeightFiles(folder / "omni")
    model = planned_model(folder / "omni", files)
    apply(model, "fsdp2")
    import_weights(model, files)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    dcp.save({"state_dict": state}, checkpoint_id=folder / "shards")
    if rank == 0:
        torch.save({"hyper_parameters": {"model_id": str(folder / "omni")}}, folder / "shards" / "meta.pt")


def test_metadata_of_shards_runs_no_code(make_theirs, tmp_path):
    dcp.save({"state_dict": {"model.a": torch.ones(3)}}, checkpoint_id=tmp_path / "shards", no_dist=True)
    torch.save({}, tmp_path / "shards" / "meta.pt")
    assert torch.equal(open_trained(tmp_path / "shards")["a"], torch.ones(3))
    for content, reason in (
        (b"cos\nsystem\n(S'touch ran'\ntR.", "(posix|os).system is no part of a checkpoint"),
        (b"cbuiltins\ngetattr\n(ctorch\nSize\nS'__class__'\ntR.", "__class__ of .* is no part of a checkpoint"),
    ):
        (tmp_path / "shards" / ".metadata").write_bytes(content)
        with pytest.raises(DataError, match=rf"cannot be read as plain data \({reason}"):
            open_trained(tmp_path / "shards")


def test_members_of_enums_are_read_as_every_python_writes_them(tmp_path):
    name = b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n"
    for member in (b"cbuiltins\ngetattr\n(" + name + b"S'TORCH_CHANNELS_LAST'\ntR.", name + b"(I1\ntR."):
        (tmp_path / ".metadata").write_bytes(member)
        with (tmp_path / ".metadata").open("rb") as file:
            assert _Plain(file).load() is _MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST


def test_a_model_without_a_base_has_the_released_names(make_model, tmp_path):
    model = make_model(pattern="ME*-")
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    options = {"config": model.config.to_dict()}
    torch.save({"state_dict": state, "hyper_parameters": options}, tmp_path / "a.ckpt")
    hf_export.SHARD_BYTES, before = 200_000, hf_export.SHARD_BYTES
    try:
        export(tmp_path / "a.ckpt", tmp_path / "out")
    finally:
        hf_export.SHARD_BYTES = before
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert not [key for key in WeightFiles(tmp_path / "out") if "layer_scale" in key or "language_model.model" in key]
    again = NemotronVL.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


def test_the_cards_of_runs_say_where_weights_come_from(base, fit, tmp_path):
    export(fit(base, freeze=["vision"]), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| trained from | {base.name} |" in card
    assert "| optimizer steps | 2 |" in card
    assert "| freeze | ['vision'] |" in card
    assert "| train/loss | " in card
    assert str(tmp_path) not in card


def test_settings_of_images_go_with_the_model(base, fit, tmp_path):
    name, value = ("max_tiles", 2) if base.name == "nano" else ("max_num_patches", 64)
    result = export(fit(base, processor_options={name: value}), tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "processor_config.json").read_text())
    assert settings["image_processor"][name] == value
    assert f"image_processor.{name} {12 if name == 'max_tiles' else 256} -> {value}" in result.notes[0]
    assert result.notes[0] in (tmp_path / "out" / "README.md").read_text()
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", base))
    if name == "max_tiles":
        assert config == before
        assert "--mm-processor-kwargs '{\"max_num_tiles\": 2}'" in result.notes[1]
    else:
        assert config["vision_config"]["args"]["max_num_patches"] == 64


# The command


def test_the_command_takes_a_runs_folder_and_verifies(base, fit, tmp_path, capsys):
    fit(base)
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "run"), str(out), "--dtype", "fp32", "--verify"]) == 0
    said = capsys.readouterr().out
    assert f"last.ckpt -> {out}: 0.00 GB in {len(WeightFiles(out).files)} file(s), the rest from {base}" in said
    assert "verified: logits of a sample of the training data are equal bit by bit (largest" in said
    assert main(["export", str(tmp_path / "run"), str(out)]) == 1
    assert "there is something already; name another folder, or pass --overwrite." in capsys.readouterr().err
    assert main(["export", str(tmp_path / "run"), str(out), "--overwrite"]) == 0
    assert WeightFiles(out)["mlp1.1.weight"].dtype == torch.bfloat16
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")) == []


def test_verification_refuses_other_weights(base, fit, tmp_path, capsys, monkeypatch):
    fit(base)
    write = hf_export.write_file

    def wrong(path: Path, header: bytes, read: Any, done: Any) -> None:
        write(path, header, lambda entry: read(entry) + (0.01 if entry.key == "mlp1.3.weight" else 0), done)

    monkeypatch.setattr(hf_export, "write_file", wrong)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--verify"]) == 1
    assert "its logits differ from the trained model's by" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_base_that_has_moved_can_be_named(base, fit, tmp_path, capsys):
    fit(base)
    moved = base.rename(tmp_path / "moved")
    arguments = ["export", str(tmp_path / "run"), str(tmp_path / "out")]
    assert main(arguments) == 1
    assert f"it was trained from '{base}', which is no folder here" in capsys.readouterr().err
    assert main([*arguments, "--base", str(moved)]) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "it does not exist; name a checkpoint, or the folder of a run that has one"),
        (lambda path: path.mkdir(), "there is no last.ckpt in it, nor in checkpoints/ below it; name a checkpoint"),
        (lambda path: path.write_bytes(b"no"), "it cannot be read as plain data"),
        (lambda path: torch.save({"a": 1}, path), "it is no checkpoint of a training"),
        (lambda path: torch.save({"state_dict": {"b": torch.ones(1)}}, path), "it holds no weights of a Nem"),
    ],
)
def test_what_is_no_checkpoint_is_told(tmp_path, capsys, make, message):
    make(tmp_path / "x")
    assert main(["export", str(tmp_path / "x"), str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert find_checkpoint(__file__) == Path(__file__)


def test_a_base_of_another_model_is_refused(base, fit, tmp_path):
    checkpoint = fit(base)
    files = WeightFiles(base)
    weights = {key: files.read(key) for key in files if not key.endswith("norm_f.weight")}
    weights["mlp1.3.weight"] = weights["mlp1.3.weight"][:, :5]
    (tmp_path / "other").mkdir()
    write_weights(tmp_path / "other", {**weights, "surplus.weight": torch.ones(2)}, 1)
    with pytest.raises(DataError, match=r"(?s)3 of its tensors do not fit.*other shape.*unexpected +1 +surplus.weight"):
        export(checkpoint, tmp_path / "out", base=tmp_path / "other")
    assert not (tmp_path / "out").exists()


# Nights in which something happens


def test_a_killed_export_leaves_no_folder_and_the_next_one_works(base, fit, tmp_path):
    checkpoint = fit(base)
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from lightning_vlm.checkpoint.release import release\n"
        "from lightning_vlm.checkpoint.trained import open_trained\n"
        "release(open_trained(Path(sys.argv[1])), Path(sys.argv[2]),\n"
        "        check=lambda weights, folder: os.kill(os.getpid(), signal.SIGKILL))\n"
    )
    out = tmp_path / "new" / "out"
    ended = subprocess.run([sys.executable, "-c", script, str(checkpoint), str(out)], check=False, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    assert [entry.name for entry in out.parent.iterdir()] == [".out.partial"]
    export(checkpoint, out)
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]


def test_a_full_disk_keeps_what_was_there(base, fit, tmp_path, monkeypatch):
    checkpoint, out = fit(base), tmp_path / "out"
    export(checkpoint, out)
    before = digests(out)

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(hf_export, "write_file", full)
    with pytest.raises(
        DataError, match=r"the disk was full after 0.00 GB, nothing was kept; make room, or name a folder"
    ):
        export(checkpoint, out, overwrite=True)
    monkeypatch.setattr(hf_export.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10}))
    with pytest.raises(DataError, match=r"0.00 GB are free, the weights take 0.00 GB, nothing was kept"):
        export(checkpoint, out, overwrite=True)
    assert digests(out) == before
    assert not (tmp_path / ".out.partial").exists()


def test_what_is_new_joins_the_last_file(make_theirs, fit, tmp_path):
    base = tmp_path / "omni"
    write_omni(base, make_theirs("ME*-", sound=True, moe_intermediate_size=48))
    files = WeightFiles(base)
    weights = {key: files.read(key) for key in files if "video_embedder" not in key}
    for file in base.glob("*.safetensors*"):
        file.unlink()
    write_weights(base, weights, 2)
    export(fit(base, lr=0.0, from_scratch=["vision.embeddings.video_patch_projection"]), tmp_path / "out")
    after = WeightFiles(tmp_path / "out")
    [key] = after.keys() - weights.keys()
    assert key == "vision_model.radio_model.model.patch_generator.video_embedder.weight"
    assert (after[key].file, after[key].dtype) == ("model-00002-of-00002.safetensors", torch.bfloat16)
    assert all(torch.equal(after.read(name), value) for name, value in weights.items())
    assert NemotronVL.from_pretrained(tmp_path / "out").vision_model.embeddings.video_patch_projection.weight.any()


# LoRA


def test_a_lora_run_is_exported_merged(base, fit, tmp_path, make_batch, as_floats, capsys):
    scopes = ["attention", "mamba", "mlp", *(["experts"] if base.name == "omni" else [])]
    fit(base, lora={"language": scopes, "vision": "lora", "projector": "full", "rank": 4}, lr=3e-2)
    arguments = ["export", str(tmp_path / "run"), str(tmp_path / "out")]
    assert main([*arguments, "--dtype", "fp32", "--verify"]) == 0
    module = NemotronVLModule.load_from_checkpoint(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    batch = make_batch(MIXED)
    with torch.no_grad():
        adapted = module.network.eval()(**batch).logits
        before = open_pretrained(base)[0](**batch).logits
        after = as_transformers(tmp_path / "out")(**as_floats(batch, module.network)).logits
    assert (adapted - before).abs().max() > 0.1
    assert (after - adapted).abs().max() < 1e-4 * adapted.abs().max()
    assert main([*arguments, "--adapter", "--overwrite"]) == 1
    assert "which an adapter in peft's format and released names cannot hold; export without" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_adapters_alone_add_up_to_the_merged_model(base, fit, tmp_path, capsys, precision):
    """Also where the weights are in half precision: the sum is rounded when it is stored, which here it is not."""
    checkpoint = fit(base, precision, lora={"vision": "lora", "projector": "lora", "rank": 4, "alpha": 12}, lr=3e-2)
    export(checkpoint, tmp_path / "out", dtype=torch.float32)
    assert main(["export", str(checkpoint), str(tmp_path / "adapter"), "--adapter"]) == 0
    assert main(["export", str(checkpoint), str(tmp_path / "adapter"), "--adapter", "--overwrite"]) == 0
    note = "vLLM applies adapters of the language model alone, and says nothing of those of vision, projector; "
    assert note in capsys.readouterr().out
    assert note in (tmp_path / "adapter" / "README.md").read_text()
    config = LoraConfig.from_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    before, after = WeightFiles(base), WeightFiles(tmp_path / "out")
    for module in config.target_modules:
        a, b = (tensors[f"base_model.model.{module}.lora_{which}.weight"] for which in "AB")
        rank = config.rank_pattern.get(module, config.r)
        assert a.shape[0] == rank == (12 if module.endswith("qkv") else 4)
        assert a.dtype == b.dtype == torch.float32
        update = config.alpha_pattern.get(module, config.lora_alpha) / rank * (b @ a)
        assert update.any()
        merged = before.read(f"{module}.weight").float() + update
        torch.testing.assert_close(merged, after.read(f"{module}.weight"), rtol=0, atol=1e-6)
    adapted = {f"{module}.weight" for module in config.target_modules}
    same = [key for key in before if torch.equal(before.read(key).float(), after.read(key).float())]
    assert set(same) == before.keys() - adapted


def as_named(files: WeightFiles) -> nn.Module:
    """Modules with the names and weights of released files and nothing else, in float32; a matrix is a Linear."""
    root = nn.Module()
    for key in files:
        path, _, name = key.rpartition(".")
        module = root
        for part in path.split("."):
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_buffer(name, files.read(key).float() if files[key].dtype.is_floating_point else files.read(key))
    for path, module in list(root.named_modules()):
        tensors = dict(module.named_buffers(recurse=False))
        if "weight" in tensors and tensors.keys() <= {"weight", "bias"} and tensors["weight"].ndim == 2:
            linear = nn.Linear(tensors["weight"].shape[1], tensors["weight"].shape[0], bias="bias" in tensors)
            linear.load_state_dict(tensors)
            root.set_submodule(path, linear)
    return root


def test_peft_loads_adapters_alone(base, fit, tmp_path, make_batch, as_floats):
    """peft itself puts them on modules of the released names and merges them; transformers computes with the result.

    Its class has other names inside than its files have, so it cannot take the adapters unmerged: that a server whose
    modules have the released names applies them at run time is not shown. Logits are of text and images; adapters of
    the sound tower are compared by their merged weights.
    """
    parts = ["vision", "projector", *(["audio", "audio_projector"] if base.name == "omni" else [])]
    checkpoint = fit(base, lora={**dict.fromkeys(parts, "lora"), "rank": 4, "alpha": 12}, lr=3e-2)
    module = NemotronVLModule.load_from_checkpoint(checkpoint, weights_only=True)
    with torch.no_grad():
        for adapter in adapters_of(module.network):  # no sound was in the rows: those have not moved
            module.network.get_parameter(adapter.b).add_(0.02)
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"] |= {f"model.{name}": value for name, value in module.network.state_dict().items()}
    torch.save(content, checkpoint)
    assert main(["export", str(checkpoint), str(tmp_path / "adapter"), "--adapter"]) == 0

    named = as_named(WeightFiles(base))
    assert named.state_dict().keys() == WeightFiles(base).keys()
    adapted = PeftModel.from_pretrained(named, str(tmp_path / "adapter"))
    told = adapted.load_adapter(str(tmp_path / "adapter"), "again")
    assert not told.unexpected_keys
    assert not [key for key in told.missing_keys if ".again." in key]
    adapted.set_adapter("default")
    merged = adapted.merge_and_unload().state_dict()

    export(checkpoint, tmp_path / "out", dtype=torch.float32)
    ours = WeightFiles(tmp_path / "out")
    assert merged.keys() == ours.keys()
    for key, value in merged.items():
        torch.testing.assert_close(value, ours.read(key), rtol=0, atol=1e-5, check_dtype=False, msg=key)
    for file in (tmp_path / "out").glob("model*.safetensors*"):
        file.unlink()
    write_weights(tmp_path / "out", merged, 1)
    batch = make_batch(MIXED)
    with torch.no_grad():
        expected = module.network.eval()(**batch).logits
        before = open_pretrained(base)[0](**batch).logits
        logits = as_transformers(tmp_path / "out")(**as_floats(batch, module.network)).logits
    assert (expected - before).abs().max() > 0.1
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


def test_adapters_of_a_full_run_are_refused(base, fit, tmp_path, capsys):
    arguments = ["export", str(fit(base)), str(tmp_path / "adapter"), "--adapter"]
    assert main(arguments) == 1
    assert "it was trained without LoRA; export without --adapter." in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--verify"])
    assert ended.value.code == 2


def test_a_layer_scale_that_does_something_is_not_left_out_in_silence(base, fit, tmp_path):
    checkpoint = fit(base)
    content = torch.load(checkpoint, weights_only=True)
    name = "model.vision_model.encoder.layer.1.layer_scale2.lambda1"
    content["state_dict"][name][5] = 0.9
    torch.save(content, checkpoint)
    with pytest.raises(
        DataError, match=r"layer.1.layer_scale2.lambda1 is not 1 everywhere, and the released layout has"
    ):
        export(checkpoint, tmp_path / "out")
    del content["hyper_parameters"]["model_id"]
    torch.save(content, checkpoint)
    with pytest.raises(DataError, match="is not 1 everywhere"):
        export(checkpoint, tmp_path / "out")


def test_counters_of_the_sound_tower_are_written_without_a_base_too(make_model, tmp_path):
    model = make_model(pattern="M*", vocab_size=266, audio_token_id=263)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"config": model.config.to_dict()}}, tmp_path / "a.ckpt")
    export(tmp_path / "a.ckpt", tmp_path / "out")
    counters = [t for key, t in WeightFiles(tmp_path / "out").items() if key.endswith("num_batches_tracked")]
    assert [counter.dtype for counter in counters] == [torch.int64, torch.int64]


def test_a_stack_of_experts_is_merged_once_for_each_file(make_theirs, fit, tmp_path, monkeypatch):
    base = tmp_path / "omni"
    write_omni(base, make_theirs("ME*-", sound=True, moe_intermediate_size=48))
    checkpoint = fit(base, lora={"language": ["experts"], "rank": 2})
    reads: list[str] = []
    read = MergedWeights.__getitem__
    monkeypatch.setattr(MergedWeights, "__getitem__", lambda self, name: reads.append(name) or read(self, name))
    export(checkpoint, tmp_path / "out")
    stacks = [name for name in reads if name.endswith(("experts.up_proj", "experts.down_proj"))]
    assert len(WeightFiles(base).files) == 2
    assert 2 <= len(stacks) <= 4, "two stacks of four experts in two files"
