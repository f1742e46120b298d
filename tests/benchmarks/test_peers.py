"""The benchmarks compare like with like: every peer that is here computes the network's numbers."""

import harness
import peers
import pytest
import torch
from helpers.marks import slow
from helpers.networks import tiny
from plain import PlainUNet

from fastddpm import ops
from fastddpm.unet import UNet

EAGER = [name for name in peers.FORWARD if "compile" not in name]


@pytest.mark.parametrize("labels", [0, 3])
def test_the_plain_network_is_the_network(labels: int) -> None:
    unet = UNet(tiny(num_classes=labels)).double().eval()
    with torch.no_grad(), ops.use_backend("reference"):
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        x, t = torch.randn(2, 3, 12, 12, dtype=torch.float64), torch.tensor([3, 900])
        label = torch.tensor([0, 2]) if labels else None
        torch.testing.assert_close(PlainUNet(unet)(x, t, label), unet(x, t, label), rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("peer", [EAGER[0], *map(slow, EAGER[1:])])
def test_every_peer_evaluates_the_same_network(peer: str) -> None:
    """The CIFAR-10 network with random weights, one image: within float32 rounding of float64."""
    if harness.ON_GPU:
        pytest.skip("peers run in bfloat16 on a GPU")
    evaluate, _ = peers.evaluation(peer, "cifar10")
    x, t = torch.randn(1, 3, 32, 32), torch.tensor(500).expand(1)
    expected = exact(x)
    assert float((evaluate(x, t).double() - expected).norm() / expected.norm()) < 1e-5


_exact: list[torch.Tensor] = []


def exact(x: torch.Tensor) -> torch.Tensor:
    if not _exact:
        with torch.no_grad(), ops.use_backend("reference"):
            _exact.append(peers.unet("cifar10").double()(x.double(), torch.tensor([500])))
    return _exact[0]


def test_flops_are_those_of_the_paper_s_network() -> None:
    """12.44 GFLOP an image: 11.42 of convolutions, 0.68 of attention's projections, 0.336 of attention; linear in n."""
    one = harness.forward_flop("cifar10", 1)
    assert one == pytest.approx(12.44e9, rel=2e-3)
    assert harness.forward_flop("cifar10", 4) == pytest.approx(4 * one, rel=1e-3)


class Benchmark:
    """As much of pytest-benchmark's fixture as `record` touches."""

    class stats:  # noqa: N801
        class stats:  # noqa: N801
            median = 0.5

    def __init__(self) -> None:
        self.extra_info: dict[str, object] = {}


def test_a_record_has_rates_and_the_share_of_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "limits", lambda dtype: harness.Limits(matrix_flops=8e12, copy_bytes=4e9))
    benchmark = Benchmark()
    harness.record(benchmark, "somebody", images=10, flop=1e12, num_bytes=1e9, batch=3)
    found = benchmark.extra_info
    assert found["images_per_s"] == 20 and found["tflop_per_s"] == 2 and found["gb_per_s"] == 2
    assert found["share_of_limit"] == 0.25 / 0.5  # a quarter of a second to move, an eighth to compute
    assert (found["peer"], found["batch"]) == ("somebody", 3)
    assert {"processor", "torch", "date", "threads"} <= found.keys()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_limits_are_measured(dtype: torch.dtype) -> None:
    found = harness.limits(dtype)
    assert found.matrix_flops > 1e9 and found.copy_bytes > 1e8
    assert found.seconds(found.matrix_flops, 0) == 1
    assert found.seconds(0, 3 * found.copy_bytes) == pytest.approx(3)


def test_a_peer_that_is_not_installed_is_skipped_by_name() -> None:
    with pytest.raises(pytest.skip.Exception, match="no-such-library is not installed"):
        peers.version("no-such-library")


def test_the_patch_of_layouts_ends() -> None:
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    with peers.kept_layout():
        assert x.contiguous().stride() == x.stride()
        assert x.contiguous(memory_format=torch.contiguous_format).stride() != x.stride()
    assert x.contiguous().stride() != x.stride()
