"""Memory of `fcmae predict` on a raster that does not fit: the peak of its process, and the time.

    python benchmarks/large_raster.py --sides 5000 20000 --json large_raster.json

The raster is a sparse tiled TIFF, made here, with a block of noise in the middle, and the network a tiny untrained one:
what is measured is reading, tiling and writing. Memory is to grow with the width, by a line of tiles, and not with the
area. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from fcmae.data.maps import Classes
from fcmae.heads import Segmenter, build_head
from fcmae.networks.build import make_encoder
from fcmae.networks.spec import ConvNeXtSpec
from fcmae.tables import table
from fcmae.weights.formats import Architecture
from fcmae.weights.record import ImageRecord, Weights
from fcmae.weights.segmenters import save_segmenter

TILE, NOISY = 512, 4  # pixels; tiles along the side of the block of noise
SPEC = ConvNeXtSpec(depths=(1, 1), dims=(8, 16))


def write_raster(path: Path, side: int) -> None:
    """A grey TIFF of 8 bits whose tiles are left out but for those of noise."""
    across, rng = -(-side // TILE), np.random.default_rng(0)
    first = max(0, across // 2 - NOISY // 2)

    def tiles() -> Iterator[NDArray[np.uint8] | None]:
        for row, column in np.ndindex(across, across):
            is_noisy = first <= row < first + NOISY and first <= column < first + NOISY
            # tifffile wants to see the first tile
            is_there = is_noisy or row == column == 0
            yield rng.integers(0, 256, (TILE, TILE), dtype=np.uint8) if is_there else None

    tifffile.imwrite(path, tiles(), shape=(side, side), dtype=np.uint8, tile=(TILE, TILE), photometric="minisblack")


def write_model(folder: Path, num_classes: int) -> None:
    """An untrained network of two small stages, for tiles of TILE pixels."""
    model = Segmenter(make_encoder(SPEC, 1), build_head("pyramid", SPEC.dims, num_classes, 8))
    image = ImageRecord(input_size=(1, TILE, TILE), mean=(0.5,), std=(0.25,), crop_pct=1.0)
    classes = Classes(tuple(f"class {i}" for i in range(num_classes)), tuple(range(num_classes)), 255)
    save_segmenter(folder, model, Weights({}, Architecture(SPEC, 1), image=image), "pyramid", classes)


def measure(folder: Path, side: int) -> dict[str, Any]:
    """Seconds and peak memory in bytes of a prediction, and sizes in bytes."""
    raster, out = folder / f"{side}.tif", folder / f"maps-{side}"
    write_raster(raster, side)
    words = (
        "predict",
        folder / "model",
        raster,
        "--out",
        out,
        "--device",
        "cpu",
        "--batch_size",
        "4",
        "--overlap",
        ".25",
    )
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "fcmae.cli", *map(str, words)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"fcmae predict ended with status {os.waitstatus_to_exitcode(status)}")
    (made,) = out.iterdir()
    with tifffile.TiffFile(made) as file:
        assert file.pages.first.shape == (side, side)
    return {
        "side": side,
        "seconds": round(time.monotonic() - began, 1),
        "peak_bytes": usage.ru_maxrss * 1024,
        "raster_bytes": raster.stat().st_size,
        "map_bytes": made.stat().st_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[5000, 20000], help="pixels [5000 20000]")
    parser.add_argument("--classes", type=int, default=3, help="of a pixel [3]")
    parser.add_argument("--json", type=Path, help="where to write what was measured")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        write_model(Path(place) / "model", args.classes)
        found = [measure(Path(place), side) for side in args.sides]
    if args.json:
        args.json.write_text(
            json.dumps({"cores": os.cpu_count(), "classes": args.classes, "found": found}, indent=1) + "\n"
        )
    rows = [
        (f"{one['side']:,} x {one['side']:,}", f"{one['peak_bytes'] / 1e6:,.0f}", f"{one['seconds']:,.0f}")
        for one in found
    ]
    print(table(("pixels", "peak memory, MB", "seconds"), rows))


if __name__ == "__main__":
    main()
