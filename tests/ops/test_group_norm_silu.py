"""group_norm_silu: forward and backward numbers, layouts, and what torch asks of an operator."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import contract, oracle
from helpers.group_norm_silu_cases import (
    CASES,
    Case,
    expected_gradients,
    expected_output,
    gradients,
    low_precision,
    require_grad,
)
from helpers.marks import slow, with_large
from torch import Tensor

from fastddpm.ops import group_norm_silu
from fastddpm.ops.group_norm_silu import norm_and_inputs


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", with_large([torch.float32, torch.float64], torch.float64))
@pytest.mark.parametrize("name", with_large(CASES, "32x32, 128", "seam in a group", "batch 33", "512 + 512"))
def test_numbers(name: str, dtype: torch.dtype, layout: str, device: torch.device) -> None:
    """Output and every gradient."""
    case = CASES[name]
    tensors = case.inputs(dtype, device)
    for image in {"x", "skip"} & set(tensors):
        tensors[image] = contract.LAYOUTS[layout](tensors[image])
    tensors = require_grad(tensors)
    y = case.call(tensors)
    assert y.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(contract.float64(y), expected_output(case, tensors), rtol=0, atol=tolerance)
    grad = torch.randn_like(y)
    expected = expected_gradients(case, tensors, grad)
    for tensor_name, gradient in gradients(y, tensors, grad).items():
        reference = expected[tensor_name]
        assert gradient.shape == reference.shape and gradient.dtype == tensors[tensor_name].dtype
        allowed = max(tolerance * max(np.abs(reference).max(), 1), torch.finfo(dtype).eps * case.cancelling)
        np.testing.assert_allclose(contract.float64(gradient), reference, rtol=0, atol=allowed, err_msg=tensor_name)


@pytest.mark.parametrize(
    "name",
    with_large(
        ["32x32, 128", "seam in a group", "seam, all options", "non-square", "no SiLU", "1x1 image"],
        "32x32, 128",
        "seam in a group",
        "seam, all options",
    ),
)
@pytest.mark.parametrize("dtype", contract.LOW_PRECISION)
def test_low_precision_error_is_that_of_its_inputs(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Output and gradients against float64 on the rounded inputs."""
    case = CASES[name]
    tensors = require_grad(case.inputs(dtype, device))
    ours, low = case.call(tensors), low_precision(case, tensors)
    assert ours.dtype == dtype
    contract.assert_within_twice_the_error_of(low, ours, expected_output(case, tensors))
    grad = torch.randn_like(ours)
    expected = expected_gradients(case, tensors, grad)
    ours_gradients, low_gradients = (gradients(y, tensors, grad) for y in (ours, low))
    for tensor_name, reference in expected.items():
        contract.assert_within_twice_the_error_of(low_gradients[tensor_name], ours_gradients[tensor_name], reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", [0, 30, 100])
def test_mean_far_above_the_deviation(mean: float, dtype: torch.dtype, device: torch.device) -> None:
    """With a mean of 30 or 100 deviations E[x^2] - E[x]^2 would lose 3 to 4 digits; two passes lose none.

    What remains is the rounding of the output, and of float32 sums of values around the mean.
    """
    case = Case(2, 24, (8, 8), 2)
    tensors = case.inputs(dtype, device)
    tensors["x"] = (tensors["x"].double() + mean).to(dtype)
    tensors = require_grad(tensors)
    y = case.call(tensors)
    expected = expected_output(case, tensors)
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps * np.abs(expected)
    assert (np.abs(contract.float64(y) - expected) <= rounding + 1e-6 * max(mean, 10)).all()
    grad = torch.randn_like(y)
    for name, gradient in gradients(y, tensors, grad).items():
        reference = expected_gradients(case, tensors, grad)[name]
        rounding = torch.finfo(gradient.dtype).eps * np.abs(reference)
        limit = 2e-6 * max(mean, 10) * max(1, np.abs(reference).max())
        assert (np.abs(contract.float64(gradient) - reference) <= rounding + limit).all(), name


@pytest.mark.large
@pytest.mark.parametrize("value", [0.0, 3.3, -40.0])
def test_constant_input_gives_the_bias(value: float, device: torch.device) -> None:
    """A group without deviation: 1/sqrt(eps) = 1000 times whatever the mean is off by, here at most 8 units."""
    case = CASES["seam in a group"]
    tensors = case.inputs(torch.float32, device)
    tensors["x"], tensors["skip"] = torch.full_like(tensors["x"], value), torch.full_like(tensors["skip"], value)
    tensors = require_grad(tensors)
    y = case.call(tensors)
    gain = tensors["weight"].abs().max().item()
    tolerance = 1e-6 + 8 * np.spacing(np.float32(abs(value))) * 1000 * gain
    expected = oracle.silu(contract.float64(tensors["bias"]))[None, :, None, None]
    np.testing.assert_allclose(contract.float64(y), np.broadcast_to(expected, y.shape), atol=tolerance)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(y, tensors, torch.ones_like(y)).values())


