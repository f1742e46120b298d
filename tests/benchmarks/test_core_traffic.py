"""Turns of two builds by whether cores share a cache: how a turn is classed, and what it computes."""

import core_pair
import core_traffic
import pytest
import torch
from convolution import Shape

from fastddpm.kernels import native


class Side:
    """Turns of given milliseconds."""

    def __init__(self, *times: float) -> None:
        self.times = iter(times)

    def milliseconds(self) -> float:
        return next(self.times)


def test_a_turn_is_of_a_kind_if_the_round_trips_around_it_are() -> None:
    assert core_pair.kind(80, 130) == "shared" and core_pair.kind(400, 380) == "apart"
    assert core_pair.kind(80, 400) is None and core_pair.kind(400, 80) is None and core_pair.kind(None, 80) is None


def test_medians_are_of_turns_of_one_kind() -> None:
    trips = iter([80, 80, 400, 400, 400, 90, 90])
    sides = {"before": Side(1, 5, 9), "now": Side(2, 6, 10)}
    found = core_traffic.measure(sides, 3, lambda: next(trips))  # type: ignore[arg-type]
    assert found == {
        "before": {"shared": {"ms": 1, "turns": 1}, "apart": {"ms": 5, "turns": 1}},
        "now": {"shared": {"ms": 10, "turns": 1}, "apart": {"ms": 6, "turns": 1}},
    }


def test_a_round_trip_takes_nanoseconds() -> None:
    ns = core_pair.round_trip_ns()
    if ns is None:
        pytest.skip("there is no C compiler with OpenMP")
    assert ns > 1


@pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("role", core_traffic.ROLES)
def test_a_turn_computes_what_training_does(role: core_traffic.Role, bf16: bool) -> None:
    turn = core_traffic.Turn([Shape(8, 16, 32, True), Shape(8, 32, 16, False)], 2, role, bf16, None)
    assert turn.milliseconds() > 0
    results = turn.tensors[1:-1:3] if role == "weight gradient" else turn.tensors[2:-1:3]
    assert len(results) == 2
    for result in results:  # of a sum of hundreds of products, not the single normal numbers that were there
        assert torch.isfinite(result).all() and result.std() > 3
