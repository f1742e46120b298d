"""What the CPU benchmarks share: refusing without the library, the file they write, peak memory."""

import json
import os
import sys
from pathlib import Path

import pytest
from helpers.scripts import load_script

machine = load_script("benchmarks/machine.py", "benchmark_machine")


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.native, "unavailable", lambda: "no compiled library: none was built")


@pytest.mark.usefixtures("no_library")
def test_without_the_library_they_exit_with_2_and_say_why(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        machine.parse(machine.parser("A benchmark."), [])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "no compiled library: none was built\n"


def test_what_is_measured_is_written_with_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine.native, "unavailable", lambda: None)
    monkeypatch.setattr(machine.native, "isa", lambda: "avx2")
    out = tmp_path / "table.json"
    options = machine.parse(machine.parser(None), ["--batch", "2", "3", "--rounds", "4", "--out", str(out)])
    assert options.batch == [2, 3]
    machine.write(options, {"peer": "1.2"}, rows=[{"peak_mib": None}])
    document = json.loads(out.read_text())
    assert document["rounds"] == 4 and document["rows"] == [{"peak_mib": None}]
    assert document["machine"]["peer"] == "1.2" and document["machine"]["instruction_set"] == "avx2"


@pytest.mark.parametrize(
    ("status", "mib"), [("VmPeak:\t 9 kB\nVmHWM:\t  3584 kB\nVmRSS:\t 8 kB\n", 3.5), ("State: R\n", None), (None, None)]
)
def test_peak_memory_is_unknown_where_the_system_does_not_tell(
    status: str | None, mib: float | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "status"
    if status is not None:
        path.write_text(status)
    monkeypatch.setattr(machine, "STATUS", path)
    assert machine.peak_resident_set() == mib


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc")
def test_peak_memory_is_as_large_as_what_is_held() -> None:
    held = bytearray(b"1") * (64 << 20)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    resident = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    assert len(held) / 2**20 < resident <= machine.peak_resident_set()
