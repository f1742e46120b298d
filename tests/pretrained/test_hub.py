"""Models of the hub, of a stand-in on this machine: read, cached, refused, and written."""

import builtins
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers.hub import Hub, directory_of, hub, serving
from helpers.networks import SMALLEST, random_model

import fastddpm
from fastddpm import sample
from fastddpm.config import DiffusionConfig
from fastddpm.errors import DataError, UsageError
from fastddpm.pretrained import compact, diffusers, read_preset
from fastddpm.pretrained.model import Model
from fastddpm.runtime import cli, options
from fastddpm.training.initial import preset_of_model
from fastddpm.unet import UNet

__all__ = ["hub"]
NAME = "hub:someone/model"
WEIGHTS = f"unet/{diffusers.WEIGHTS}"


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(SMALLEST, DiffusionConfig(timesteps=5))


@pytest.fixture(scope="module")
def pipeline(model: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("pipeline") / "model"
    model.save_pretrained(path)
    return directory_of(path)


def same(a: UNet, b: UNet) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def offline(monkeypatch: pytest.MonkeyPatch, value: bool = True) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", value)


def test_a_pipeline_is_read_and_cached(
    hub: Hub, model: Model, pipeline: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = {"README.md": b"#", "code.py": b"raise SystemExit", "unet/other.safetensors": b"x" * 99, "a.pt": b"pickle"}
    hub.put("someone/model", pipeline | extra)
    found = fastddpm.load(NAME)
    assert same(found.unet, model.unet) and found.preset == model.preset
    assert sorted(hub.downloaded()) == sorted(set(pipeline) - {"README.md"})
    hub.asked.clear()
    assert same(fastddpm.Model.from_pretrained(NAME).unet, model.unet)
    assert hub.downloaded() == []  # of the cache
    hub.asked.clear()
    offline(monkeypatch)
    assert same(fastddpm.load(NAME).unet, model.unet) and read_preset(NAME) == model.preset
    assert hub.asked == []
    with pytest.raises(
        UsageError, match="hub:someone/other cannot be read: it is not in the cache, and HF_HUB_OFFLINE"
    ):
        fastddpm.load("hub:someone/other")


def test_revisions(hub: Hub, model: Model, pipeline: dict[str, bytes]) -> None:
    other = random_model(SMALLEST, DiffusionConfig(timesteps=7))
    first = hub.put("someone/model", pipeline)
    changed = json.loads(pipeline["fastddpm.json"])
    changed["preset"]["name"] = "second"
    hub.put("someone/model", pipeline | {"fastddpm.json": json.dumps(changed).encode()})
    hub.put("someone/model", pipeline, "some/branch")
    assert fastddpm.load(NAME).preset.name == "second"
    for revision in (first, "some/branch"):
        assert fastddpm.load(f"{NAME}@{revision}").preset == model.preset != other.preset
    with pytest.raises(UsageError, match="the hub has no such revision"):
        fastddpm.load(f"{NAME}@none")


def test_the_configuration_alone_takes_no_weights(hub: Hub, model: Model, pipeline: dict[str, bytes]) -> None:
    hub.put("someone/model", pipeline)
    assert read_preset(NAME) == preset_of_model(NAME) == model.preset
    assert WEIGHTS not in hub.downloaded()


def test_a_packed_file(hub: Hub) -> None:
    hub.put("someone/model", {"digits.safetensors": compact.DIGITS.read_bytes(), "README.md": b""})
    assert same(fastddpm.load(NAME).unet, fastddpm.load("digits").unet)


def test_commands_take_the_name(
    hub: Hub, pipeline: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put("someone/model", pipeline)
    monkeypatch.chdir(tmp_path)
    sample.main([NAME, "--seeds", "0-1", "--device", "cpu"])
    assert (tmp_path / "runs" / "hub-someone-model" / "samples-0-1" / "samples.npz").is_file()
    assert cli.run_of(Path(f"{NAME}@a/b")) == Path("runs/hub-someone-model-a-b")
    with pytest.raises(UsageError, match="no such model"):
        sample.main(["hub:someone/none", "--device", "cpu"])


@pytest.mark.parametrize(
    "name",
    ["hub:", "hub:one", "hub:a/b/c", "hub:../x", "hub:a/b@", "hub:a/b@x@y", "hub:a/b@/x", "hub:a b/c", "hub:é/x"],
)
def test_names_of_another_form(name: str) -> None:
    with pytest.raises(UsageError, match=r"a model of the hub is hub:USER/NAME or hub:USER/NAME@REVISION; got"):
        options.check_checkpoint(Path(name))
    with pytest.raises(UsageError, match="a model of the hub is"):
        fastddpm.load(name)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: None)
    for call in (
        lambda: sample.main([NAME]),
        lambda: fastddpm.load(NAME),
        lambda: fastddpm.load("digits").push_to_hub("a/b"),
    ):
        with pytest.raises(UsageError, match=r"models of the hub need huggingface_hub: pip install 'fastddpm\[hub\]'"):
            call()


def test_only_a_name_downloads(hub: Hub, pipeline: dict[str, bytes], tmp_path: Path) -> None:
    hub.put("someone/model", pipeline)
    for path in ("someone/model", tmp_path / "someone"):
        with pytest.raises(UsageError):
            fastddpm.load(path)
    assert hub.asked == []


def sharded(pipeline: dict[str, bytes], folder: str = "unet/", variant: str = "") -> dict[str, bytes]:
    """The pipeline with its weights in two shards and their index, as diffusers names them."""
    tensors = safetensors.torch.load(pipeline[WEIGHTS])
    if variant:
        tensors = {name: tensor.half() for name, tensor in tensors.items()}
    shards = [f"{diffusers.STEM}-0000{i + 1}-of-00002{variant}.safetensors" for i in range(2)]
    parts = [{name: tensors[name] for name in list(tensors)[i::2]} for i in range(2)]
    places = {name: file for file, part in zip(shards, parts, strict=True) for name in part}
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    files = {folder + file: safetensors.torch.save(part) for file, part in zip(shards, parts, strict=True)}
    files[f"{folder}{diffusers.STEM}.safetensors.index{variant}.json"] = json.dumps(index).encode()
    return {name: data for name, data in pipeline.items() if name != WEIGHTS} | files


@pytest.mark.parametrize("folder", ["unet/", ""])
@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards_and_variants(
    hub: Hub, model: Model, pipeline: dict[str, bytes], variant: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All shards and no other weights are downloaded, once, and read again offline."""
    files = sharded(pipeline, folder, variant)
    other = f"{folder}{diffusers.STEM}.non_ema.safetensors"
    hub.put("someone/model", files | {other: b"x" * 99})
    expected = model.unet.state_dict()
    for _ in range(2):
        found = fastddpm.load(NAME).unet.state_dict()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor.half().float() if variant else tensor), name
        assert sorted(hub.downloaded()) == sorted(set(files) - {"README.md"})
        offline(monkeypatch)


def test_one_file_of_a_variant_and_full_precision_before_it(hub: Hub, model: Model, pipeline: dict[str, bytes]) -> None:
    half = {name: tensor.half() for name, tensor in safetensors.torch.load(pipeline[WEIGHTS]).items()}
    name = f"unet/{diffusers.STEM}.fp16.safetensors"
    files = pipeline | {name: safetensors.torch.save(half)}
    hub.put("someone/both", files)
    assert same(fastddpm.load("hub:someone/both").unet, model.unet) and name not in hub.downloaded()
    del files[WEIGHTS]
    hub.put("someone/model", files)
    found = fastddpm.load(NAME).unet.state_dict()
    assert all(torch.equal(found[name], tensor.half().float()) for name, tensor in model.unet.state_dict().items())
    files[f"unet/{diffusers.STEM}.bf16.safetensors"] = files.pop(name)
    hub.put("someone/model", files)
    refused(hub, r"hub:someone/model holds weights of the variant 'bf16' only; rename unet/.*\.bf16\.safetensors to")


def test_indices_of_shards_that_lie(hub: Hub, pipeline: dict[str, bytes]) -> None:
    """Refused before a shard is downloaded."""
    files = sharded(pipeline)
    index = f"unet/{diffusers.STEM}.safetensors.index.json"
    first, second = sorted(name for name in files if "-of-" in name)
    hub.put("someone/model", {name: data for name, data in files.items() if name != second})
    refused(hub, f"hub:someone/model lacks {second}, which {index} names")
    for places, match in (
        ({"conv_in.weight": "../../etc/passwd.safetensors"}, "1000 .safetensors files beside it; got"),
        ({"conv_in.weight": "https://example.org/x.safetensors"}, "1000 .safetensors files beside it; got"),
        ({"conv_in.weight": 3}, "weight_map must be an object of file names"),
        ({f"x{i}": f"{i}.safetensors" for i in range(1001)}, "must name 1 to 1000"),
    ):
        hub.put("someone/model", files | {index: json.dumps({"weight_map": places}).encode()})
        refused(hub, match)
    hub.put("someone/model", files)
    hub.listed[index] = {"size": 2**22}
    refused(hub, f"{index} has 4,194,304 bytes; at most 2,097,152")
    hub.listed = {first: {"size": 2**40}}
    refused(hub, f"{first} has 1,099,511,627,776 bytes; at most")
    assert not {first, second} & {*hub.downloaded()}


def test_shards_are_bounded_together_and_are_as_long_as_listed(hub: Hub, pipeline: dict[str, bytes]) -> None:
    files = sharded(pipeline)
    first, second = sorted(name for name in files if "-of-" in name)
    most = diffusers.most_bytes(sum(p.numel() for p in fastddpm.UNet(SMALLEST).parameters()))
    hub.put("someone/model", files)
    hub.listed[second] = {"size": most - len(files[first]) + 1}
    refused(hub, f"{second} has .* bytes; at most {most - len(files[first]):,} are read")
    assert second not in hub.downloaded()
    hub.put("other/model", files)
    hub.listed = {first: {"size": len(files[first]) - 8}}
    with pytest.raises((DataError, UsageError), match=f"hub:other/model.*{len(files[first]) - 8:,}"):
        fastddpm.load("hub:other/model")


def test_pickled_weights_of_a_pipeline(hub: Hub, pipeline: dict[str, bytes]) -> None:
    files = {name: data for name, data in pipeline.items() if name != WEIGHTS}
    hub.put("someone/model", files | {f"unet/{diffusers.STEM}.bin": b"x"})
    refused(hub, r"holds no .safetensors of its weights; unet/.*\.bin is a pickle, which can run code, and is not read")


def refused(hub: Hub, match: str, kind: type[Exception] = DataError) -> None:
    with pytest.raises(kind, match=match):
        fastddpm.load(NAME)


def test_sizes_are_checked_before_a_file_is_taken(hub: Hub, pipeline: dict[str, bytes]) -> None:
    hub.put("someone/model", pipeline)
    hub.listed[WEIGHTS] = {"size": 2**40}
    refused(hub, f"{WEIGHTS} has 1,099,511,627,776 bytes; at most 1,0")
    assert WEIGHTS not in hub.downloaded()
    hub.listed = {"unet/config.json": {"size": 2**22}}
    refused(hub, "unet/config.json has 4,194,304 bytes; at most 2,097,152")
    hub.put("someone/model", {"x.safetensors": b"x"})
    hub.listed = {"x.safetensors": {"size": 2**33}}
    refused(hub, "x.safetensors has 8,589,934,592 bytes")


@pytest.mark.parametrize("name", [WEIGHTS, "unet/config.json"])
def test_hashes_are_checked(
    hub: Hub, pipeline: dict[str, bytes], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what is sent, and of what lies in the cache, also offline."""
    data = bytearray(pipeline[name])
    data[-2] ^= 1
    hub.put("someone/model", pipeline)
    hub.sent[name] = bytes(data)
    refused(hub, "is damaged: its hash is not the one that the hub tells; remove ")
    hub.sent.clear()
    hub.put("other/model", pipeline)
    assert fastddpm.load("hub:other/model")
    (path,) = (tmp_path / "cache").glob(f"models--other--model/snapshots/*/{name}")
    path.resolve().write_bytes(bytes(data))
    for value in (False, True):
        offline(monkeypatch, value)
        with pytest.raises(DataError, match="is damaged: its hash is not the one"):
            fastddpm.load("hub:other/model")


def test_a_model_that_changes_meanwhile(hub: Hub, pipeline: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    hub.put("someone/model", pipeline)
    download = huggingface_hub.hf_hub_download

    def changing(name: str, file: str, **more: Any) -> str:
        if file == "fastddpm.json":
            hub.put("someone/model", pipeline | {"new": b""})
        return download(name, file, **more)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", changing)
    refused(hub, "was changed while it was downloaded; start again")


def test_what_is_no_model(hub: Hub, pipeline: dict[str, bytes]) -> None:
    hub.put("someone/model", {"README.md": b""})
    refused(hub, "holds neither a diffusers pipeline nor one packed .safetensors file$")
    hub.put("someone/model", {"pytorch_model.bin": b"x"})
    refused(hub, "pytorch_model.bin is a pickle, which can run code, and is not read")
    hub.put("someone/model", {"a.safetensors": b"x", "b.safetensors": b"x"})
    refused(hub, "holds neither")
    hub.put("someone/model", {"a.safetensors": b"x" * 20})
    refused(hub, "safetensors header")
    hub.put("someone/model", {name: data for name, data in pipeline.items() if name != WEIGHTS})
    refused(hub, f"lacks {WEIGHTS}")


def test_nothing_that_a_file_names_is_imported(
    hub: Hub, pipeline: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads(pipeline["unet/config.json"]) | {"_class_name": "evil_module.Evil", "auto_map": "evil_module"}
    index = json.loads(pipeline["model_index.json"]) | {"unet": ["evil_module", "Evil"]}
    changed = {"unet/config.json": json.dumps(config).encode(), "model_index.json": json.dumps(index).encode()}
    hub.put("someone/model", pipeline | changed | {"evil_module.py": b"raise SystemExit"})
    load = builtins.__import__

    def watched(name: str, *more: Any, **options: Any) -> Any:
        assert "evil" not in name
        return load(name, *more, **options)

    monkeypatch.setattr(builtins, "__import__", watched)
    refused(hub, "model_index.json: unet must be UNet2DModel")
    assert "evil_module.py" not in hub.downloaded() and "evil_module" not in sys.modules


def test_a_hub_that_does_not_answer(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UsageError, match="hub:someone/model cannot be read: "):
        fastddpm.load(NAME)


def test_push_and_back(hub: Hub, model: Model, tmp_path: Path) -> None:
    address = model.push_to_hub("someone/new", private=True, message="first")
    assert address == f"{hub.address}/someone/new/commit/{hub.branches['someone/new']['main']}"
    assert hub.private == {"someone/new": True}
    model.save_pretrained(tmp_path / "saved")
    assert hub.files("someone/new") == directory_of(tmp_path / "saved")
    assert same(fastddpm.load("hub:someone/new").unet, model.unet)
    model.push_to_hub("someone/new", revision="other")
    assert hub.files("someone/new", "other") == hub.files("someone/new")
    with pytest.raises(UsageError, match=r"name the branch to write with revision=; got 'someone/new@other'"):
        model.push_to_hub("someone/new@other")
    with pytest.raises(UsageError, match="a model of the hub is hub:USER/NAME"):
        model.push_to_hub("new")


def test_the_license_of_the_card(hub: Hub, model: Model, tmp_path: Path) -> None:
    """Nothing is stated unless it is given, and only of the form that the hub takes."""
    model.push_to_hub("someone/new", license="cc-by-sa-4.0")
    card = hub.files("someone/new")["README.md"].decode()
    assert 'license: "cc-by-sa-4.0"\n' in card.split("---")[1] and "Before you publish" not in card
    model.save_pretrained(tmp_path / "none")
    card = (tmp_path / "none" / "README.md").read_text()
    assert "license:" not in card.split("---")[1] and "Before you publish this, state a license" in card
    for name in ("", "Apache 2.0", "mit\nx: 1", "\u0660", 3):
        for call in (model.save_pretrained, model.push_to_hub):
            with pytest.raises(UsageError, match="license must be an identifier of the Hugging Face hub, as apache-2"):
                call(str(tmp_path / "x") if call == model.save_pretrained else "someone/x", license=name)
    assert not (tmp_path / "x").exists() and "someone/x" not in hub.branches


def test_push_without_a_login(hub: Hub, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UsageError, match="hub:someone/new cannot be written: "):
        model.push_to_hub("someone/new")
    assert hub.branches == {}


def test_a_model_made_in_python(hub: Hub, tmp_path: Path) -> None:
    made = random_model(SMALLEST)
    model = fastddpm.Model(made.unet, made.diffusion)
    assert model.preset.unet == SMALLEST and model.preset.diffusion == made.diffusion.config
    model.save_pretrained(tmp_path / "own")
    card = (tmp_path / "own" / "README.md").read_text()
    assert "Adam" not in card and "U-Net" in card  # how it was trained is not known
    assert same(fastddpm.load(tmp_path / "own").unet, made.unet)
    model.push_to_hub("someone/own")
    assert same(fastddpm.load("hub:someone/own").unet, made.unet)
    learned = UNet(fastddpm.config.UNetConfig(**vars(SMALLEST) | {"learned_variance": True}))
    with pytest.raises(UsageError, match="learned_variance"):
        fastddpm.Model(learned, made.diffusion)


@pytest.mark.slow
def test_the_variables_of_the_client(pipeline: dict[str, bytes], tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE, in processes of their own."""
    hub = Hub()
    hub.put("someone/model", pipeline)
    command = [sys.executable, "-m", "fastddpm.sample", NAME, "--seeds", "0", "--device", "cpu", "--out"]
    with serving(hub) as address:
        variables = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}
        variables.pop("HF_HUB_CACHE", None)
        for number, more in enumerate(({}, {"HF_HUB_OFFLINE": "1"})):
            hub.asked.clear()
            done = subprocess.run(
                [*command, str(tmp_path / f"out{number}")], env=variables | more, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            assert bool(hub.asked) == (number == 0)
        variables |= {"HF_HOME": str(tmp_path / "empty"), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run([*command, str(tmp_path / "out")], env=variables, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: hub:someone/model cannot be read")
