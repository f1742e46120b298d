"""Networks that are no UNet."""

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """Takes (x_t, t) and says nothing about itself. Has what makes saving hard: see `awkward`."""

    def __init__(self, pixels: int = 4, width: int = 16, *, awkward: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(pixels + 1, width)
        self.middle = nn.Linear(width, width)
        self.last = nn.Linear(width, pixels)
        self.dropout = nn.Dropout(0.3 if awkward else 0.0)
        self.register_buffer("scale", torch.tensor(0.002))
        if awkward:
            self.again = self.middle  # shared between two layers
            self.first.bias.requires_grad_(False)
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        if hasattr(self, "calls") and self.training:
            self.calls += 1
        time = (t * self.scale).to(x_t.dtype).unsqueeze(1)
        h = torch.tanh(self.first(torch.cat([x_t.flatten(1), time], 1)))
        h = self.dropout(torch.tanh(self.middle(h)))
        if hasattr(self, "again"):
            h = torch.tanh(self.again(h))
        return self.last(h).reshape(x_t.shape)


class ByClass(MLP):
    """Takes (x_t, t, label)."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.rows = nn.Embedding(classes + 1, 4)

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x_t, t) + self.rows(label).reshape(x_t.shape)