@pytest.mark.parametrize("layout", with_large(contract.LAYOUTS, "sliced", "strided", "offset", "transposed"))
@pytest.mark.parametrize("skip_layout", with_large(["contiguous", "channels_last", "strided"], "strided"))
def test_layouts(layout: str, skip_layout: str, device: torch.device) -> None:
    """Any mixture gives the numbers; the result is channels_last when x is, contiguous otherwise."""
    case = Case(2, 8, (4, 6), 3, c2=4, options=("temb",))
    tensors = case.inputs(torch.float32, device)
    expected = expected_output(case, tensors)
    grad = torch.randn(2, 12, 4, 6, device=device)
    expected_grads = expected_gradients(case, tensors, grad)
    tensors["x"] = contract.LAYOUTS[layout](tensors["x"])
    tensors["skip"] = contract.LAYOUTS[skip_layout](tensors["skip"])
    tensors = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    y = case.call(tensors)
    np.testing.assert_allclose(contract.float64(y), expected, atol=5e-6)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert y.is_contiguous(memory_format=memory_format)
    for some_grad in (grad, contract.LAYOUTS["channels_last"](grad), contract.LAYOUTS["strided"](grad)):
        for name, gradient in gradients(case.call(tensors), tensors, some_grad).items():
            np.testing.assert_allclose(contract.float64(gradient), expected_grads[name], atol=1e-5, err_msg=name)


def test_expanded_gradient_and_input(device: torch.device) -> None:
    """sum() sends back a gradient of stride 0; a broadcast image has one too."""
    case = Case(3, 8, (4, 4), 4)
    tensors = case.inputs(torch.float32, device)
    tensors["x"] = tensors["x"][:1].expand(3, -1, -1, -1)
    tensors = require_grad(tensors)
    y = case.call(tensors)
    np.testing.assert_allclose(contract.float64(y), expected_output(case, tensors), atol=5e-6)
    expected = expected_gradients(case, tensors, torch.ones_like(y))
    y.sum().backward()
    for name, tensor in tensors.items():
        np.testing.assert_allclose(contract.float64(tensor.grad), expected[name], atol=1e-5, err_msg=name)


