#!/usr/bin/env python
"""Train a small convolutional network on scikit-learn's handwritten digits, on any number of ranks."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from _options import make_parser
from _training import Task, run
from torch import nn

import heatopt

LEARNING_RATES = {"AdamW": 2e-3, "SGD": 0.1, "Muon": 0.02}


class DigitNet(nn.Module):
    """Three convolutions and two linear layers.

    Group norm looks at one image at a time: unlike batch norm it does not depend on how a batch is cut.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *self._block(1, 32),
            *self._block(32, 64),
            nn.MaxPool2d(2),
            *self._block(64, 64),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(256, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    @staticmethod
    def _block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.ReLU()]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)


def make_task() -> Task:
    """The 1,797 images of 8 x 8 pixels, a fifth of them for the test."""
    # Imported late: a wrong option is reported at once.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    train_images, test_images = (torch.from_numpy(x).reshape(-1, 1, 8, 8) / 16 for x in split[:2])
    train_labels, test_labels = (torch.from_numpy(y) for y in split[2:])
    return Task("handwritten digits", DigitNet(), train_images, train_labels, test_images, test_labels)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script."""
    parser = make_parser(
        "Train a small convolutional network on scikit-learn's handwritten digits.",
        heatopt.world(),
        epochs=20,
        batch_size=64,
        learning_rates=LEARNING_RATES,
        out="runs/digits",
    )
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("sklearn") is None:
        parser.error("the images come with scikit-learn, which is not installed")
    run(parser, options, make_task, LEARNING_RATES)


if __name__ == "__main__":
    main()
