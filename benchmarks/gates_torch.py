"""The gated networks in PyTorch, for `gates.py`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Gate(nn.Module):
    """Gates on features: `max(tanh(mu + beta), 0)` of each channel."""

    def __init__(self, n: int):
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("mu", 5 * torch.arange(1, n + 1) / n)

    def forward(self, x: Any) -> Any:
        """The features times their gates."""
        gates = torch.relu(torch.tanh(self.mu + self.beta))
        return x * gates.reshape(1, -1, *[1] * (x.ndim - 2))


def _gate(n: int, gates: bool) -> nn.Module:
    return Gate(n) if gates else nn.Identity()


class Bottleneck(nn.Module):
    """A pre-activation bottleneck."""

    def __init__(self, inputs: int, n: int, stride: int, first: bool, gates: bool):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in (inputs, n, n))
        self.convs = nn.ModuleList([
            nn.Conv2d(inputs, n, 1, bias=False),
            nn.Conv2d(n, n, 3, stride, 1, bias=False),
            nn.Conv2d(n, 4 * n, 1, bias=False),
        ])  # fmt: skip
        self.gates = nn.ModuleList(_gate(c, gates) for c in (n, n, 4 * n))
        self.shortcut = nn.Conv2d(inputs, 4 * n, 1, stride, bias=False) if first else nn.Identity()

    def forward(self, x: Any) -> Any:
        """The features of the next block."""
        y = x
        for norm, conv, gate in zip(self.norms, self.convs, self.gates, strict=True):
            y = gate(conv(torch.relu(norm(y))))
        return y + self.shortcut(x)


def _preresnet20(gates: bool) -> nn.Module:
    parts: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), _gate(16, gates)]
    inputs = 16
    for stage, n in enumerate((16, 32, 64)):
        for block in range(2):
            stride = 2 if stage and not block else 1
            parts.append(Bottleneck(inputs, n, stride, not block, gates))
            inputs = 4 * n
    pool = [nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*parts, *pool, nn.Linear(inputs, 10))


def _lenet5(gates: bool) -> nn.Module:
    return nn.Sequential(
        nn.ZeroPad2d(2),
        *(nn.Conv2d(1, 6, 5), _gate(6, gates), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), _gate(16, gates), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), _gate(120, gates), nn.ReLU()),
        *(nn.Linear(120, 84), _gate(84, gates), nn.ReLU(), nn.Linear(84, 10)),
    )


def step(network: str, x: Any, y: Any, *, gates: bool, penalty: float) -> Callable[[], Any]:
    """A training step on images `(n, height, width, channels)`."""
    model = {"preresnet20": _preresnet20, "lenet5": _lenet5}[network](gates)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    images, labels = torch.as_tensor(x).movedim(-1, 1).contiguous(), torch.as_tensor(y)
    offsets = [module.beta for module in model.modules() if isinstance(module, Gate)]

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(model(images), labels)
        if offsets:
            loss = loss + penalty * torch.stack(offsets).mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return run