# (C1, C2, size, groups): no skip, a seam between tiles, a seam in a group, and images that are looped over and split.
@pytest.mark.parametrize(
    ("c1", "c2", "size", "groups"),
    [(32, 0, (8, 8), 8), (64, 64, (4, 4), 8), (16, 8, (5, 3), 2), slow(8, 0, (40, 40), 2), slow(8, 8, (72, 72), 4)],
)
@pytest.mark.parametrize("dtype", with_large([torch.float32, torch.bfloat16], torch.float32))
def test_inputs_used_again(
    c1: int, c2: int, size: tuple[int, int], groups: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Outputs are those of the norm; gradients those of the norm and of the other uses."""
    case = Case(2, c1, size, groups, c2=c2)
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        tensors = require_grad({
            name: value.to(memory_format=torch.channels_last) if value.ndim == 4 else value
            for name, value in case.inputs(dtype, device).items()
        })  # fmt: skip
        if again:
            y, x, skip = norm_and_inputs(**tensors, groups=groups)
        else:
            y, x, skip = case.call(tensors), tensors["x"], tensors.get("skip")
        loss = (y.float() * torch.linspace(-1, 1, y.numel(), device=device).reshape(y.shape)).sum()
        for image in (x, skip):
            loss = loss if image is None else loss + image.float().square().sum()
        loss.backward()
        found.append([y, *(value.grad for value in tensors.values())])
    assert torch.equal(found[0][0], found[1][0])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found[1], found[0], rtol=tolerance, atol=tolerance)


def test_inputs_used_again_can_be_differentiated_in_any_way(device: torch.device) -> None:
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, device=device, requires_grad=True)
    skip = torch.randn(2, 2, 3, 3, dtype=torch.float64, device=device, requires_grad=True)
    weight, bias = (torch.randn(6, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))

    def energy(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor, again: bool = True) -> Tensor:
        if again:
            y, x, skip = norm_and_inputs(x, weight, bias, 2, skip=skip)  # type: ignore[assignment]
        else:
            y = group_norm_silu(x, weight, bias, 2, skip=skip)
        return y.sin().sum() + (x**3).sum() + (skip**3).sum()

    assert torch.autograd.gradgradcheck(energy, (x, skip, weight, bias))
    assert torch.allclose(energy(x, skip, weight, bias), energy(x, skip, weight, bias, False))
    ours = torch.func.grad(energy)(x, skip, weight, bias)
    torch.testing.assert_close(ours, torch.func.grad(energy)(x, skip, weight, bias, False))
    _, unused, _ = norm_and_inputs(x, weight, bias, 2, skip=skip)
    (gradient,) = torch.autograd.grad(unused.sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))


def test_eps(device: torch.device) -> None:
    """Its default is the paper's code's 1e-6, which shows where the variance is as small."""
    x = torch.randn(2, 8, 4, 4, device=device) * 1e-3
    one, zero = torch.ones(8, device=device), torch.zeros(8, device=device)
    for eps, arguments in ((1e-6, {}), (1e-4, {"eps": 1e-4})):
        y = group_norm_silu(x, one, zero, 4, **arguments, silu=False)
        np.testing.assert_allclose(contract.float64(y), oracle.group_norm(contract.float64(x), 4, eps), atol=1e-5)


GRADCHECKS = {
    "plain": ({}, ()),
    "skip, seam in a group": ({"c2": 2}, ()),
    "temb": ({}, ("temb",)),
    "scale and shift": ({}, ("affine",)),
    "no SiLU": ({}, ("linear",)),
    "all": ({"c2": 2}, ("temb", "affine")),
}


@pytest.mark.large
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("name", GRADCHECKS)
@pytest.mark.parametrize("fast", [True, slow(False)])  # along random directions, or every derivative alone
def test_gradcheck(fast: bool, name: str, dropout: float, device: torch.device) -> None:
    """Analytic against numerical derivatives in float64; dropout's mask is fixed by its key."""
    sizes, options = GRADCHECKS[name]
    case = Case(2, 4, (2, 3), 2, **sizes, options=options)
    tensors = require_grad(case.inputs(torch.float64, device))
    key = contract.key_tensors([5, 9], 1, 2, device) if dropout else {}

    def function(*values: Tensor) -> Tensor:
        named: dict[str, Any] = dict(zip(tensors, values, strict=True))
        return group_norm_silu(**named, groups=2, silu="linear" not in options, dropout=dropout, **key, layer=3)

    assert torch.autograd.gradcheck(function, tuple(tensors.values()), fast_mode=fast)


@pytest.mark.large
def test_backward_is_deterministic(device: torch.device) -> None:
    case = CASES["seam, all options"]
    tensors = require_grad(case.inputs(torch.float32, device))
    y = case.call(tensors)
    grad = torch.randn_like(y)
    runs = [list(gradients(case.call(tensors), tensors, grad).values()) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_nan_stays_in_its_group(device: torch.device) -> None:
    x = torch.randn(2, 8, 3, 3, device=device)
    x[1, 5, 0, 0] = torch.nan
    y = group_norm_silu(x, torch.ones(8, device=device), torch.zeros(8, device=device), 4)
    spoilt = torch.isnan(y).all((2, 3))
    assert spoilt.nonzero().tolist() == [[1, 4], [1, 5]] and torch.isnan(y).sum() == 2 * 9


def test_empty_batch(device: torch.device) -> None:
    case = Case(0, 8, (4, 4), 3, c2=4, options=("temb", "affine"))
    tensors = require_grad(case.inputs(torch.float32, device))
    key = contract.key_tensors([], 0, 0, device)
    for arguments in ({}, {"dropout": 0.5, **key}):
        y = group_norm_silu(**tensors, groups=3, **arguments)
        y.sum().backward()
        assert y.shape == (0, 12, 4, 4)
    assert all(tensor.grad.shape == tensor.shape for tensor in tensors.values())
    assert not tensors["weight"].grad.any()


OPCHECKS = {
    "plain": (Case(2, 8, (3, 4), 4), "contiguous", torch.float32),
    "all, channels_last": (Case(2, 4, (3, 4), 2, c2=2, options=("temb", "affine")), "channels_last", torch.float32),
    "all, bfloat16, sliced": (Case(2, 4, (3, 4), 2, c2=2, options=("temb",)), "sliced", torch.bfloat16),
    "one channel": (Case(2, 1, (3, 4), 1), "channels_last", torch.float32),
    "1x1 image": (Case(2, 4, (1, 1), 2, c2=2), "channels_last", torch.float32),
}


@pytest.mark.large
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", ["plain", "all, channels_last", *map(slow, [*OPCHECKS][2:])])
def test_opcheck(name: str, dropout: float, device: torch.device) -> None:
    case, layout, dtype = OPCHECKS[name]
    tensors = case.inputs(dtype, device)
    for image in {"x", "skip"} & set(tensors):
        tensors[image] = contract.LAYOUTS[layout](tensors[image])
    key = contract.key_tensors([3, 4], 5, 6, device) if dropout else {"images": None, "seed": None, "step": None}
    x, weight, bias = tensors["x"], tensors["weight"], tensors["bias"]
    optional = [tensors.get(name) for name in ("skip", "temb", "scale", "shift")]
    tail = [True, dropout, *key.values(), 2]
    _, mean, rstd = torch.ops.fastddpm.group_norm_silu(x, weight, bias, case.groups, 1e-6, *optional, *tail)
    grad = torch.randn(case.n, case.c1 + case.c2, *case.size, device=device).to(dtype)
    contract.opcheck(
        torch.ops.fastddpm.group_norm_silu_backward,
        (grad, x, weight, bias, mean, rstd, case.groups, *optional, *tail, None, None),
    )
    differentiable = [
        None if value is None else value.detach().requires_grad_() for value in (x, weight, bias, *optional)
    ]
    contract.opcheck(
        torch.ops.fastddpm.group_norm_silu, (*differentiable[:3], case.groups, 1e-6, *differentiable[3:], *tail)
    )


@pytest.mark.large
def test_compiles_with_a_dynamic_batch(device: torch.device) -> None:
    """Concatenation, time embedding and dropout, forward and backward, in one graph."""

    def arguments(n: int) -> tuple[list[Tensor], list[Tensor]]:
        torch.manual_seed(n)
        tensors = require_grad(Case(n, 4, (4, 4), 2, c2=2, options=("temb",)).inputs(torch.float32, device))
        key = contract.key_tensors(range(n), 1, 2, device)
        batched = [tensors["x"], tensors["skip"], tensors["temb"], key["images"]]
        return batched, [tensors["weight"], tensors["bias"], key["seed"], key["step"]]

    def function(x: Tensor, skip: Tensor, temb: Tensor, images: Tensor, *rest: Tensor) -> Tensor:
        weight, bias, seed, step = rest
        y = group_norm_silu(
            x * 2, weight, bias, 2, skip=skip, temb=temb, dropout=0.5, images=images, seed=seed, step=step
        )
        return y + 1

    contract.assert_compiles_for_any_batch(function, arguments, [2, 3, 5])


def valid_arguments() -> dict[str, Any]:
    return {"x": torch.zeros(2, 4, 3, 3), "weight": torch.ones(4), "bias": torch.zeros(4), "groups": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4, 3)}, r"x must be floating \(N, C, H, W\); got torch.float32 \(2, 4, 3\)"),
        ({"x": torch.zeros(2, 4, 3, 3, dtype=torch.uint8)}, r"x must be floating .* got torch.uint8 \(2, 4, 3, 3\)"),
        ({"skip": torch.zeros(2, 4, 3, 2)},
         r"skip must match x in all but channels; x is .* \(2, 4, 3, 3\), skip is .* \(2, 4, 3, 2\)"),
        ({"skip": torch.zeros(2, 4, 3, 3, dtype=torch.float64)}, "skip must match x .* skip is torch.float64"),
        ({"groups": 3}, "4 channels do not split into 3 groups"),
        ({"groups": 0}, "4 channels do not split into 0 groups"),
        ({"skip": torch.zeros(2, 1, 3, 3)}, "5 channels do not split into 2 groups"),
        ({"weight": torch.ones(5)}, r"weight must be \(4,\); got \(5,\)"),
        ({"bias": torch.ones(4, 1)}, r"bias must be \(4,\); got \(4, 1\)"),
        ({"temb": torch.ones(1, 4)}, r"temb must be \(2, 4\); got \(1, 4\)"),
        ({"scale": torch.ones(2, 3), "shift": torch.ones(2, 4)}, r"scale must be \(2, 4\); got \(2, 3\)"),
        ({"scale": torch.ones(2, 4)}, "scale and shift go together; only one was given"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\); got 1.0"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\); got -0.1"),
        ({"dropout": 0.1}, "dropout needs images, seed and step, from which its mask is drawn"),
        ({"dropout": 0.1, **contract.key_tensors([1, 2, 3], 0, 0, torch.device("cpu"))},
         r"images must be \(2,\); got \(3,\)"),
        ({"dropout": 0.1, **contract.key_tensors([1, 2], 0, 0, torch.device("cpu")), "seed": torch.tensor(0.0)},
         "seed must be a 0-d int64 tensor; got torch.float32"),
    ],
)  # fmt: skip
def test_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="group_norm_silu: " + message):
        group_norm_silu(**(valid_arguments() | change))
