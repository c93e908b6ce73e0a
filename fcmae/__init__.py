"""Masked self-supervised pretraining of ConvNeXt V2 (FCMAE, arXiv 2301.00808) in PyTorch."""

from importlib.metadata import version

__version__ = version("fcmae")
