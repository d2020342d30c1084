"""The four workloads of the step benchmark: models of different shapes, with their optimizers and data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["WORKLOADS", "Workload"]


@dataclass(frozen=True)
class Workload:
    """A model, what trains it, and one local batch."""

    name: str
    make_model: Callable[[], nn.Module]
    make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    make_batch: Callable[[torch.Generator], torch.Tensor]

    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        """Any scalar whose gradient reaches all parameters."""
        return model(batch).float().square().mean()


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut, as in ResNet-18, with group norm, which small batches need."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.GroupNorm(8, outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.GroupNorm(8, outputs),
        )
        changes = stride != 1 or inputs != outputs
        self.side = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.main(x) + self.side(x))


def resnet18_like() -> nn.Module:
    """11.2 million parameters, for images of 32 x 32."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.GroupNorm(8, 64), nn.ReLU()]
    width = 64
    for outputs, stride in ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)):
        layers.append(ResidualBlock(width, outputs, stride))
        width = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 100))


class SmallGPT(nn.Module):
    """6 pre-norm transformer blocks of width 384, vocabulary of 20,000, untied output: 26 million parameters."""

    def __init__(self, vocabulary: int = 20_000, width: int = 384, depth: int = 6, heads: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.output = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.output(self.blocks(self.embedding(tokens), mask=mask, is_causal=True))


def many_small() -> nn.Module:
    """200 Linear layers of 64 x 64: 400 tensors."""
    return nn.Sequential(*(layer for _ in range(200) for layer in (nn.Linear(64, 64), nn.Tanh())))


def wide_mlp() -> nn.Module:
    """Three Linear layers of 4096 x 4096: 50 million parameters in 6 tensors."""
    return nn.Sequential(nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 4096))


def _floats(*shape: int) -> Callable[[torch.Generator], torch.Tensor]:
    return lambda generator: torch.randn(*shape, generator=generator)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("many-small", many_small, lambda p: torch.optim.AdamW(p, lr=1e-4), _floats(64, 64)),
        Workload("resnet18", resnet18_like, lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9), _floats(2, 3, 32, 32)),
        Workload(
            "gpt",
            SmallGPT,
            lambda p: torch.optim.AdamW(p, lr=1e-4),
            lambda generator: torch.randint(20_000, (1, 64), generator=generator),
        ),
        Workload("wide-mlp", wide_mlp, lambda p: torch.optim.Adam(p, lr=1e-5), _floats(16, 4096)),
    )
}
