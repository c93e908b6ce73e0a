"""Masked self-supervised pretraining of ConvNeXt V2 (FCMAE, arXiv 2301.00808) in PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fcmae.api import export, finetune, load, masked_loss, pretrain, prune, segment

__version__ = "0.1.0"
__all__ = ["__version__", "export", "finetune", "load", "masked_loss", "pretrain", "prune", "segment"]


if not TYPE_CHECKING:  # a type checker would take every name for one that is here

    def __getattr__(name: str) -> object:
        """What is in `fcmae.api`, which imports torch, when it is first asked for."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from fcmae import threads

        threads.prepare()  # before torch is loaded

        from fcmae import api

        return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
