"""The networks of `convolutions.py` and `training.py` in PyTorch."""

import os
from collections.abc import Callable
from typing import Any

import gates_torch
import torch
from torch import nn


class Block(nn.Module):
    """A basic block of a ResNet with shortcuts A."""

    def __init__(self, inputs: int, n: int, stride: int):
        super().__init__()
        self.missing, self.stride = n - inputs, stride
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, n, 3, stride, 1, bias=False), nn.BatchNorm2d(n), nn.ReLU()),
            *(nn.Conv2d(n, n, 3, 1, 1, bias=False), nn.BatchNorm2d(n)),
        )

    def forward(self, x: Any) -> Any:
        """The features of the next block."""
        shortcut = x[:, :, :: self.stride, :: self.stride]
        shortcut = nn.functional.pad(shortcut, (0, 0, 0, 0, 0, self.missing))
        return torch.relu(self.body(x) + shortcut)


def _resnet20() -> nn.Module:
    parts: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    inputs = 16
    for n in (16, 32, 64):
        for block in range(3):
            parts.append(Block(inputs, n, 2 if n > inputs and not block else 1))
            inputs = n
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def _vgg19() -> nn.Module:
    parts, inputs = [], 3
    for stage, (n, count) in enumerate(((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))):
        parts += [nn.MaxPool2d(2)] if stage else []
        for _ in range(count):
            layer = nn.Conv2d(inputs, n, 3, 1, 1, bias=False)
            parts += [layer, nn.BatchNorm2d(n), nn.ReLU()]
            inputs = n
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def _lenet5_caffe() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10)),
    )


def _lenet_300_100() -> nn.Module:
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU()),
        nn.Linear(100, 10),
    )


_MODELS = {
    "resnet20": _resnet20, "vgg19": _vgg19, "lenet5_caffe": _lenet5_caffe,
    "lenet_300_100": _lenet_300_100,
}  # fmt: skip
NETWORKS = (*_MODELS, "preresnet20", "lenet5")
"""What `step` knows."""


def step(network: str, x: Any, y: Any) -> Callable[[], Any]:
    """A training step on images `(n, height, width, channels)`."""
    if threads := os.environ.get("NPROC"):
        torch.set_num_threads(int(threads))
    if network not in _MODELS:
        return gates_torch.step(network, x, y, gates=False, penalty=0.0)
    model = _MODELS[network]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    images, labels = torch.as_tensor(x).movedim(-1, 1).contiguous(), torch.as_tensor(y)

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return run
