"""What of a diffusers directory is refused, and what is never written."""

import errno
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from helpers.networks import SMALL, TINY, random_model

from fastddpm.config import DiffusionConfig
from fastddpm.errors import DataError, FastddpmError, StorageError, UsageError
from fastddpm.pretrained import diffusers as pipelines


def test_a_place_that_cannot_be_written_is_an_error_of_storage(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(StorageError, match=r"cannot write .*below"):
        pipelines.save(random_model(SMALL), tmp_path / "file" / "below")
    with pytest.raises(UsageError, match="exists and is not empty"):
        pipelines.save(random_model(SMALL), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept" and len(list(tmp_path.iterdir())) == 1


def test_only_a_pipeline_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    for foreign in (tmp_path / "file", tmp_path / "home" / "letter"):
        foreign.write_text("kept")
    for target in (tmp_path / "file", tmp_path / "home"):
        with pytest.raises(UsageError, match="is not a diffusers pipeline, and nothing else is overwritten"):
            pipelines.save(random_model(SMALL), target, overwrite=True)
    assert (tmp_path / "file").read_text() == (tmp_path / "home" / "letter").read_text() == "kept"


def test_a_pipeline_is_replaced_whole_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, first, second = tmp_path / "pipe", random_model(SMALL), random_model(TINY)
    pipelines.save(first, target)
    (target / "notes.txt").write_text("of the first")
    rename = os.rename

    def failing(source: Path, name: Path) -> None:
        if Path(name) == target and not Path(source).name.endswith(".old"):
            raise OSError(errno.EIO, "failing disk")
        rename(source, name)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(StorageError, match="failing disk"):
        pipelines.save(second, target, overwrite=True)
    assert pipelines.load(target).unet.config == SMALL and (target / "notes.txt").exists()
    monkeypatch.setattr(os, "rename", rename)
    pipelines.save(second, target, overwrite=True)
    assert pipelines.load(target).unet.config == TINY and not (target / "notes.txt").exists()
    assert list(tmp_path.iterdir()) == [target]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipe") / "pipe"
    pipelines.save(random_model(SMALL), path)
    return path


def altered(saved: Path, target: Path, file: str, **changes: Any) -> Path:
    """A copy of a pipeline with fields of one JSON file changed, or left out where the change is `...`."""
    for source in saved.rglob("*"):
        if source.is_file() and source.name != pipelines.OUR_FILE:
            copy = target / source.relative_to(saved)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(source.read_bytes())
    data = json.loads((target / file).read_text()) | changes
    (target / file).write_text(json.dumps({name: value for name, value in data.items() if value is not ...}))
    return target


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attention_head_dim", 24), ("attention_head_dim", 0), ("norm_eps", "small"), ("freq_shift", 2),
        ("downsample_padding", 2), ("center_input_sample", True), ("time_embedding_type", "fourier"),
        ("time_embedding_type", "learned"), ("time_embedding_dim", 64), ("act_fn", "gelu"),
        ("mid_block_scale_factor", 0.7), ("mid_block_type", None), ("resnet_time_scale_shift", "spatial"),
        ("resnet_time_scale_shift", "scale_shift"), ("add_attention", 1), ("attn_norm_num_groups", 4),
        ("class_embed_type", "timestep"), ("class_embed_type", "identity"), ("downsample_type", "kernel"),
        ("down_block_types", ["ResnetDownsampleBlock2D", "AttnDownBlock2D"]), ("sample_size", None),
        ("sample_size", [8, 17]), ("sample_size", [8, 8, 8]), ("out_channels", 4), ("block_out_channels", [32, 40]),
        ("block_out_channels", []), ("down_block_types", ["DownBlock2D", "CrossAttnDownBlock2D"]),
        ("up_block_types", ["UpBlock2D", "UpBlock2D"]), ("up_block_types", None), ("num_class_embeds", "many"),
        ("layers_per_block", 10**6), ("block_out_channels", [10**9, 10**9]), ("norm_num_groups", 5),
        ("layers_per_block", 1.5), ("dropout", 2.0), ("dropout", "none"), ("_class_name", "UNet2DConditionModel"),
    ],
)  # fmt: skip
def test_networks_that_are_not_ours_are_refused(saved: Path, tmp_path: Path, field: str, value: Any) -> None:
    path = altered(saved, tmp_path / "x", "unet/config.json", **{field: value})
    ours = {
        "layers_per_block": "blocks", "block_out_channels": "width|block_out|groups", "norm_num_groups": "groups",
        "sample_size": "sample_size|image_size", "num_class_embeds": "num_classes",
        "down_block_types": "down_block_types|resample alike",
        "resnet_time_scale_shift": "resnet_time_scale_shift|attn_norm_num_groups",
    }  # fmt: skip
    with pytest.raises(DataError, match=ours.get(field, field)):
        pipelines.load(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beta_schedule", "sigmoid"), ("variance_type", "learned"), ("variance_type", "learned_range"),
        ("prediction_type", "flow"), ("clip_sample_range", 2.0), ("trained_betas", [0.1]), ("clip_sample", "yes"),
        ("rescale_betas_zero_snr", True), ("num_train_timesteps", 1), ("num_train_timesteps", 10**9), ("beta_end", 2.0),
        ("timestep_spacing", "random"), ("steps_offset", -1), ("_class_name", "ScoreSdeVeScheduler"),
        ("_class_name", ["DDPMScheduler"]),
    ],
)  # fmt: skip
def test_processes_that_are_not_ours_are_refused(saved: Path, tmp_path: Path, field: str, value: Any) -> None:
    path = altered(saved, tmp_path / "x", "scheduler/scheduler_config.json", **{field: value})
    ours = {
        "num_train_timesteps": "timesteps", "_class_name": "the scheduler must be one of",
        "rescale_betas_zero_snr": "leaves no signal",  # the paper's prediction is eps
    }  # fmt: skip
    with pytest.raises(DataError, match=ours.get(field, field)):
        pipelines.load(path)


