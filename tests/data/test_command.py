"""python -m fastddpm.data: what it finds, what it writes, its exit codes, its memory."""

import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers.bad_images import huge_header, listed, spoil
from helpers.image_folder import PLANES, png, source
from helpers.packs import collection_of, encoded
from PIL import Image

from fastddpm import train
from fastddpm.data import inspect, open_dataset
from fastddpm.data.__main__ import main
from fastddpm.data.pack.format import open_pack
from fastddpm.errors import DataError, UsageError
from fastddpm.runtime.distributed import SINGLE_PROCESS

__all__ = ["source"]
ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(1)


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def test_no_torch_is_needed(source: Path, tmp_path: Path) -> None:
    """Help and mistakes answer at once, and inspect and pack run where there is no torch at all."""
    program = (
        "import runpy, sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch': raise ImportError('torch was imported')\n"
        "sys.meta_path.insert(0, NoTorch())\n"
        "code = 0\n"
        "try:\n    runpy.run_module('fastddpm.data', run_name='__main__', alter_sys=False)\n"
        "except SystemExit as e:\n    code = e.code or 0\n"
        "print(code)\n"
    )
    out = str(tmp_path / "x.fdpack")
    for arguments, code, text in (
        (["--help"], 0, "inspect"),
        (["pack", "--help"], 0, "--resize"),
        (["pack", str(source), out, "--image-szie", "8"], 2, "--image-size"),
        (["inspect", str(source)], 0, "30 images, 30 of them good"),
        (["pack", str(source), out, "--image-size", "8"], 0, "30 images, 8x8x3, stored fitted"),
        (["verify", out], 0, "whole; 30 images"),
    ):
        done = python("-c", program, *arguments, cwd=tmp_path)
        assert done.stdout.splitlines()[-1] == str(code), done.stderr
        assert text in done.stdout + done.stderr


