"""An encoder from its spec, with one line per kind of network."""

from __future__ import annotations

from fcmae.networks import container, convnext, roadmap
from fcmae.networks.encoder import StagedEncoder
from fcmae.networks.spec import ContainerSpec, ConvNeXtSpec, NetworkSpec, RoadmapSpec


def make_encoder(
    spec: NetworkSpec, in_chans: int = 3, drop_path_rate: float = 0.0, grad_checkpointing: bool = False
) -> StagedEncoder:
    """The encoder of a spec, its weights drawn from their starting distributions.

    Args:
        spec: the numbers of the network.
        in_chans: image channels.
        drop_path_rate: stochastic depth, rising linearly over the blocks to this.
        grad_checkpointing: recompute each block in backward instead of keeping its activations.
    """
    match spec:
        case ConvNeXtSpec():
            return convnext.Encoder(spec, in_chans, drop_path_rate, grad_checkpointing)
        case ContainerSpec():
            return container.Encoder(spec, in_chans, drop_path_rate, grad_checkpointing)
        case RoadmapSpec():
            return roadmap.Encoder(spec, in_chans, drop_path_rate, grad_checkpointing)
    raise AssertionError(f"{type(spec).__name__} has no encoder")
