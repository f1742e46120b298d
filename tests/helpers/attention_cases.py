"""Shapes for attention, and the float64 numbers to expect."""

import numpy as np
import torch
from torch import Tensor

SHAPES = {
    "cifar 16x16": (2, 256, 256),
    "256x256 model, middle 8x8": (1, 64, 512),
    "middle 4x4, fewer tokens than any tile": (3, 16, 256),
    "odd tokens and channels, no multiple of a tile": (2, 49, 24),
    "one token": (2, 1, 8),
    "one channel": (1, 5, 1),
    "wide": (1, 9, 768),
}


def inputs(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, sharpness: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(shape, dtype=torch.float64).to(device, dtype) for _ in range(3))
    return q * sharpness, k, v


def low_precision(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same maths with every intermediate in the inputs' dtype."""
    return torch.softmax(q @ k.transpose(1, 2) * q.shape[-1] ** -0.5, dim=-1) @ v


def expected_gradients(q: np.ndarray, k: np.ndarray, v: np.ndarray, grad: np.ndarray) -> tuple[np.ndarray, ...]:
    """Through v, then the softmax's Jacobian diag(p) - p p^T row by row, then q k^T."""
    scale = q.shape[-1] ** -0.5
    scores = np.einsum("nic,njc->nij", q, k) * scale
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    grad_p = np.einsum("nic,njc->nij", grad, v)
    grad_scores = p * (grad_p - (p * grad_p).sum(-1, keepdims=True)) * scale
    return (
        np.einsum("nij,njc->nic", grad_scores, k),
        np.einsum("nij,nic->njc", grad_scores, q),
        np.einsum("nij,nic->njc", p, grad),
    )
