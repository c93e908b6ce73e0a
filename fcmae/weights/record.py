"""What weights are and say of themselves: their network, how their images were read, their classes and origin.

Files that we write hold one `Record`, under RECORD: in the header of a .safetensors file, beside "model" in a .pth
file. It holds a SHA-256 of itself and the tensors, which reveals changed bytes, and the encoder's output on a fixed
image, so that a reader can check that it computes what the writer did.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, FiniteFloat, PositiveInt, ValidationError
from torch import Tensor

from fcmae.config import FinetuneData, usual_statistics
from fcmae.data.augment import Reading
from fcmae.data.geometry import MAX_SIDE
from fcmae.data.source import printable
from fcmae.networks.build import make_encoder
from fcmae.networks.spec import Spec
from fcmae.weights.formats import Architecture

USUAL = FinetuneData()  # how images are read for weights that do not say
Side = Annotated[int, Field(gt=0, le=MAX_SIDE)]


class ImageRecord(BaseModel, frozen=True):
    """How the images were read that weights were trained on, as far as is known.

    Attributes:
        mean: one per channel, in units of a full range of 1.
        std: one per channel, in the same units.
        input_size: (C, H, W), H and W up to 8192, so that a file cannot ask for pictures that take all memory.
        crop_pct: see `fcmae.data.augment.center_box`.
        nodata: the stored value that marked missing data, whatever the files stated.
    """

    mean: tuple[FiniteFloat, ...] | None = None
    std: tuple[Annotated[FiniteFloat, Field(gt=0)], ...] | None = None
    input_size: tuple[PositiveInt, Side, Side] | None = None
    crop_pct: Annotated[float, Field(gt=0, le=1)] | None = None
    nodata: FiniteFloat | None = None

    @classmethod
    def of(cls, reading: Reading) -> ImageRecord:
        """A record in which everything is known."""
        return cls(
            mean=reading.mean,
            std=reading.std,
            input_size=(reading.in_chans, *reading.image_size),
            crop_pct=reading.crop_pct,
            nodata=reading.nodata,
        )

    @property
    def in_chans(self) -> int | None:
        """Channels."""
        return None if self.input_size is None else self.input_size[0]

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width."""
        return None if self.input_size is None else self.input_size[1:]

    def known(self) -> dict[str, Any]:
        """What is known, as JSON has it."""
        return self.model_dump(mode="json", exclude_none=True)


@dataclass(frozen=True)
class Weights:
    """Weights under our names, and what is known of them.

    Attributes:
        state: encoder.*, and decoder.*, norm.*, head.* where present.
        architecture: the network that they belong to.
        image: how the images were read that they were trained on.
        class_names: of the head; numbers if the file names none.
        origin: what they were made from.
        expected_output: see `encoder_output`; empty if the file has none.
        format: the format of the file.
        names: maps our names to those in the file.
    """

    state: dict[str, Tensor]
    architecture: Architecture
    image: ImageRecord = field(default_factory=ImageRecord)
    class_names: tuple[str, ...] = ()
    origin: dict[str, Any] = field(default_factory=dict)
    expected_output: tuple[float, ...] = ()
    format: str = "fcmae"
    names: dict[str, str] = field(default_factory=dict)

    @property
    def are_published(self) -> bool:
        """Whether no run of ours made them."""
        return not {"run", "step"} & self.origin.keys()  # a page of the hub names no run

    @property
    def license(self) -> str | None:
        """The licence that their files state for them, or for the weights that they were made from."""
        said = self.origin.get("license")
        return printable(said)[:200] if isinstance(said, str) and said else None

    def reading(self, source: str, image_size: tuple[int, int] | None = None) -> Reading:
        """How images are read for the weights: as these state, otherwise as published.

        Args:
            source: name of the weights in errors.
            image_size: height and width; None is the weights' own.

        Raises:
            ValueError: if the mean and std of the channels are unknown, or the size is below the total stride.
        """
        in_chans, image = self.architecture.in_chans, self.image
        usual_mean, usual_std = usual_statistics(in_chans)
        mean, std = tuple(image.mean or usual_mean), tuple(image.std or usual_std)
        if len(mean) != in_chans:
            raise ValueError(
                f"{source} does not say the mean and std of its {in_chans} channels: pretrain or fine-tune from it "
                "with --data.mean and --data.std, and give that run"
            )
        size = image_size or image.size or USUAL.image_size
        if min(size) < (unit := self.architecture.spec.total_stride):
            raise ValueError(f"image_size: {list(size)} is smaller than the total stride {unit} of {source}: give more")
        return Reading(in_chans, size, image.crop_pct or USUAL.crop_pct, mean, std, nodata=image.nodata)


def licensed(known: str | None) -> dict[str, str]:
    """The entry of a record for a licence, or none where none is known."""
    return {} if known is None else {"license": known}


class Record(BaseModel):
    """What a file of weights states about itself; empty for files that we did not write.

    Attributes:
        image: how its images are read.
        class_names: see `Weights`.
        origin: see `Weights`.
        expected_output: see `Weights`.
        spec: the encoder's numbers, if the file has them.
        sha256: see `fcmae.weights.tensors.digest`; earlier exports have none.
    """

    image: ImageRecord = ImageRecord()
    class_names: tuple[str, ...] = ()
    origin: dict[str, Any] = {}
    expected_output: tuple[float, ...] = ()
    spec: Spec | None = None
    sha256: str | None = None


def first_problem(error: Exception) -> str:
    """An error in one line; of pydantic's errors, whose text shows all of the input, only the first."""
    if isinstance(error, ValidationError):
        wrong = error.errors()[0]
        return f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}"
    return " ".join(str(error).split())


@torch.no_grad()
def encoder_output(weights: Weights) -> tuple[float, ...]:
    """The encoder's output on a fixed image with nothing masked: 16 of its channels, averaged over the image.

    The image, (1, C, 2s, 2s) at total stride s, is sin(i) at its i-th value in row-major order. Every weight of the
    encoder takes part, so a damaged, renamed or transposed one shows; except, in V1, those of blocks that LayerScale
    still multiplies by 1e-6.
    """
    architecture = weights.architecture
    with torch.device("meta"):
        encoder = make_encoder(architecture.spec, architecture.in_chans)
    state = {k.removeprefix("encoder."): v for k, v in weights.state.items() if k.startswith("encoder.")}
    # The mapped tensors become the parameters: huge has 2.6 GB of them.
    encoder.load_state_dict(state, assign=True)
    encoder.float().eval()
    side = 2 * encoder.total_stride
    values = torch.arange(encoder.in_chans * side * side, dtype=torch.float64).sin()
    image = values.view(1, encoder.in_chans, side, side)
    features = encoder(image.float()).mean((0, 1, 2))
    output: list[float] = features[:: max(1, encoder.dim // 16)][:16].tolist()
    return tuple(output)
