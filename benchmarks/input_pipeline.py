"""Images a second that one core brings from JPEG files to batches, against torchvision's ImageFolder.

    python benchmarks/input_pipeline.py
    python benchmarks/input_pipeline.py --images FOLDER --quality 75
    python benchmarks/input_pipeline.py --sizes 500x375 --repeats 50

Both read the same temporary files, of 4:2:0, in this process and on one thread, and make batches of
crops of 224 pixels (scale .2 to 1, bicubic, flipped or not). torchvision's are normalised floats; ours are bytes and
masks, which the training loop normalises where the model is, so that is timed too, on the same core. All take turns
within a repeat. The files are in the page cache: no disk is timed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image, features
from sklearn.datasets import load_sample_images
from timing import check_repeats, interleaved, machine, quartiles, ratio, summary, write_json
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from fcmae.config import IMAGENET_MEAN, IMAGENET_STD
from fcmae.data import readers
from fcmae.data.augment import CropAndFlip, Reading
from fcmae.data.dataset import Batch, PretrainDataset
from fcmae.data.find import find_images
from fcmae.data.loader import build_loader
from fcmae.data.normalize import Normalize
from fcmae.tables import table

CROP, SCALE = 224, (0.2, 1.0)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    check_repeats(args)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    info = machine() | {"pillow": PIL.__version__, "libjpeg-turbo": str(features.version("libjpeg_turbo"))}
    info["simplejpeg"] = "none" if readers.decode_jpeg is None else metadata.version("simplejpeg")
    print(", ".join(f"{key} {value}" for key, value in info.items()))
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for width, height in args.sizes:
            # Large files take longer: fewer of them make up for it.
            count = max(4, args.count * 500 * 375 // max(width * height, 500 * 375))
            files = Path(folder) / f"{width}x{height}"
            num_bytes = write_jpegs(files / "class", photographs(args.images), width, height, count, args.quality)
            name = f"{width}x{height}"
            print(f"\n{count} JPEGs of {name}, {num_bytes / count / 1e3:.0f} kB each, {args.repeats} repeats\n")
            results[name] = compare(files, count, args.repeats)
    write_json(__file__, argv, args, info, pipeline=results)


def compare(files: Path, count: int, repeats: int) -> dict[str, Any]:
    """Time every way to make one batch of all the files; print and return images a second and ratios."""
    ours, theirs = our_batches(files, count), their_batches(files, count)
    normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD)

    def normalized() -> None:
        normalize(next(ours).images)

    steps: dict[str, Callable[[], object]] = {"torchvision": lambda: next(theirs), "fcmae": lambda: next(ours)}
    steps["fcmae, and normalised"] = normalized
    if readers.decode_jpeg is not None:
        steps["fcmae without simplejpeg"] = lambda: without_simplejpeg(lambda: next(ours))
    seconds = interleaved(steps, repeats)
    rows, found = [], {}
    for name, values in seconds.items():
        low, middle, high = (count / value for value in reversed(quartiles(values)))
        speedup = ratio(seconds["torchvision"], values)
        rows.append([name, f"{middle:.0f}", f"{low:.0f} - {high:.0f}", f"{1000 / middle:.2f}"])
        rows[-1] += [f"{speedup['time']:.2f} x", "{:.2f} - {:.2f}".format(*speedup["quartiles"])]
        found[name] = summary(values) | {"images_per_s": middle, "speedup": speedup}
    print(table(["", "images/s", "quartiles", "ms an image", "speed", "quartiles"], rows))
    return {"count": count, "loaders": found}


def our_batches(files: Path, count: int) -> Iterator[Batch]:
    """Batches of all the files, of one epoch after the other."""
    index, grid = find_images([str(files)]), (CROP // 32, CROP // 32)
    dataset = PretrainDataset(index, CropAndFlip(Reading(3, (CROP, CROP)), SCALE, 0.5), grid=grid, visible=19, seed=0)
    keys = ([(epoch, i) for i in range(count)] for epoch in range(1_000_000))
    return iter(build_loader(dataset, keys, num_workers=0, device_type="cpu"))


def their_batches(files: Path, count: int) -> Iterator[Any]:
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(CROP, scale=SCALE, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    loader = DataLoader(ImageFolder(files, transform), batch_size=count, num_workers=0)
    while True:
        yield from loader


def without_simplejpeg(run: Callable[[], object]) -> None:
    decode, readers.decode_jpeg = readers.decode_jpeg, None
    try:
        run()
    finally:
        readers.decode_jpeg = decode


def photographs(folder: Path | None) -> list[Image.Image]:
    """The folder's images, or the two photographs that come with scikit-learn (640 x 427) where none is given."""
    if folder is None:
        return [Image.fromarray(pixels) for pixels in load_sample_images().images]
    return [Image.open(path).convert("RGB") for path in find_images([str(folder)]).names()[:64]]


def write_jpegs(folder: Path, images: list[Image.Image], width: int, height: int, count: int, quality: int) -> int:
    """Write `count` JPEGs and return their bytes. A small image is mirrored at its borders, not enlarged: that would
    leave a JPEG with fewer bytes, which decode faster, than a photograph of that size has."""
    folder.mkdir(parents=True)
    for number in range(count):
        image = images[number % len(images)]
        scale = min(1, max(width / image.width, height / image.height))
        pixels = np.asarray(image.resize((round(image.width * scale), round(image.height * scale))))
        more = (max(0, height - pixels.shape[0]), max(0, width - pixels.shape[1]))
        pixels = np.pad(pixels, ((0, more[0]), (0, more[1]), (0, 0)), mode="symmetric")[:height, :width]
        Image.fromarray(pixels).save(folder / f"{number:03}.jpg", quality=quality, subsampling="4:2:0")
    return sum(path.stat().st_size for path in folder.iterdir())


def size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return int(width), int(height)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description="Time JPEG files to batches on one core, against torchvision's ImageFolder.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    found.add_argument("--quality", type=int, default=90, help="of the JPEGs: their bytes a pixel decide")
    found.add_argument("--images", type=Path, metavar="FOLDER", help="photographs; without it, scikit-learn's two")
    found.add_argument(
        "--sizes", nargs="+", type=size, default=[(500, 375), (2000, 1500)], metavar="WxH", help="of the JPEGs"
    )
    found.add_argument("--count", type=int, default=32, help="files of 500x375; of larger ones fewer, at least 4")
    found.add_argument("--repeats", type=int, default=15, help="timings of each loader")
    found.add_argument("--json", type=Path, metavar="FILE", help="write every timing here")
    return found


if __name__ == "__main__":
    main()