def test_inspect_counts_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    colour = RNG.integers(0, 256, (5, 6, 4, 3), dtype=np.uint8)
    grey = colour[0, :, :, 0]
    files = {
        "a/1.png": png(colour[0]), "a/2.bmp": png(colour[1], "BMP"), "b/3.png": png(grey),
        "b/4.png": png(np.stack([grey] * 3, -1)),  # equal to 3: colour of equal channels
        "b/5.webp": png(colour[1], "WEBP", lossless=True),  # equal to 2
        "b/6.png": png(colour[0].swapaxes(0, 1)), "b/7.jpg": png(colour[2], "JPEG"),
        "b/8.png": png(Image.fromarray(colour[1])), "b/notes.txt": b"x",
    }  # fmt: skip
    for name, data in files.items():
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / name).write_bytes(data)
    main(["inspect", str(tmp_path / "f"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["good"], found["bad"], found["duplicates"]) == (8, 8, 0, 3)
    assert found["kinds"] == {"PNG RGB": 4, "BMP RGB": 1, "PNG L": 1, "WEBP RGB": 1, "JPEG RGB": 1}
    assert found["sizes"] == {"4x6": 7, "6x4": 1} and (found["smallest"], found["largest"]) == (4, 4)
    assert found["classes"] == {"0": 2, "1": 6}
    assert sorted(found["equal"]) == [["a/2.bmp", "b/5.webp"], ["a/2.bmp", "b/8.png"], ["b/3.png", "b/4.png"]]
    assert found["encoded_bytes"] == sum(len(data) for data in files.values()) - 1
    assert found["pack"] is None
    main(["inspect", str(tmp_path / "f")])
    text = capsys.readouterr().out
    assert "8 images, 8 of them good, 0 bad" in text and "b/5.webp = a/2.bmp" in text and "1 .txt" in text
    main(["inspect", str(tmp_path / "f"), "--no-duplicates"])
    assert "duplicates" not in capsys.readouterr().out


def test_inspect_names_every_bad_image_and_exits_3(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that no choice of size would mend."""
    reasons = spoil(source)
    for name in ("2/locked.png", "1/dot.png", "1/long.png"):  # readable here; good images of odd sizes
        del reasons[name]
    with pytest.raises(DataError) as error:
        main(["inspect", str(source), "--background", "None"])
    first = str(error.value).splitlines()[0]
    assert first == f"{len(reasons)} of 44 images in {source} cannot be used:" and error.value.exit_code == 3
    named = listed(str(error.value))
    assert named.keys() == reasons.keys()
    assert all(reason in named[name] for name, reason in reasons.items())
    assert "44 images, 33 of them good, 11 bad" in capsys.readouterr().out


def test_inspect_reads_as_training_on_data_alone_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Transparent images are good there, on white; with a preset they need the option, which a note says."""
    root = tmp_path / "-pictures"
    root.mkdir()
    for i in range(20):
        layers = [RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8), np.full((8, 8, 1), 85 * (i % 4), np.uint8)]
        (root / f"{i:02}.png").write_bytes(png(np.dstack(layers)))
    main(["inspect", str(root)])
    said = capsys.readouterr().out
    assert "20 images, 20 of them good, 0 bad" in said
    assert "15 of them are good on a background only" in said and "train with --background white" in said
    assert f"next: python -m fastddpm.train --data {root}\n" in said
    with pytest.raises(DataError, match="15 of 20 images"):
        main(["inspect", str(root), "--background", "None"])
    capsys.readouterr()
    (root / "20.png").write_bytes(b"no picture")
    result = python("-m", "fastddpm.data", "inspect", "./-pictures", cwd=tmp_path)
    assert "next: python -m fastddpm.train --data ./-pictures --skip-bad\n" in result.stdout
    assert result.returncode == 3
    for path in root.glob("*.png"):
        path.write_bytes(b"")
    result = python("-m", "fastddpm.data", "inspect", "--", "-pictures", cwd=tmp_path)
    assert result.stdout.endswith("next: nothing can be trained on, as no image is good\n")


def test_verify_with_a_size_asks_what_training_asks(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["verify", str(source), "--image-size", "8"])
    assert "whole; 30 images, fit for 8x8" in capsys.readouterr().out
    main(["verify", str(source)])
    with pytest.raises(DataError, match="30 of 30 images"):
        main(["verify", str(source), "--image-size", "9"])
    with pytest.raises(DataError, match="it is in colour"):
        main(["verify", str(source), "--image-size", "8", "--image-channels", "1"])
    main(["verify", str(source), "--image-size", "9", "--resize", "area"])


def test_pack_then_inspect_verify_and_train(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.fdpack"
    main(["pack", str(source), str(out), "--image-size", "8"])
    said = capsys.readouterr().out
    checksum = open_pack(out).checksum
    assert f"sha256 of the pixels {checksum}" in said
    assert f"python -m fastddpm.train --preset cifar10 --data {out} --image-size 8\n" in said
    main(["inspect", str(out), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["good"] == 30 and found["pack"]["checksum"] == checksum
    assert found["pack"]["rule"] == {"image_size": 8, "channels": 3, "resize": "none", "background": None}
    assert found["pack"]["source"] == str(source)
    main(["verify", str(out)])
    assert f"{out}: whole; 30 images, 8x8x3, stored fitted, sha256 of the pixels {checksum}" in capsys.readouterr().out
    dataset = open_dataset(out, image_size=8, channels=3, cache=tmp_path / "cache")
    np.testing.assert_array_equal(dataset.images, PLANES)
    data = bytearray(out.read_bytes())
    place = int(open_pack(out).index[11]["offset"])
    data[place + 50] ^= 8
    out.write_bytes(data)
    with pytest.raises(DataError, match=r"(?s)SHA-256 differs.*1 of 30 images.*image 11: its checksum differs"):
        main(["verify", str(out)])


def test_class_names_go_through_a_pack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "f" / name).mkdir(parents=True)
        (tmp_path / "f" / name / "0.png").write_bytes(png(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)))
    main(["inspect", str(tmp_path / "f")])
    assert "classes    2, 1 to 1 images each: cat, dog\n" in capsys.readouterr().out
    out = tmp_path / "x.fdpack"
    main(["pack", str(tmp_path / "f"), str(out), "--image-size", "8"])
    assert open_pack(out).classes == ("cat", "dog")
    for keep in ("decoded", "encoded"):
        lines: list[str] = []
        dataset = open_dataset(out, image_size=8, channels=3, keep=keep, cache=tmp_path / "cache", report=lines.append)  # type: ignore[call-overload]
        assert dataset.classes == ("cat", "dog") and lines == ["2 classes: cat, dog"]
    with pytest.raises(UsageError, match=r"x\.fdpack has no splits.*: found one set of images"):
        main(["inspect", str(out), "--split", "test"])
    main(["pack", str(out), str(tmp_path / "again.fdpack"), "--image-size", "8"])
    assert open_pack(tmp_path / "again.fdpack").classes == ("cat", "dog")


def test_names_of_very_many_classes_are_left_out_of_a_pack(tmp_path: Path) -> None:
    """The description of a pack has a limit; the classes then have their numbers as names."""
    folder = tmp_path / "f"
    for i in range(400):
        (folder / f"{i:03}{'x' * 90}").mkdir(parents=True)
        (folder / f"{i:03}{'x' * 90}" / "0.png").write_bytes(png(np.full((1, 1, 3), i % 256, np.uint8)))
    main(["pack", str(folder), str(tmp_path / "x.fdpack"), "--image-size", "1"])
    made = open_pack(tmp_path / "x.fdpack")
    assert made.classes is None and made.dataset().classes == tuple(map(str, range(400)))


def test_pack_writes_nothing_it_should_not(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.fdpack"
    for arguments, message in (
        ([str(source), str(tmp_path / "x.zip"), "--image-size", "8"], r"must end in \.fdpack"),
        ([str(source), str(tmp_path / "no" / "x.fdpack"), "--image-size", "8"], "there is no folder"),
        ([str(source), str(out), "--image-size", "0"], r"--image-size must be in 1\.\.8192; got 0"),
        ([str(tmp_path / "gone"), str(out), "--image-size", "8"], "does not exist"),
    ):
        with pytest.raises(UsageError, match=message):
            main(["pack", *arguments])
    with pytest.raises(DataError, match="30 of 30 images"):
        main(["pack", str(source), str(out), "--image-size", "9"])
    assert not out.exists()
    out.write_bytes(b"older")
    with pytest.raises(UsageError, match="exists; --overwrite replaces it"):
        main(["pack", str(source), str(out), "--image-size", "8"])
    main(["pack", str(source), str(out), "--image-size", "8", "--overwrite"])
    assert len(open_pack(out)) == 30


def test_resized_grey_and_skipped(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(3):
        (source / f"{i}" / "text.png").write_bytes(b"text")
    out = tmp_path / "x.fdpack"
    main(["pack", str(source), str(out), "--image-size", "4", "--resize", "area", "--skip-bad", "--store", "original"])
    captured = capsys.readouterr()
    assert "30 images, 4x4x3, resized by area, stored original" in captured.out and "3 of 33 images" in captured.err
    expected = open_dataset(
        source, image_size=4, channels=3, resize="area", skip_bad=True, cache=tmp_path / "c", report=lambda _: None
    )
    np.testing.assert_array_equal(open_pack(out).images()[:], expected.images)


def test_the_next_command_takes_the_pack(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grey = tmp_path / "grey"
    grey.mkdir()
    Image.new("L", (8, 8), 7).save(grey / "0.png")
    for folder, expected in ((source, 3), (grey, 1)):
        pack = tmp_path / f"a pack{expected}.fdpack"
        main(["pack", str(folder), str(pack), "--image-size", "8", "--image-channels", str(expected)])
        line = capsys.readouterr().out.splitlines()[-1]
        arguments = shlex.split(line.removeprefix("next: python -m fastddpm.train "))
        config = train._parse(arguments, SINGLE_PROCESS)[0].resolved().unet
        assert (config.image_size, config.image_channels, config.num_classes) == (8, expected, 0)
        assert open_dataset(arguments[arguments.index("--data") + 1], image_size=8, channels=expected).images.size


def test_cifar_can_be_packed(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    records = RNG.integers(0, 256, (5, 2, 3073), dtype=np.uint8)
    records[..., 0] %= 10
    for i, batch in enumerate(records):
        (folder / f"data_batch_{i + 1}.bin").write_bytes(batch.tobytes())
    main(["pack", str(tmp_path), str(tmp_path / "x.fdpack"), "--image-size", "32"])
    made = open_pack(tmp_path / "x.fdpack")
    np.testing.assert_array_equal(made.images()[:], records[..., 1:].reshape(10, 3, 32, 32))
    assert made.labels is not None and made.labels.tolist() == records[..., 0].ravel().tolist()


def test_equal_images_of_very_many_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part of the digests is compared on its own, in memory for so many; all pairs are found, and no other."""
    monkeypatch.setattr(inspect, "_AT_ONCE", 100)
    monkeypatch.setattr(inspect, "_BLOCK", 64)
    kinds = RNG.integers(0, 700, 1000)
    names = {kind: RNG.bytes(16) for kind in set(kinds.tolist())}
    with inspect.Duplicates() as rows:
        for i, kind in enumerate(kinds.tolist()):
            rows.add(2 * i, names[kind])
        found = sorted(rows.pairs())
    first: dict[int, int] = {}
    expected = [(2 * first[kind], 2 * i) for i, kind in enumerate(kinds.tolist()) if first.setdefault(kind, i) != i]
    assert found == sorted(expected) and len(expected) > 200
    with inspect.Duplicates() as rows:
        assert list(rows.pairs()) == []


def test_digests_tell_pixels_and_size() -> None:
    flat = RNG.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    same = [Image.fromarray(flat), Image.fromarray(flat).convert("RGBA").convert("RGB")]
    changed = flat.copy()
    changed[3, 5, 2] ^= 1
    others = [Image.fromarray(changed), Image.fromarray(flat.reshape(6, 4, 3))]
    assert len({inspect.digest(image) for image in same}) == 1
    assert len({inspect.digest(image) for image in same + others}) == 3


def test_very_many_sizes_are_not_all_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(inspect, "_MAX_SIZES", 3)
    files = [encoded(np.zeros((1, width, 3), np.uint8)) for width in (1, 2, 3, 4, 5, 1)]
    found = inspect.scan(collection_of(files), full_list=tmp_path / "x", report=print)
    assert found.sizes == Counter({"1x1": 2, "2x1": 1, "3x1": 1, "other": 2})


def test_hostile_files_are_refused_in_little_memory(tmp_path: Path) -> None:
    """Headers of 65535 x 65535, animations of 2,000 frames, other formats under an image's name."""
    folder = tmp_path / "f"
    folder.mkdir()
    frame = png(RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    (folder / "good.png").write_bytes(frame)
    (folder / "huge.png").write_bytes(huge_header())
    (folder / "huge.bmp").write_bytes(b"BM" + bytes(16) + (40).to_bytes(4, "little") + b"\xff\xff\0\0" * 2 + bytes(40))
    (folder / "huge.gif").write_bytes(b"GIF89a" + b"\xff" * 4 + bytes(20))
    bodies = {
        "PPM": png(RNG.integers(0, 256, (9, 9, 3), dtype=np.uint8), "PPM"),
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60000 60000\n",
        "FITS": b"SIMPLE  =                    T".ljust(2880),
        "PSD": b"8BPS\x00\x01".ljust(100, b"\0"),
    }
    for name, body in bodies.items():
        (folder / f"{name}.png").write_bytes(body)
    frames = [Image.fromarray(RNG.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(200)]
    frames[0].save(folder / "long.gif", save_all=True, append_images=frames[1:] * 10)
    frames[0].save(folder / "long.png", save_all=True, append_images=frames[1:] * 10)
    program = (
        "import sys; from fastddpm.data.__main__ import main\n"
        "from fastddpm.errors import DataError\n"
        "peak = lambda: int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])\n"
        "main(['inspect', sys.argv[1]]); before = peak()\n"
        "try: main(['inspect', sys.argv[2]])\n"
        "except DataError as error: print(str(error).split()[0], peak() - before)\n"
    )
    small = tmp_path / "g"
    small.mkdir()
    (small / "good.png").write_bytes(frame)
    done = python("-c", program, str(small), str(folder), cwd=tmp_path)
    refused, grown = map(int, done.stdout.splitlines()[-1].split())
    assert refused == 7 and grown < 100 * 1024, done.stdout  # kB
