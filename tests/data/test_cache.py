"""The cache of decoded images: whole or made again, whoever else writes, whatever the disk does."""

import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers.announcements import without_announcements
from helpers.image_folder import PIXELS, PLANES, Load, check, load, png, source, without_classes
from PIL import Image

from fastddpm.data import Dataset, cache, ingest
from fastddpm.data.dataset import checksum
from fastddpm.errors import UsageError
from fastddpm.storage.files import temporary_beside

__all__ = ["load", "source"]
ROOT = Path(__file__).parents[2]


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").iterdir())


def test_images_are_decoded_once_and_then_mapped(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(load())
    (entry,) = entries(tmp_path)
    assert sorted(path.name for path in entry.iterdir()) == ["images.npy", "labels.npy", "meta.json"]
    np.testing.assert_array_equal(np.load(entry / "images.npy"), PLANES)
    rule = {"image_size": 8, "channels": 3, "resize": "none", "background": None}
    assert json.loads((entry / "meta.json").read_text())["rule"] == rule
    monkeypatch.setattr(ingest, "open_picture", lambda *_: pytest.fail("decoded again"))
    again = load()
    check(again)
    assert isinstance(again.images, np.memmap) and not again.images.flags.writeable


def test_whatever_changes_the_images_changes_the_entry(load: Load, source: Path, tmp_path: Path) -> None:
    load()
    load(resize="area")
    load(resize="area", image_size=4)
    load(skip_bad=True)
    assert len(entries(tmp_path)) == 4
    os.utime(source / "0" / "00.png", ns=(1, 1))
    load()
    assert len(entries(tmp_path)) == 5
    (source / "0" / "00.png").rename(source / "0" / "000.png")
    load()
    assert len(entries(tmp_path)) == 6
    (source / "2" / "29.png").unlink()
    assert len(load().images) == 29
    assert len(entries(tmp_path)) == 7


def test_another_folder_of_the_same_names_sizes_and_times_is_another_source(tmp_path: Path, load: Load) -> None:
    for name, value in (("one", 1), ("two", 2)):
        path = tmp_path / name / "x.bmp"
        path.parent.mkdir()
        path.write_bytes(png(np.full((8, 8, 3), value, np.uint8), "BMP"))
        os.utime(path, ns=(1, 1))
    assert (load(source=tmp_path / "one").images == 1).all()
    assert (load(source=tmp_path / "two").images == 2).all()


def test_a_relative_path_is_the_same_source(
    load: Load, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load()
    monkeypatch.chdir(source.parent)
    check(load(source="images"))
    assert len(entries(tmp_path)) == 1


@pytest.mark.skipif(os.name == "nt", reason="nothing is swept on Windows")
def test_what_dead_processes_left_is_removed(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    directory = tmp_path / "cache"
    host = temporary_beside(Path("x")).name.split(".")[-3]
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = {
        "dead": f".entry-0a.{host}.{dead.pid}.tmp", "locked": f".entry-0b.{host}.{dead.pid}.tmp",
        "alive": f".entry-0c.{host}.{os.getppid()}.tmp", "elsewhere": f".entry-0d.other.{dead.pid}.tmp",
        "of another's": f".entry-{dead.pid}.tmp", "older": ".tmp-abcdef",
    }  # fmt: skip
    for name in names.values():
        (directory / name).mkdir(parents=True)
        (directory / name / "images.npy").write_bytes(b"x")
    (tmp_path / "outside").mkdir()
    (directory / f".entry-0e.{host}.{dead.pid}.tmp").symlink_to(tmp_path / "outside")
    descriptor = os.open(directory / names["locked"], os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        check(load())
    finally:
        os.close(descriptor)
    assert sorted(key for key, name in names.items() if not (directory / name).exists()) == ["dead"]
    assert (tmp_path / "outside").is_dir()
    check(load())
    assert sorted(key for key, name in names.items() if not (directory / name).exists()) == ["dead", "locked"]


def test_a_process_killed_while_it_decodes_leaves_what_is_swept(source: Path, tmp_path: Path, load: Load) -> None:
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from fastddpm.data import cache, open_dataset\n"
        "cache.checksum = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "open_dataset(sys.argv[1], image_size=8, channels=3, cache=Path(sys.argv[2]))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program, str(source), str(tmp_path / "cache")], env=environment)
    assert done.returncode == -9
    (left,) = entries(tmp_path)
    assert left.name.startswith(".entry-") and (left / "images.npy").exists()
    check(load())
    (entry,) = entries(tmp_path)
    assert not entry.name.startswith(".")


@pytest.mark.parametrize("name", ["meta.json", "images.npy", "labels.npy"])
def test_a_pipe_in_the_cache_is_not_opened(name: str, load: Load, tmp_path: Path) -> None:
    load()
    (entry,) = entries(tmp_path)
    (entry / name).unlink()
    os.mkfifo(entry / name)
    lines: list[str] = []
    check(load(report=lines.append))
    assert len(without_classes(lines)) == 1 and "not a regular file" in lines[0]


def test_class_names_are_kept_and_verified(load: Load, source: Path, tmp_path: Path) -> None:
    assert load().classes == ("0", "1", "2")
    (entry,) = entries(tmp_path)
    meta = json.loads((entry / "meta.json").read_text())
    assert meta["classes"] == ["0", "1", "2"]
    changed = meta | {"classes": ["0", "2", "1"]}
    sealed = changed | {"meta": cache._meta_checksum(changed)}
    for document, problem in ((changed, "meta.json is not as it was written"), (sealed, "its class names differ")):
        (entry / "meta.json").write_text(json.dumps(document))
        lines: list[str] = []
        assert load(report=lines.append).classes == ("0", "1", "2")
        assert problem in lines[0] and lines[1] == "3 classes: 0, 1, 2"
    assert load(keep="encoded").classes == ("0", "1", "2")


def test_dark_16_bit_images_are_noted_every_time(tmp_path: Path, load: Load) -> None:
    folder = tmp_path / "scans"
    folder.mkdir()
    for i, largest in enumerate((3000, 4095)):
        values = np.zeros((8, 8), np.uint16)
        values[i, i] = largest
        (folder / f"{i}.png").write_bytes(png(Image.fromarray(values)))
    for options in ({}, {}, {"cache": folder / "0.png" / "nowhere"}):
        lines: list[str] = []
        load(source=folder, channels=1, report=lines.append, **options)
        assert [line for line in lines if "12-bit" in line] == [
            f"{folder}: 2 images have 16 bits, but their largest value is 4,095 of 65,535, so they will be dark. If "
            "they hold 12-bit data, multiply their values by 16 first"
        ]


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(UsageError, match="set XDG_CACHE_HOME"):
        cache.default_directory()


def test_the_default_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_directory() == tmp_path / "fastddpm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.default_directory() == tmp_path / "home" / ".cache" / "fastddpm"


def damaged(path: Path, how: str, rng: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    elif how == "cut":
        del data[rng.integers(len(data)) :]
    path.write_bytes(data)
    if how == "delete":
        path.unlink()


@pytest.mark.slow
def test_damaged_entries_are_never_used(load: Load, tmp_path: Path, rng: np.random.Generator) -> None:
    load()
    (entry,) = entries(tmp_path)
    whole = {name: (entry / name).read_bytes() for name in ("images.npy", "labels.npy", "meta.json")}
    noticed = 0
    cases = [(name, how) for name in whole for how in ("delete", *["flip"] * 40, *["cut"] * 20)]
    for name, how in cases:
        damaged(entry / name, how, rng)
        lines: list[str] = []
        check(load(report=lines.append))
        lines = without_classes(lines)
        if lines:
            assert len(without_classes(lines)) == 1 and lines[0].startswith(f"cache entry {entry} is damaged ("), lines
            noticed += 1
            assert {path.name: path.read_bytes() for path in entry.iterdir()} == whole, "it was not made again"
        for path, data in whole.items():
            (entry / path).write_bytes(data)
    # What is not noticed is in the spaces of meta.json, which nothing depends on, or in padding.
    assert noticed > len(cases) / 2
    assert entries(tmp_path) == [entry]


def test_a_foreign_array_in_the_cache_is_refused(load: Load, tmp_path: Path) -> None:
    """Arrays of objects would be pickles; the same bytes under another type have the same checksum."""
    load()
    (entry,) = entries(tmp_path)
    for array in (np.array([{"x": 1}], dtype=object), PLANES.view(np.int8), PLANES[:, :1], PLANES[:0]):
        np.save(entry / "images.npy", array, allow_pickle=True)
        lines: list[str] = []
        check(load(report=lines.append))
        lines = without_classes(lines)
        assert len(lines) == 1 and "damaged" in lines[0]
    np.save(entry / "labels.npy", (np.arange(30) // 10).view(np.uint64))
    check(load(report=lines.append))
    assert len(lines) == 3 and "uint64" in lines[1]


def test_a_large_entry_is_verified_by_a_sample(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load().checksum
    monkeypatch.setattr(cache, "_VERIFY_ALL_BYTES", 0)
    (entry,) = entries(tmp_path)
    assert load().checksum == whole
    with (entry / "images.npy").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(bytes([PIXELS[29, 7, 7, 2] ^ 1]))
    lines: list[str] = []
    check(load(report=lines.append))
    assert len(without_classes(lines)) == 1 and "its checksum differs" in lines[0]


def test_without_a_writable_cache_images_are_decoded_in_memory(load: Load, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for _ in range(2):
        lines: list[str] = []
        check(load(cache=tmp_path / "file" / "below", report=lines.append))
        assert len(without_classes(lines)) == 1 and lines[0].startswith(
            f"cache {tmp_path / 'file' / 'below'} cannot be written ("
        )
        assert "Not a directory" in lines[0]


PROGRAM = """
import resource, sys
from pathlib import Path
from fastddpm.data import open_dataset
if sys.argv[3] != "-1":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
dataset = open_dataset(sys.argv[1], image_size=8, channels=3, cache=Path(sys.argv[2]))
print(dataset.checksum)
"""


def started(source: Path, directory: Path, file_limit: int = -1) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(source), str(directory), str(file_limit)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_full_disk_while_decoding(source: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for it: writing beyond it is an OSError, too."""
    output, errors = started(source, tmp_path / "cache", 3000).communicate()
    assert output.strip() == checksum(PLANES, np.arange(30) // 10)
    assert "File too large" in errors and "decoding in memory" in errors and "Traceback" not in errors
    assert entries(tmp_path) == []


def test_concurrent_writers_make_one_entry(source: Path, tmp_path: Path) -> None:
    writers = [started(source, tmp_path / "cache") for _ in range(4)]
    results = [writer.communicate() for writer in writers]
    assert [output.strip() for output, _ in results] == [checksum(PLANES, np.arange(30) // 10)] * 4, results
    assert [without_announcements(errors) for _, errors in results] == [["3 classes: 0, 1, 2"]] * 4
    assert len(entries(tmp_path)) == 1


def test_an_entry_that_appears_meanwhile_does_no_harm(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process finishes while this one decodes: both have whole images, and one entry is left."""
    decode_all, others = cache.decode_all, []

    def overtaken(*arguments: object, **options: object) -> object:
        monkeypatch.setattr(cache, "decode_all", decode_all)
        others.append(load())
        return decode_all(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(cache, "decode_all", overtaken)
    check(load())
    check(others[0])
    assert len(entries(tmp_path)) == 1


@pytest.mark.slow
def test_writers_that_finish_together_share_one_entry(load: Load, tmp_path: Path) -> None:
    """None falls back to memory, for no other process takes away what it has written, and no copies stay behind."""
    together = threading.Barrier(4)
    lines: list[str] = []

    def one(directory: Path) -> Dataset:
        together.wait()
        return load(cache=directory, report=lines.append)

    with ThreadPoolExecutor(4) as pool:
        for attempt in range(30):
            directory = tmp_path / f"cache {attempt}"
            for dataset in pool.map(one, [directory] * 4):
                check(dataset)
                assert isinstance(dataset.images, np.memmap)
            assert len(list(directory.iterdir())) == 1
    assert lines == ["3 classes: 0, 1, 2"] * 120


def test_a_damaged_entry_that_another_process_replaces(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load()
    (entry,) = entries(tmp_path)
    (entry / "images.npy").unlink()
    replace = cache._replace

    def overtaken(*arguments: Path) -> None:
        monkeypatch.setattr(cache, "_replace", replace)
        entry.rename(tmp_path / "moved aside by another")
        replace(*arguments)

    monkeypatch.setattr(cache, "_replace", overtaken)
    lines: list[str] = []
    dataset = load(report=lines.append)
    check(dataset)
    assert isinstance(dataset.images, np.memmap)
    assert len(without_classes(lines)) == 1 and "damaged" in lines[0]
    assert not [path for path in entries(tmp_path) if path != entry]
    check(load(report=lines.append))


def test_a_file_in_the_place_of_an_entry_is_replaced(load: Load, tmp_path: Path) -> None:
    load()
    (entry,) = entries(tmp_path)
    shutil.rmtree(entry)
    entry.write_bytes(b"not a directory")
    lines: list[str] = []
    check(load(report=lines.append))
    assert len(without_classes(lines)) == 1 and "damaged" in lines[0]
    check(load(report=lines.append))
    assert len(without_classes(lines)) == 1 and entries(tmp_path) == [entry]


@pytest.mark.parametrize("count", [1, 16, 127, 128, 129, 300])
def test_order_is_kept_across_threads_and_chunks(count: int, tmp_path: Path, load: Load) -> None:
    root = tmp_path / "many"
    root.mkdir()
    colours = np.random.default_rng(count).integers(0, 256, (count, 3), dtype=np.uint8)
    for i, colour in enumerate(colours):
        (root / f"{i:04}.png").write_bytes(png(np.broadcast_to(colour, (8, 8, 3)).copy()))
    dataset = load(source=root)
    assert dataset.labels is None and len(dataset.images) == count
    np.testing.assert_array_equal(dataset.images[:, :, 3, 5], colours)
