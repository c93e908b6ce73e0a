"""The one place that knows the mean and the deviation of the channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """Images as a network takes them: (images - mean) / std, channel by channel.

    Attributes:
        mean, std: buffers (C, 1, 1) float32, which move with the module and are in no state dict.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Make it for C channels.

        Args:
            mean: (C,), in units of a full range of 1.
            std: (C,), likewise.
        """
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalise images; those of uint8 are divided by 255.

        Args:
            images: (B, C, H, W) or (C, H, W), uint8 or float, on the module's device.

        Returns:
            A new tensor of their shape, float32.
        """
        mean, std = self.mean, self.std
        if images.dtype == torch.uint8:
            mean, std = mean * 255, std * 255
        # One buffer: on a CPU, memory that is new to the process takes most of the time.
        return images.to(torch.float32, copy=True).sub_(mean).div_(std)

    def inverse(self, images: Tensor) -> Tensor:
        """What was normalised, as float32 in units of a full range of 1; shapes as in `forward`."""
        return images.float() * self.std + self.mean
