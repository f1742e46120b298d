"""Batches of a pack: the images of a step depend on the step only, and a worker that fails or hangs is an error."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.marks import slow
from helpers.packs import numbered, numbers_of, packed

from fastddpm.data import Dataset, batch_indices, open_dataset
from fastddpm.data.batches import AHEAD, Batches
from fastddpm.data.dataset import checksum
from fastddpm.data.pack.format import Pack
from fastddpm.data.workers import Workers
from fastddpm.errors import DataError, UsageError

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
NUM, BATCH, SEED = 103, 12, 5
PIXELS = numbered(NUM)
LABELS = [i % 7 for i in range(NUM)]
STEPS = NUM // BATCH  # of an epoch


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return packed(tmp_path_factory.mktemp("pack") / "images.fdpack", PIXELS, LABELS)


def children() -> set[int]:
    """Return the child processes of this one, those included that have ended and are not reaped."""
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    before = children()
    yield
    assert children() <= before


def check(batch: tuple[torch.Tensor, torch.Tensor | None], numbers: np.ndarray) -> None:
    """Check that a batch holds these images, bit for bit, and their labels."""
    images, labels = batch
    assert images.dtype == torch.uint8 and labels is not None and labels.dtype == torch.int64
    assert numbers_of(images.numpy()) == numbers.tolist()
    np.testing.assert_array_equal(images.numpy(), PIXELS[numbers])
    assert labels.tolist() == [LABELS[i] for i in numbers]


def expected(step: int) -> np.ndarray:
    return batch_indices(step, NUM, BATCH, SEED)


@pytest.mark.parametrize("workers", [0, slow(1), 4])
@pytest.mark.parametrize("world", [1, 2, slow(4)])
def test_the_global_order_depends_on_the_step_alone(pack: Pack, workers: int, world: int) -> None:
    """For two epochs and a half, the ranks' parts make up the batch, and an epoch has each image at most once."""
    ranks = [
        Batches(pack.dataset(), BATCH, SEED, CPU, rank=rank, world_size=world, workers=workers) for rank in range(world)
    ]
    seen: list[int] = []
    for step in range(2 * STEPS + STEPS // 2):
        parts = [batches.at(step) for batches in ranks]
        whole = torch.cat([images for images, _ in parts]), torch.cat([part[1] for part in parts])  # type: ignore[misc]
        check(whole, expected(step))
        seen += numbers_of(whole[0].numpy())
    for batches in ranks:
        batches.close()
    epoch = STEPS * BATCH
    assert len(set(seen[:epoch])) == len(set(seen[epoch : 2 * epoch])) == epoch
    assert seen[:epoch] != seen[epoch : 2 * epoch]


def test_any_step_can_be_asked_for_next(pack: Pack) -> None:
    """A resumed run starts in the middle of an epoch. Going back works, too."""
    with Batches(pack.dataset(), BATCH, SEED, CPU, workers=2) as batches:
        for step in (STEPS // 2, STEPS // 2 + 1, 40, 41, 43, 42, 0, 1000, 1000, 7, 8):
            check(batches.at(step), expected(step))


def test_only_what_is_ahead_is_decoded(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted: list[int] = []
    submit = Workers.submit

    def noted(workers: Workers, step: int, numbers: np.ndarray, wanted: range) -> None:
        submitted.append(step)
        submit(workers, step, numbers, wanted)

    monkeypatch.setattr(Workers, "submit", noted)
    with Batches(pack.dataset(), BATCH, SEED, CPU, workers=1) as batches:
        batches.at(100)
        batches.at(101)
    assert submitted == list(range(100, 102 + AHEAD))


@pytest.mark.parametrize("world", [3, 5, 12])
@pytest.mark.parametrize("encoded", [False, True])
def test_parts_of_a_batch_that_the_ranks_do_not_divide(pack: Pack, world: int, encoded: bool) -> None:
    dataset = pack.dataset() if encoded else Dataset(PIXELS, np.array(LABELS), "array", "")
    parts = [Batches(dataset, BATCH, SEED, CPU, rank=rank, world_size=world, workers=0) for rank in range(world)]
    assert [part.start for part in parts[1:]] == [part.end for part in parts[:-1]]
    assert (parts[0].start, parts[-1].end) == (0, BATCH)
    images = torch.cat([part.at(3)[0] for part in parts])
    np.testing.assert_array_equal(images.numpy(), PIXELS[expected(3)])


def test_more_workers_than_images(pack: Pack) -> None:
    with Batches(pack.dataset(), 2, SEED, CPU, workers=4) as batches:
        for step in range(3):
            check(batches.at(step), batch_indices(step, NUM, 2, SEED))


def test_invalid_arguments(pack: Pack) -> None:
    for rank, world in ((2, 2), (-1, 2), (0, 13)):
        with pytest.raises(UsageError, match=f"a batch of 12 has no images for rank {rank} of {world}"):
            Batches(pack.dataset(), BATCH, SEED, CPU, rank=rank, world_size=world)
    with pytest.raises(UsageError, match="workers must be 0 or more; got -1"):
        Batches(pack.dataset(), BATCH, SEED, CPU, workers=-1)
    with pytest.raises(DataError, match="103 images are fewer than a batch of 104"):
        Batches(pack.dataset(), 104, SEED, CPU)


@pytest.mark.slow
def test_the_default_number_of_workers(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    """One per processor, at most 8, divided by the training processes on this machine."""
    for available, world, here, expected_count in ((6, 1, None, 6), (40, 1, None, 8), (6, 4, None, 1), (6, 4, "2", 3)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, available=available: set(range(available)))
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        if here:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
        with Batches(pack.dataset(), BATCH, SEED, CPU, world_size=world) as batches:
            assert len(processes(batches)) == expected_count


def processes(batches: Batches) -> list[int]:
    assert batches._workers is not None
    return batches._workers.processes


def test_a_killed_worker_is_named_at_once(pack: Pack) -> None:
    batches = Batches(pack.dataset(), BATCH, SEED, CPU, workers=3)
    batches.at(0)
    victim = processes(batches)[1]
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(DataError, match=rf"data worker 1 of 3 \(process {victim}\) was killed by SIGKILL") as error:
        for step in range(1, 10):
            batches.at(step)
    assert str(pack.path) in str(error.value) and error.value.exit_code == 3
    with pytest.raises(DataError, match="were stopped"):
        batches.at(1)


def test_a_worker_that_cannot_start_is_named(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastddpm.data.workers._PROGRAM", "raise SystemExit(7)")
    batches = Batches(pack.dataset(), BATCH, SEED, CPU, workers=1)
    with pytest.raises(DataError, match=r"data worker 0 of 1 \(process \d+\) ended with exit code 7"):
        batches.at(0)


@pytest.mark.slow
def test_a_worker_that_hangs_is_named_and_stopped(pack: Pack) -> None:
    batches = Batches(pack.dataset(), BATCH, SEED, CPU, workers=2)
    batches.at(0)
    assert batches._workers is not None and batches._workers._timeout_s == 60.0
    batches._workers._timeout_s = 1.0  # set only now, because on a busy machine a worker takes longer to start
    victim = processes(batches)[0]
    os.kill(victim, signal.SIGSTOP)
    with pytest.raises(DataError, match=rf"data worker 0 of 2 \(process {victim}\) has not answered for 1 s"):
        for step in range(1, 10):
            batches.at(step)
    assert not Path(f"/proc/{victim}").exists()


def test_a_slow_worker_is_waited_for(pack: Pack) -> None:
    with Batches(pack.dataset(), BATCH, SEED, CPU, workers=2, timeout_s=30.0) as batches:
        batches.at(0)
        victim = processes(batches)[0]
        os.kill(victim, signal.SIGSTOP)
        waker = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -CONT {victim}"])
        for step in range(1, 3 + AHEAD):
            check(batches.at(step), expected(step))
        waker.wait()


def test_a_damaged_image_is_an_error_of_its_own_step(tmp_path: Path) -> None:
    """The steps before and after it are complete, whatever was decoded ahead, with and without workers."""
    damaged = packed(tmp_path / "x.fdpack", PIXELS)
    step, place = 4, 7
    number = int(expected(step)[place])
    data = bytearray(damaged.path.read_bytes())
    data[int(damaged.index[number]["offset"]) + 40] ^= 4
    damaged.path.write_bytes(data)
    for workers in (0, 2):
        with Batches(damaged.dataset(), BATCH, SEED, CPU, workers=workers) as batches:
            for before in range(step):
                np.testing.assert_array_equal(batches.at(before)[0].numpy(), PIXELS[expected(before)])
            with pytest.raises(DataError, match=rf"x\.fdpack: image {number}: its checksum differs .*data verify"):
                batches.at(step)
            np.testing.assert_array_equal(batches.at(step + 1)[0].numpy(), PIXELS[expected(step + 1)])


@pytest.mark.slow
def test_workers_do_not_outlive_their_process(pack: Pack) -> None:
    """The training process may end, raise, or be killed."""
    program = (
        "import sys, os; from pathlib import Path; import numpy as np\n"
        "from fastddpm.data.workers import Workers; from fastddpm.data.pack.format import open_pack\n"
        "w = Workers(open_pack(Path(sys.argv[1])).images(), 4, num_workers=2, slots=2, timeout_s=30)\n"
        "w.submit(0, np.arange(4), range(1)); w.take(0); print(*w.processes, flush=True)\n"
        "{'end': lambda: None, 'raise': lambda: 1 / 0, 'kill': lambda: os.kill(os.getpid(), 9)}[sys.argv[2]]()\n"
    )
    for how, code in (("end", 0), ("raise", 1), ("kill", -9)):
        done = subprocess.run(
            [sys.executable, "-c", program, str(pack.path), how],
            env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert len(done.stdout.split()) == 2
        deadline = time.monotonic() + 120  # far past any busy machine: only a worker that never ends gets there
        while any(Path(f"/proc/{pid}").exists() for pid in done.stdout.split()):
            assert time.monotonic() < deadline, how
            time.sleep(0.02)


def test_workers_are_small(pack: Pack) -> None:
    """They do not load torch, and take less than 100 MB."""
    with Batches(pack.dataset(), BATCH, SEED, CPU, workers=1) as batches:
        batches.at(0)
        (worker,) = processes(batches)
        assert "torch" in Path("/proc/self/maps").read_text()
        assert "torch" not in Path(f"/proc/{worker}/maps").read_text()
        status = Path(f"/proc/{worker}/status").read_text().splitlines()
        assert next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) < 100 * 1024  # kB


def test_collected_batches_take_their_workers_with_them(pack: Pack) -> None:
    batches = Batches(pack.dataset(), BATCH, SEED, CPU, workers=2)
    batches.at(0)
    first = processes(batches)[0]
    del batches
    assert not Path(f"/proc/{first}").exists()


def test_a_pack_and_an_array_train_on_the_same_examples(pack: Pack, tmp_path: Path) -> None:
    """A checkpoint stores the checksum of pixels and labels, so a run can be resumed with either."""
    decoded = open_dataset(pack.path, image_size=8, channels=3, cache=tmp_path)
    assert isinstance(decoded.images, np.memmap)
    assert decoded.checksum == pack.checksum == checksum(PIXELS, np.array(LABELS))
    encoded = open_dataset(pack.path, image_size=8, channels=3, cache=tmp_path, keep="encoded")
    with Batches(encoded, BATCH, SEED, CPU, workers=1) as one, Batches(decoded, BATCH, SEED, CPU) as two:
        for step in (0, 9):
            assert one.at(step)[0].equal(two.at(step)[0])
