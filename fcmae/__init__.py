"""Masked self-supervised pretraining of ConvNeXt V2 (FCMAE, arXiv 2301.00808) in PyTorch."""

__version__ = "0.1.0"
