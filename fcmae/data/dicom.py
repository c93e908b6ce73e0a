"""The pixels of a DICOM file, by pydicom. Nothing else of it is looked at: no name, no date, no patient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fcmae.data.arrays import ArrayImage
from fcmae.data.source import BadImage, OtherChannels

COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")  # pydicom makes RGB of all
DEFLATED = b"1.2.840.10008.1.2.1.99"  # a transfer syntax


def open_dicom(file: BinaryIO, in_chans: int) -> ArrayImage:
    """Read a file's header; several frames are channels.

    Values are those of the modality, by RescaleSlope and RescaleIntercept, such as Hounsfield units, in float32;
    without these, unsigned ones of up to 16 bits are shares of their full range, inverted where 0 is white
    (MONOCHROME1), and others as stored; units do not depend on how they are shown.

    Args:
        file: at its start.
        in_chans: see `fcmae.data.decode.read_crop`.

    Raises:
        BadImage: if pydicom is not installed, or the pixels are of a kind that is not read; what pydicom raises else.
    """
    if find_spec("pydicom") is None:
        raise BadImage("it is DICOM, which needs pydicom: pip install 'fcmae[dicom]'")
    with _bad_lengths():
        return _open(file, in_chans)


@contextmanager
def _bad_lengths() -> Iterator[None]:
    """What pydicom raises of an element whose length is none of its type, which is nothing that Python has."""
    from pydicom.errors import BytesLengthException

    try:
        yield
    except BytesLengthException as error:
        raise BadImage(f"it is damaged ({error})") from error


def _open(file: BinaryIO, in_chans: int) -> ArrayImage:
    import pydicom

    if DEFLATED in file.read():  # all of it would be unpacked here, whatever that takes
        raise BadImage("it is DICOM that is deflated as a whole: save it again")
    file.seek(0)
    dataset = pydicom.dcmread(file)
    if "PixelData" not in dataset:  # such as reports and segmentations, beside the images of an archive
        raise BadImage(f"it is DICOM without an image (Modality {dataset.get('Modality')}): leave it out")
    kind, samples = dataset.PhotometricInterpretation, dataset.SamplesPerPixel
    frames = int(dataset.get("NumberOfFrames") or 1)
    if not (kind.startswith("MONOCHROME") and samples == 1) and not (kind in COLOURS and samples == 3 and frames == 1):
        raise BadImage(f"it is DICOM of {kind} with {frames} frames, and one image of RGB or frames of grey are read")
    if frames > 1 and in_chans in (1, 3) and frames != in_chans:  # three frames are no colours
        raise OtherChannels(frames, in_chans)
    shape: tuple[int, ...] = (dataset.Rows, dataset.Columns)
    channel_axis = 2 if samples == 3 else 0 if frames > 1 else None
    shape = (*shape, 3) if samples == 3 else (frames, *shape) if frames > 1 else shape
    dtype = np.dtype(f"{'i' if dataset.PixelRepresentation else 'u'}{max(1, dataset.BitsAllocated // 8)}")
    slope, intercept = _rescaling(dataset, frames)
    padding, load = _padding(dataset, dtype), _bad_lengths()(lambda: dataset.pixel_array)

    def rescaled(values: NDArray[Any]) -> NDArray[Any]:
        scaled: NDArray[np.float32] = values.astype(np.float32) * slope + intercept
        if padding is not None:
            scaled[(values >= padding[0]) & (values <= padding[1])] = np.nan  # of one frame too
        return scaled

    is_as_stored = (slope == 1).all() and (intercept == 0).all()
    return ArrayImage(
        load,
        shape,
        dtype,
        channel_axis,
        in_chans,
        bits=dataset.BitsStored,
        inverted=kind == "MONOCHROME1" and is_as_stored,
        nodata=padding,
        show=None if is_as_stored else rescaled,
    )


def _padding(dataset: Any, dtype: np.dtype[Any]) -> tuple[float, float] | None:
    """The first and the last of the stored values that stand for missing ones."""
    ends = [_stored(dataset.get(key), dtype) for key in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    if ends[0] is None:
        return None
    # Stored bits above BitsStored say nothing, and pydicom takes them from the pixels likewise.
    unused = dataset.BitsAllocated - dataset.BitsStored
    values = np.array([end for end in ends if end is not None], dtype) << unused >> unused
    return int(values.min()), int(values.max())


def _stored(value: Any, dtype: np.dtype[Any]) -> int | None:
    """A value of this type, which may be told as of its signed or unsigned twin; None if it is of neither."""
    twin = np.dtype(f"{'u' if dtype.kind == 'i' else 'i'}{dtype.itemsize}")
    for kind in (dtype, twin):
        if isinstance(value, int) and np.iinfo(kind).min <= value <= np.iinfo(kind).max:
            return int(np.array(value, kind).astype(dtype))
    return None


def _rescaling(dataset: Any, frames: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Slope and intercept of the stored values: of all of them, or (frames,)."""
    shared, each = (dataset.get(f"{which}FunctionalGroupsSequence") or [] for which in ("Shared", "PerFrame"))
    if len(each) == frames and all("PixelValueTransformationSequence" in group for group in each):
        transforms = [group.PixelValueTransformationSequence[0] for group in each]
    elif shared and "PixelValueTransformationSequence" in shared[0]:
        transforms = [shared[0].PixelValueTransformationSequence[0]]
    else:
        transforms = [dataset]
    usual = {"RescaleSlope": 1, "RescaleIntercept": 0}  # of a value that is there and empty, too
    values = ([plain if one.get(key) is None else one.get(key) for one in transforms] for key, plain in usual.items())
    slope, intercept = (np.array(row, np.float32).reshape(-1 if len(transforms) > 1 else ()) for row in values)
    return slope, intercept
