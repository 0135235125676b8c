"""The small digit classifier whose features score the embedded digits host."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class DigitClassifier(nn.Module):
    """Convolutional classifier of 28 × 28 grey digits with a 64-wide feature layer.

    `features` are the linear outputs before the last activation, so that a Gaussian describes them well.
    """

    FEATURES = 64

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 24, 3, padding=1)
        self.conv2 = nn.Conv2d(24, 48, 3, padding=1)
        self.conv3 = nn.Conv2d(48, 96, 3, padding=1)
        self.norm1, self.norm2, self.norm3 = nn.BatchNorm2d(24), nn.BatchNorm2d(48), nn.BatchNorm2d(96)
        self.embed = nn.Linear(96 * 9, self.FEATURES)
        self.head = nn.Linear(self.FEATURES, 10)

    def features(self, images: Tensor) -> Tensor:
        """Images `[B, 1, 28, 28]` in −1..1 to features `[B, 64]`."""
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(images))), 2)
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        x = F.max_pool2d(F.relu(self.norm3(self.conv3(x))), 2)
        return self.embed(x.flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        """Images `[B, 1, 28, 28]` in −1..1 to logits `[B, 10]`."""
        return self.head(F.relu(self.features(images)))
