"""DICOM files that pydicom writes, against the arrays that they were made of."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fcmae.data import dicom
from fcmae.data.decode import read_crop
from fcmae.data.rasters import LabelMap
from fcmae.data.source import BadImage

pydicom = pytest.importorskip("pydicom")

RNG = np.random.default_rng(0)
H, W = 12, 17
GREY = RNG.integers(0, 256, (H, W), dtype=np.uint8)
DEEP = RNG.integers(0, 2**12, (H, W), dtype=np.uint16)
COLOURS = RNG.integers(0, 256, (H, W, 3), dtype=np.uint8)


def whole(height: int, width: int) -> tuple[int, int, int, int]:
    return 0, 0, height, width


def written(array: NDArray[Any], *, packed: bool = False, **values: Any) -> bytes:
    """A file of one grey image, of colours (H, W, 3), or of several frames (N, H, W)."""
    found = pydicom.Dataset()
    found.file_meta = pydicom.dataset.FileMetaDataset()
    found.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    found.SOPClassUID = found.file_meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    found.SOPInstanceUID = found.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    is_colour = array.shape[-1] == 3
    found.Rows, found.Columns = array.shape[:2] if is_colour else array.shape[-2:]
    found.SamplesPerPixel = 3 if is_colour else 1
    found.PhotometricInterpretation = "RGB" if is_colour else "MONOCHROME2"
    if is_colour:
        found.PlanarConfiguration = 0
    if array.ndim == 3 and not is_colour:
        found.NumberOfFrames = len(array)
    found.BitsAllocated = found.BitsStored = 8 * array.itemsize
    found.PixelRepresentation = int(array.dtype.kind == "i")
    found.PixelData = array.tobytes() + b"\0" * (array.nbytes % 2)
    found["PixelData"].VR = "OB" if array.itemsize == 1 else "OW"
    for key, value in values.items():
        setattr(found, key, value)
    found.HighBit = found.BitsStored - 1
    if packed:
        found.compress(pydicom.uid.RLELossless)
    file = io.BytesIO()
    found.save_as(file, enforce_file_format=True)
    return file.getvalue()


@pytest.mark.parametrize("packed", [False, True])
def test_8_bits_are_read_as_they_are_stored(packed: bool) -> None:
    np.testing.assert_array_equal(read_crop(written(GREY, packed=packed), 1, whole, None).values[0], GREY)
    np.testing.assert_array_equal(
        read_crop(written(COLOURS, packed=packed), 3, whole, None).values.transpose(1, 2, 0), COLOURS
    )
    assert read_crop(written(GREY), 3, whole, None).values.shape == (3, H, W)


def test_deep_values_are_shares_of_their_range_and_1_begins_with_white() -> None:
    found = read_crop(written(DEEP, BitsStored=12), 1, whole, None).values
    np.testing.assert_allclose(found[0], DEEP / 4095, rtol=1e-6)
    inverted = read_crop(written(DEEP, BitsStored=12, PhotometricInterpretation="MONOCHROME1"), 1, whole, None).values
    np.testing.assert_allclose(inverted[0], 1 - DEEP / 4095, atol=1e-6)
    inverted = read_crop(written(GREY, PhotometricInterpretation="MONOCHROME1"), 1, whole, None).values
    np.testing.assert_array_equal(inverted[0], 255 - GREY)


def test_values_of_the_modality_are_its_units_and_padding_is_missing() -> None:
    stored = DEEP.astype(np.int16)
    stored[:3] = -2000
    content = written(stored, RescaleSlope=2, RescaleIntercept=-1024, PixelPaddingValue=-2000)
    found = read_crop(content, 1, whole, None, fill=[5.0])
    np.testing.assert_array_equal(found.values[0, 3:], stored[3:] * 2.0 - 1024)
    assert (found.values[0, :3] == 5).all()
    assert found.known is not None and not found.known[0, :3].any() and found.known[0, 3:].all()
    plain = read_crop(written(stored, PixelPaddingValue=-2000), 1, whole, None, fill=[5.0])
    np.testing.assert_array_equal(plain.values[0, 3:], stored[3:])
    assert plain.known is not None and not plain.known[0, :3].any()


def test_padding_that_is_told_as_unsigned_is_missing_too() -> None:
    stored = DEEP.astype(np.int16)
    stored[:3] = -2000
    content = written(stored, RescaleIntercept=-1024, PixelPaddingValue=-2000)
    told = pydicom.dcmread(io.BytesIO(content))
    told["PixelPaddingValue"].VR = "US"
    told.PixelPaddingValue = 2**16 - 2000
    file = io.BytesIO()
    told.save_as(file, enforce_file_format=True)
    found = read_crop(file.getvalue(), 1, whole, None, fill=[5.0])
    assert found.known is not None and not found.known[0, :3].any() and (found.values[0, :3] == 5).all()


def test_bits_above_those_stored_say_nothing_of_padding_either() -> None:
    stored = DEEP.copy()
    stored[stored == 2**16 - 2000 & 2**12 - 1] = 0  # what pydicom makes of the padding
    stored[:3] = 2**16 - 2000
    content = written(stored, BitsStored=12, RescaleIntercept=-1024, PixelPaddingValue=2**16 - 2000)
    found = read_crop(content, 1, whole, None, fill=[5.0])
    assert found.known is not None
    np.testing.assert_array_equal(found.known[0], stored != 2**16 - 2000)
    np.testing.assert_array_equal(found.values[0, 3:], stored[3:] - 1024.0)


def test_dicom_without_an_image_is_told_as_such() -> None:
    report = pydicom.dcmread(io.BytesIO(written(GREY, Modality="SR")))
    del report.PixelData
    file = io.BytesIO()
    report.save_as(file, enforce_file_format=True)
    with pytest.raises(BadImage, match=r"it is DICOM without an image \(Modality SR\): leave it out"):
        read_crop(file.getvalue(), 1, whole, None)


def test_a_label_map_that_is_dicom_is_told_as_such() -> None:
    with pytest.raises(BadImage, match="it is DICOM, and label maps are PNG, TIFF or"):
        LabelMap(io.BytesIO(written(GREY)))


def retold(content: bytes, **values: tuple[str, int]) -> bytes:
    """The same file with other elements: their type and value."""
    told = pydicom.dcmread(io.BytesIO(content))
    for key, (kind, value) in values.items():
        told.add_new(key, kind, value)
    file = io.BytesIO()
    told.save_as(file, enforce_file_format=True)
    return file.getvalue()


@pytest.mark.parametrize("slope", [1, 2])
@pytest.mark.parametrize(
    ("array", "kind", "padding", "missing"),
    [
        (DEEP, "SS", -2000, 2**16 - 2000),
        (GREY, "SS", -1, 255),
        (GREY, "US", 2**16 - 1, None),
        (GREY.astype(np.int8), "US", 300, None),
        (GREY.astype(np.int8), "US", 200, 200 - 256),
    ],
)
def test_padding_that_the_type_cannot_hold_is_its_twin_or_nothing(
    array: NDArray[Any], kind: str, padding: int, missing: int | None, slope: int
) -> None:
    stored = array.copy()
    stored[:3] = 7 if missing is None else missing
    content = retold(written(stored, RescaleSlope=slope), PixelPaddingValue=(kind, padding))
    found = read_crop(content, 1, whole, None, fill=[5.0])
    if missing is None:
        assert found.known is None
    else:
        assert found.known is not None
        np.testing.assert_array_equal(found.known[0], stored != missing)


@pytest.mark.parametrize("intercept", [0, -1024])
@pytest.mark.parametrize(("first", "last"), [(-2000, -1000), (-1000, -2000)])
def test_all_values_up_to_the_limit_of_padding_are_missing(first: int, last: int, intercept: int) -> None:
    stored = DEEP.astype(np.int16)
    stored[0], stored[1], stored[2], stored[3], stored[4] = -2001, -2000, -1500, -1000, -999
    told = written(stored, RescaleIntercept=intercept)
    content = retold(told, PixelPaddingValue=("SS", first), PixelPaddingRangeLimit=("SS", last))
    found = read_crop(content, 1, whole, None, fill=[5.0])
    assert found.known is not None
    np.testing.assert_array_equal(found.known[0], (stored < -2000) | (stored > -1000))
    np.testing.assert_array_equal(found.values[0], np.where(found.known[0], stored + float(intercept), 5))


@pytest.mark.parametrize("which", ["MONOCHROME1", "MONOCHROME2"])
def test_a_given_missing_value_is_the_stored_one_and_not_that_of_the_modality(which: str) -> None:
    stored = DEEP.astype(np.int16)
    stored[:3], stored[3] = -2000, (-2000 + 1024) // 2
    content = written(stored, RescaleSlope=2, RescaleIntercept=-1024, PhotometricInterpretation=which)
    found = read_crop(content, 1, whole, None, fill=[5.0], nodata=-2000)
    assert found.known is not None
    np.testing.assert_array_equal(found.known[0], stored != -2000)
    assert read_crop(content, 1, whole, None, fill=[5.0]).known is None


@pytest.mark.parametrize("which", ["Shared", "PerFrame"])
def test_frames_have_the_units_that_their_groups_tell(which: str) -> None:
    frames = RNG.integers(0, 2**12, (3, H, W), dtype=np.uint16)
    groups = []
    for slope in (1, 2, 3) if which == "PerFrame" else (2,):
        values, group = pydicom.Dataset(), pydicom.Dataset()
        values.RescaleSlope, values.RescaleIntercept = slope, -1024
        group.PixelValueTransformationSequence = [values]
        groups.append(group)
    content = written(frames, **{f"{which}FunctionalGroupsSequence": groups})
    slopes = np.array([1, 2, 3] if which == "PerFrame" else [2, 2, 2])[:, None, None]
    np.testing.assert_array_equal(read_crop(content, 3, whole, None).values, frames * slopes - 1024.0)


def test_frames_are_channels() -> None:
    frames = RNG.integers(0, 256, (5, H, W), dtype=np.uint8)
    np.testing.assert_array_equal(read_crop(written(frames), 5, whole, None).values, frames)
    with pytest.raises(BadImage, match="5 channels, in_chans is 3"):
        read_crop(written(frames), 3, whole, None)
    with pytest.raises(BadImage, match="3 channels, in_chans is 1"):  # which are no colours
        read_crop(written(frames[:3]), 1, whole, None)


def test_what_is_no_image_is_refused_with_the_reason() -> None:
    with pytest.raises(BadImage, match="DICOM of PALETTE COLOR with 1 frames"):
        read_crop(written(GREY, PhotometricInterpretation="PALETTE COLOR"), 1, whole, None)
    for content in (written(DEEP)[:-100], written(DEEP)[:200], b"\0" * 128 + b"DICM" + b"\1" * 99):
        with pytest.raises(BadImage):
            read_crop(content, 1, whole, None)
    deflated = written(GREY).replace(b"1.2.840.10008.1.2.1\0", dicom.DEFLATED)
    for before in (b"", bytes(1 << 17)):  # what comes before the transfer syntax may be long
        with pytest.raises(BadImage, match="deflated as a whole"):
            read_crop(deflated[:132] + before + deflated[132:], 1, whole, None)
    with pytest.raises(BadImage, match="more than max_pixels"):
        read_crop(written(DEEP), 1, lambda *_: pytest.fail("was opened"), None, max_pixels=100)


def test_a_length_that_is_none_of_its_type_is_a_bad_image() -> None:
    content = written(DEEP)
    for key in (b"\x28\x00\x10\x00", b"\x28\x00\x00\x01"):  # (0028,0010), Rows, and (0028,0100), BitsAllocated
        value = content.index(key + b"US\x02\x00") + 8
        longer = content[: value - 2] + b"\x03\x00" + content[value : value + 2] + b"\0" + content[value + 2 :]
        with pytest.raises(BadImage, match="damaged"):
            read_crop(longer, 1, whole, None)


def test_values_that_are_there_and_empty_are_the_usual_ones() -> None:
    empty = {"RescaleSlope": None, "RescaleIntercept": None, "NumberOfFrames": None}
    np.testing.assert_array_equal(read_crop(written(GREY, **empty), 1, whole, None).values[0], GREY)


def test_without_pydicom_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicom, "find_spec", lambda name: None)
    with pytest.raises(BadImage, match=r"it is DICOM, which needs pydicom: pip install 'fcmae\[dicom\]'"):
        read_crop(written(GREY), 1, whole, None)


def test_few_stored_bits_in_many_are_shares_of_their_range() -> None:
    found = read_crop(written(GREY.astype(np.uint16), BitsStored=8), 1, whole, None).values[0]
    np.testing.assert_allclose(found, GREY / np.float32(255), rtol=1e-6)


@pytest.mark.parametrize("intercept", [0, -10])
@pytest.mark.parametrize("signed", [False, True])
def test_where_0_is_white_unsigned_values_as_stored_are_inverted_and_units_are_not(
    intercept: int, signed: bool
) -> None:
    array = DEEP.astype(np.int16) - 2**11 if signed else DEEP
    values = {"BitsStored": 12, "RescaleSlope": "1", "RescaleIntercept": str(intercept)}
    plain, inverted = (
        read_crop(written(array, **values, PhotometricInterpretation=f"MONOCHROME{kind}"), 1, whole, None).values[0]
        for kind in (2, 1)
    )
    np.testing.assert_allclose(inverted, plain if signed or intercept else 1 - plain, rtol=1e-6, atol=1e-6)
