"""The options that other implementations' networks have: outputs and gradients against a second forward in float64."""

import copy

import pytest
import torch
from helpers.architectures import ALL, reference
from helpers.engines import arguments, network, relative_error
from torch import Tensor

from fastddpm import ops
from fastddpm.unet import UNet


@pytest.mark.parametrize("name", ALL)
def test_outputs_and_gradients(name: str) -> None:
    """Of every parameter: in float64 to rounding, and in float32 by the kernels of this machine."""
    unet = network(ALL[name])
    x_t, t, label = arguments(2, ALL[name])
    weights = {key: tensor.detach().double().requires_grad_() for key, tensor in unet.named_parameters()}
    out = reference(ALL[name], weights, x_t, t, label)
    direction = torch.randn_like(out)
    (out * direction).sum().backward()
    gradients = {key: tensor.grad for key, tensor in weights.items() if tensor.grad is not None}
    assert gradients.keys() == weights.keys()

    def check(ours: UNet, x_t: Tensor, tolerance: float) -> None:
        found = ours(x_t, t, label)
        assert relative_error(found.detach(), out.detach()) < tolerance / 10
        (found.double() * direction).sum().backward()
        largest = max(float(gradient.norm()) for gradient in gradients.values())
        for key, parameter in ours.named_parameters():
            error = float((parameter.grad.double() - gradients[key]).norm())
            assert error <= tolerance * (float(gradients[key].norm()) + 1e-3 * largest), key

    with ops.use_backend("reference"):
        check(copy.deepcopy(unet).double(), x_t.double(), 1e-12)
    check(unet, x_t, 1e-4)
