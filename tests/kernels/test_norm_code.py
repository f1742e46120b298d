"""group_norm_silu must be limited by memory, not by the instructions it issues: read from the compiled code."""

import importlib.util
import re

import pytest
import torch
from helpers import fat_binary
from helpers.native_build import build, find_nvcc

pytest.importorskip("triton")
if importlib.util.find_spec("triton.backends.nvidia") is None:
    pytest.skip("Triton has no compiler for NVIDIA here", allow_module_level=True)

import resources
from helpers import machine_code
from shapes import Call

pytestmark = pytest.mark.slow

MOST, FLIGHT = 22, 4
# Channels of x and skip, and image side, of the CIFAR-10 network. The groups of 256 + 128 channels have 12, whose two
# Triton takes as three rows of 8 channels.
SHAPES = [((128,), 32), ((128,), 16), ((256,), 16), ((256,), 8), ((256,), 4), ((256, 256), 4), ((256, 256), 8),
          ((256, 256), 16), ((128, 128), 32)]  # fmt: skip
ODD = [((256, 128), 16), ((256, 128), 32)]


def call(channels: tuple[int, ...], side: int) -> Call:
    images = [
        torch.empty(256, c, side, side, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
        for c in channels
    ]
    weight, temb = torch.empty(sum(channels), device="meta"), torch.empty(256, sum(channels), device="meta")
    skip = images[1] if len(images) > 1 else None
    return Call("group_norm_silu", (images[0], weight, weight, 32, 1e-6, skip, temb, *[None] * 2, True, 0.0,
                                    *[None] * 3, 0))  # fmt: skip


@pytest.mark.parametrize("shapes", [SHAPES, ODD], ids=["whole rows", "three rows"])
def test_triton(shapes: list[tuple[tuple[int, ...], int]]) -> None:
    """All elements of a thread at once: the instructions of the kernel over the elements of a thread."""
    kernels = [kernel for shape in shapes for kernel in resources.kernels_of(call(*shape))]
    cubins = resources.code_of([("sm_90", kernel) for kernel in kernels])
    for (channels, side), kernel, cubin in zip(shapes, kernels, cubins, strict=True):
        constants = dict(kernel.constants)
        threads = 32 * dict(kernel.options)["num_warps"]
        elements = constants["P"] * constants["GB"] * constants["CPG"] / threads
        ((_, instructions, _),) = machine_code.kernels(cubin)
        assert len(instructions) / elements <= MOST, (channels, side)
        assert machine_code.loads_in_flight(instructions) >= FLIGHT, (channels, side)


def test_cuda() -> None:
    """Three loops over a slab, of which the first reads memory and the last has the sigmoid; 8 elements a vector."""
    if find_nvcc() is None:
        pytest.skip("there is no nvcc")
    seen = 0
    for part in fat_binary.parts(build("_native_cuda").read_bytes()):
        if (part.kind, part.architecture) != ("SASS", 90):
            continue
        for name, instructions, labels in machine_code.kernels(part.content):
            if not re.search(r"normalizeI\S*(bf16|f16)\S*Li8EEE", name):
                continue
            bodies = machine_code.loops(instructions, labels)
            batched = [body for body in bodies if machine_code.wide(body) == FLIGHT]
            reading = [body for body in batched if machine_code.loads_in_flight(body)]
            writing = [body for body in batched if any("STG.E.128" in one for one in body)]
            squares = [body for body in batched if body not in reading and body not in writing]
            with_sigmoid = [body for body in writing if any("MUFU" in one for one in body)]
            assert machine_code.loads_in_flight(reading[0]) >= FLIGHT, name
            without_dropout = min(len(body) for body in with_sigmoid)
            assert (len(reading[0]) + len(squares[0]) + without_dropout) / (8 * FLIGHT) <= MOST, name
            seen += 1
    assert seen == 4
