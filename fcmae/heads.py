"""What is put on an encoder's output for a task."""

from __future__ import annotations

from torch import Tensor, nn

from fcmae.networks.convnext import init_weights
from fcmae.networks.encoder import StagedEncoder
from fcmae.networks.layers import LayerNorm


class Classifier(nn.Module):
    """Encoder -> mean over the image -> LayerNorm -> Linear: ConvNeXt's own classifier, GRN kept in place.

    Parameters are encoder.*, norm.*, head.*. Networks before ConvNeXt have no norm there, as their spec says.

    Args:
        encoder: dense, on whole images.
        num_classes: outputs.
        head_init_scale: factor on the Linear's first weights; .001 for an encoder that was trained, 1 from scratch.
    """

    def __init__(self, encoder: StagedEncoder, num_classes: int, head_init_scale: float = 1.0) -> None:
        super().__init__()
        self.encoder = encoder
        self.norm = LayerNorm(encoder.dim) if encoder.spec.has_final_norm else nn.Identity()
        self.head = nn.Linear(encoder.dim, num_classes)
        self.head.apply(init_weights)
        self.head.weight.data.mul_(head_init_scale)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of normalised images (B, in_chans, H, W)."""
        pooled = self.encoder(images).mean((1, 2))  # (B, dim)
        logits: Tensor = self.head(self.norm(pooled))
        return logits
