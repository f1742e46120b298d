"""The list of a step's kernels: counts that a change must not raise unseen, and bytes and FLOPs counted by hand."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import step_cost
from helpers.networks import tiny
from limits import H200
from step_trace import DEVICE, Launch, Trace, sampling_step, tracing, training_step

from fastddpm.config import EngineConfig
from fastddpm.training.parallel import channels_last_input
from fastddpm.unet import GroupNormSiLU, UNet

MiB = 2**20


def kernels(launches: list[Launch]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for one in launches:
        counts[one.kind] = counts.get(one.kind, 0) + 1
    return counts


def gigabytes(launches: list[Launch]) -> float:
    return sum(one.num_bytes for one in launches) / 1e9


def test_the_sampling_step_of_the_cifar10_network() -> None:
    """A copy or sum more raises the count, and a tensor read or written once more the bytes."""
    found = sampling_step("cifar10", 256, EngineConfig())
    assert kernels(found) == {
        "elementwise": 7, "convolution": 52, "norm": 51, "product": 19, "attention": 6
    }  # fmt: skip
    assert gigabytes(found) == pytest.approx(9.926, abs=0.005)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("switch", "kernels_more", "gb_more"),
    [("one_product", 14, 0.688), ("carried_biases", 18, 0.944), ("fused_residuals", 15, 0.608),
     ("folded_attention", 8, 0.748), ("transposed_convolutions", 3, 0.383),
     ("mirrored", 0, 0.002), ("padded_channels", 0, -0.005), ("direct_input", 1, 0.009)],
)  # fmt: skip
def test_what_each_switch_saves(switch: str, kernels_more: int, gb_more: float) -> None:
    on = sampling_step("cifar10", 256, EngineConfig())
    off = sampling_step("cifar10", 256, EngineConfig(**{switch: False}))
    assert len(off) - len(on) == kernels_more
    assert gigabytes(off) - gigabytes(on) == pytest.approx(gb_more, abs=0.002)


def test_the_training_step_of_the_cifar10_network() -> None:
    found = training_step("cifar10", 128, torch.bfloat16)
    assert kernels(found) == {
        "copy": 27, "elementwise": 514, "norm": 153, "convolution": 230, "product": 143, "attention": 18
    }  # fmt: skip
    assert gigabytes(found) == pytest.approx(21.715, abs=0.005)


def test_a_convolution_with_a_bias_is_two_kernels() -> None:
    """In channels_last, as cuDNN gives it: 2 x 2 images of 8 channels at 6x6, 16 out, bf16."""
    x, weight = (
        torch.empty(size, dtype=torch.bfloat16, device=DEVICE).to(memory_format=torch.channels_last)
        for size in ((2, 8, 6, 6), (16, 8, 3, 3))
    )
    bias = torch.empty(16, dtype=torch.bfloat16, device=DEVICE)
    with Trace() as trace:
        out = torch.nn.functional.conv2d(x, weight, bias, padding=1)
    assert out.is_contiguous(memory_format=torch.channels_last)
    convolution, added = trace.launches
    assert (convolution.kind, convolution.flop) == ("convolution", 2 * 2 * 36 * 16 * 8 * 9)
    assert convolution.num_bytes == 2 * (2 * 8 * 36 + 16 * 8 * 9 + 2 * 16 * 36)
    assert added.num_bytes == 2 * (2 * 2 * 16 * 36 + 16)


def test_a_product_reads_what_it_adds_to() -> None:
    out, a, b = (torch.empty(size, device=DEVICE) for size in ((5, 7), (5, 3), (3, 7)))
    with Trace() as trace:
        out.addmm_(a, b)
    (product,) = trace.launches
    assert (product.kind, product.flop, product.num_bytes) == ("product", 2 * 5 * 3 * 7, 4 * (2 * 35 + 15 + 21))


@pytest.mark.parametrize("channels", [1, 3])
def test_weights_that_are_sharded_leave_images_in_channels_last(channels: int) -> None:
    """As cuDNN lays its outputs out; all inputs of norms and convolutions, with weights that are contiguous."""
    with torch.device(DEVICE), tracing() as trace:
        unet = UNet(tiny(image_channels=channels))
        seen = []
        for module in unet.modules():
            if isinstance(module, torch.nn.Conv2d | GroupNormSiLU):
                module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        with trace:
            channels_last_input(unet)(torch.empty(2, *unet.config.image_shape), torch.empty(2, dtype=torch.int64))
    assert len(seen) > 20
    assert all(x.stride(1) == 1 and x.stride(3) == x.shape[1] for x in seen)


def test_views_and_empty_tensors_are_free_and_repeated_rows_are_read_once() -> None:
    with Trace() as trace:
        row = torch.empty(1, 8, device=DEVICE).expand(4, -1)
        row[:, 2:6].t().unsqueeze(0)
        row.contiguous()
    (copied,) = trace.launches
    assert copied.num_bytes == 4 * (8 + 32)


def test_the_floor_and_the_prediction_of_one_kernel() -> None:
    """A copy of 43 MB on an H200, 10 us; at half the memory's rate 20 us, and 1.1 us of launch."""
    one = Launch("copy", "x", 43_000_000)
    assert step_cost.floor(one, H200) == pytest.approx(10e-6)
    assert step_cost.Assumptions().seconds(one, H200, 25) == pytest.approx(21.1e-6)


def test_tiles_that_fill_half_of_the_chip() -> None:
    """4096 pixels by 256 channels are 64 tiles of 128 x 128 on 132 multiprocessors."""
    one = Launch("convolution", "x", 0, 132 * 10**9, rows=4096, channels=(256, 256))
    seconds = step_cost.Assumptions().seconds(one, H200, 25) - 1.1e-6
    assert seconds == pytest.approx(132e9 / 790e12 / 0.92 * 132 / 64)


@pytest.mark.slow
def test_a_training_step_multiplies_three_times_as_much() -> None:
    """Both gradients of every convolution but the first, whose input needs none."""
    forward = sampling_step("mnist", 64, EngineConfig(phase_convolutions=False))
    whole = training_step("mnist", 64, torch.bfloat16)
    of = [sum(one.flop for one in step if one.kind == "convolution") for step in (forward, whole)]
    assert 2.9 < of[1] / of[0] < 3.3
    adam = next(one for one in whole if one.name == "optimizer, Adam")
    assert adam.num_bytes % (7 * 4) == 0


def test_the_command_stores_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cost.json"
    assert step_cost.main(["--preset", "mnist", "--batch", "8", "--out", str(path)]) == 0
    stored = json.loads(path.read_text())
    total = stored["sums"]["total"]
    assert f"{total['kernels']:.0f} kernels" in capsys.readouterr().out
    assert total["kernels"] == sum(row["count"] for row in stored["kernels"])
    assert stored["options"]["batch"] == 8 and "nothing measured" in stored["arithmetic"]
