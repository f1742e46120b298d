"""environment.json: what a run was started with, and no secret."""

import json
from pathlib import Path

import pytest
import torch

import fastddpm
from fastddpm.errors import StorageError
from fastddpm.runtime.distributed import ProcessGroup
from fastddpm.training.environment import changes, record_session, without_secrets

CPU = torch.device("cpu")
DATA = {"name": "digits", "checksum": "ab" * 32, "source": None}
PLANTED = "planted-0123456789"


def sessions(run: Path) -> list[dict[str, object]]:
    return json.loads((run / "environment.json").read_text())["sessions"]


def test_each_start_is_added(tmp_path: Path) -> None:
    record_session(tmp_path, ["python", "-m", "x", "--batch", "8"], CPU, DATA)
    record_session(
        tmp_path,
        ["python", "-m", "x", "--resume"],
        CPU,
        DATA,
        step=40,
        changed=["lr: 1 -> 2"],
        group=ProcessGroup(0, 2),
    )
    first, second = sessions(tmp_path)
    assert first["command"] == ["python", "-m", "x", "--batch", "8"] and first["step"] == 0
    assert second["command"] == ["python", "-m", "x", "--resume"]
    assert first["changed"] == [] and changes(tmp_path) == [(40, "lr: 1 -> 2")]
    assert second["step"] == 40 and second["processes"] == 2 and second["data"] == DATA
    assert first["fastddpm"] == fastddpm.__version__
    assert first["libraries"]["torch"] == torch.__version__.partition("+")[0] or "+" in torch.__version__
    assert first["threads"] == torch.get_num_threads() and first["operations"].keys() >= {"q_sample", "attention"}
    assert first["source_sha256"] == second["source_sha256"] and len(first["source_sha256"]) == 64
    assert [path.name for path in tmp_path.iterdir()] == ["environment.json"]


def test_damaged_sessions_tell_of_no_changes(tmp_path: Path) -> None:
    good = {"step": 7, "changed": ["lr: 1 -> " + "2" * 1000]}
    bad = [
        5,
        {},
        {"changed": ["x"]},
        {"step": "7", "changed": ["x"]},
        {"step": 7, "changed": [1]},
        {"step": 7, "changed": 3},
    ]
    (tmp_path / "environment.json").write_text(json.dumps({"sessions": [*bad, good]}))
    assert changes(tmp_path) == [(7, ("lr: 1 -> " + "2" * 1000)[:200])]


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD"])
def test_no_variable_of_the_environment_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, PLANTED)
    monkeypatch.setenv("HARMLESS_VARIABLE", "harmless-value-of-it")
    record_session(tmp_path, ["--wandb", PLANTED, f"--data=/data/{PLANTED}/x.zip"], CPU, DATA)
    text = (tmp_path / "environment.json").read_text()
    assert PLANTED not in text and "harmless-value-of-it" not in text
    assert sessions(tmp_path)[0]["command"] == ["--wandb", "***", "--data=/data/***/x.zip"]


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (["--api-key", "abc", "--steps", "4"], ["--api-key", "***", "--steps", "4"]),
        (["--hub-token=abc", "x"], ["--hub-token=***", "x"]),
        (["--use-token", "--steps", "4"], ["--use-token", "--steps", "4"]),
        (["https://me:word@host/x"], ["https://***@host/x"]),
        (["--data", "hf_" + "Ab1" * 10], ["--data", "***"]),
        (["0123456789" * 4], ["***"]),
        (["--preset", "mnist", "--out", "runs/mnist"], ["--preset", "mnist", "--out", "runs/mnist"]),
    ],
)
def test_what_looks_like_a_secret_is_hidden(command: list[str], shown: list[str]) -> None:
    assert without_secrets(command, {"HF_TOKEN": "", "KEY": "runs"}) == shown


@pytest.mark.parametrize("text", ["", "{", "[]", '{"sessions": 3}', '{"sess'])
def test_a_damaged_file_keeps_no_run_from_going_on(tmp_path: Path, text: str) -> None:
    (tmp_path / "environment.json").write_text(text)
    record_session(tmp_path, ["a"], CPU, DATA)
    assert len(sessions(tmp_path)) == 1


def test_a_directory_that_is_gone_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot write"):
        record_session(tmp_path / "gone", ["a"], CPU, DATA)