def test_unknown_fields_warn(saved: Path, tmp_path: Path) -> None:
    path = altered(saved, tmp_path / "x", "unet/config.json", novelty=1)
    with pytest.warns(UserWarning, match="novelty"):
        pipelines.load(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipelines.load(saved)


def test_nothing_named_in_a_file_is_imported(saved: Path, tmp_path: Path) -> None:
    for changes in ({"unet": ["os", "system"]}, {"_class_name": "os.system"}, {"scheduler": ["../evil", "Evil"]}):
        with pytest.raises(DataError, match=r"model_index\.json"):
            pipelines.load(altered(saved, tmp_path / str(len(str(changes))), "model_index.json", **changes))


def test_damaged_files_are_refused(saved: Path, tmp_path: Path) -> None:
    deep = altered(saved, tmp_path / "deep", "unet/config.json")
    (deep / "unet/config.json").write_text("[" * 10_000 + "]" * 10_000)
    with pytest.raises(DataError, match="nested"):
        pipelines.load(deep)
    pickled = altered(saved, tmp_path / "pickle", "unet/config.json")
    os.rename(pickled / "unet" / pipelines.WEIGHTS, pickled / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(DataError, match="pickle"):
        pipelines.load(pickled)
    missing = altered(saved, tmp_path / "missing", "unet/config.json")
    tensors = safetensors.torch.load_file(missing / "unet" / pipelines.WEIGHTS)
    tensors["conv_in.bias"] = tensors["conv_in.bias"][:3].clone()
    tensors["stranger"] = tensors.pop("conv_out.weight")
    safetensors.torch.save_file(tensors, missing / "unet" / pipelines.WEIGHTS)
    with pytest.raises(DataError, match=r"conv_out\.weight is missing; stranger belongs to no layer; conv_in\.bias is"):
        pipelines.load(missing)
    with pytest.raises(UsageError, match="no diffusers directory"):
        pipelines.load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="lacks unet/config"):
        pipelines.load(tmp_path)


def test_our_file_must_agree(saved: Path, tmp_path: Path) -> None:
    path = altered(saved, tmp_path / "x", "scheduler/scheduler_config.json", beta_end=0.03)
    (path / pipelines.OUR_FILE).write_bytes((saved / pipelines.OUR_FILE).read_bytes())
    with pytest.raises(DataError, match="beta_end"):
        pipelines.load(path)


@pytest.mark.parametrize(
    ("diffusion", "message"),
    [
        (DiffusionConfig(prediction="xprev"), "prediction xprev"),
        (DiffusionConfig(schedule="jsd"), "schedule jsd"),
        (DiffusionConfig(schedule="const"), "schedule const"),
    ],
)
def test_what_diffusers_cannot_express_is_not_written(diffusion: DiffusionConfig, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        pipelines.save(random_model(SMALL, diffusion), tmp_path / "pipe")
    assert not (tmp_path / "pipe").exists()


def test_an_existing_directory_is_kept(saved: Path) -> None:
    before = sorted(saved.rglob("*"))
    with pytest.raises(FastddpmError, match="not empty"):
        pipelines.save(random_model(SMALL), saved)
    assert sorted(saved.rglob("*")) == before
    assert not [path for path in saved.parent.iterdir() if path != saved]
