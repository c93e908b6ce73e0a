"""Draws images to learn from, and makes the pictures of README.md with them: ours, so that they may be shown.

    python docs/pictures.py                      # trains for 18 minutes; writes docs/reconstructions.png, report.png
    python docs/pictures.py --draw photos 2000   # only the images, photos/KIND/NUMBER.png

An image is a heap of shaded shapes of one kind, the small ones on top, as in the dead leaves model of photographs. The
kind is its class: discs, squares, triangles or rings. The picture of the report needs playwright and Chromium.
"""

from __future__ import annotations

import argparse
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

DOCS = Path(__file__).parent
KINDS = ("discs", "rings", "squares", "triangles")
NUM_SHAPES = 10


def draw(kind: str, rng: np.random.Generator, side: int = 48) -> Image.Image:
    """A heap of shapes, each of one hue that fades to one of its sides.

    Args:
        kind: one of KINDS.
        rng: of positions, sizes, angles and colours.
        side: of the image, in pixels.
    """
    canvas = np.broadcast_to(rng.integers(40, 200, 3), (2 * side, 2 * side, 3)).astype(float)
    y, x = np.mgrid[-1 : 1 : 2j * side, -1 : 1 : 2j * side]
    for radius in np.sort(0.2 + 0.6 * rng.random(NUM_SHAPES) ** 2)[::-1]:
        angle, towards = rng.uniform(0, 2 * math.pi, 2)
        centre_x, centre_y = rng.uniform(-1.1, 1.1, 2)
        light = 1 + 0.45 * (math.cos(towards) * (x - centre_x) + math.sin(towards) * (y - centre_y)) / radius
        shape = _outline(kind, side, centre_x, centre_y, radius, angle)
        canvas = np.where(shape[..., None], rng.integers(30, 230, 3) * light[..., None], canvas)
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8)).resize((side, side), Image.Resampling.LANCZOS)


def _outline(kind: str, side: int, centre_x: float, centre_y: float, radius: float, angle: float) -> np.ndarray:
    """(2 * side, 2 * side) bool: where a shape is, of a place in units of half an image."""
    picture = Image.new("1", (2 * side, 2 * side))
    pen = ImageDraw.Draw(picture)
    x, y, r = (centre_x + 1) * side, (centre_y + 1) * side, radius * side
    if kind in ("discs", "rings"):
        pen.ellipse((x - r, y - r, x + r, y + r), fill=1)
    if kind == "rings":
        pen.ellipse((x - r / 2, y - r / 2, x + r / 2, y + r / 2), fill=0)
    if kind in ("squares", "triangles"):
        pen.regular_polygon((x, y, r), 4 if kind == "squares" else 3, math.degrees(angle), fill=1)
    return np.asarray(picture)


def write_images(folder: Path, number: int, seed: int = 0) -> None:
    """FOLDER/KIND/NUMBER.png, as many of each kind.

    Args:
        folder: what is there already stays, and is not drawn again.
        number: of images, of all kinds together.
        seed: of the images; others are others.
    """
    for i in range(number):
        kind = KINDS[i % len(KINDS)]
        path = folder / kind / f"{i}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            draw(kind, np.random.default_rng((seed, i))).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", nargs=2, metavar=("FOLDER", "NUMBER"), help="only draw images")
    parser.add_argument("--out", type=Path, default=Path("runs/pictures"), help="where all else goes [runs/pictures]")
    args = parser.parse_args()
    if args.draw:
        write_images(Path(args.draw[0]), int(args.draw[1]))
        return
    out: Path = args.out
    write_images(out / "photos", 4000)
    write_images(out / "labelled", 800, seed=1)
    run = out / "runs" / "photos"
    fcmae("pretrain", out / "photos", "--hours", 0.3, "--model.target", "pixels", "--out", run)
    fcmae("evaluate", run, f"random:{run}", "--data", out / "labelled", "--overwrite")
    fcmae("report", run, "--out", out / "report.html")
    rows = Image.open(max((run / "reconstructions").glob("*.png"))).convert("RGB")
    small(rows.crop((0, 0, rows.width, round(rows.height * 0.52))), DOCS / "reconstructions.png")
    small(screenshot(out / "report.html", out / "report.png"), DOCS / "report.png")


def fcmae(*words: object) -> None:
    """Run a command of the package, and stop if it fails."""
    subprocess.run([sys.executable, "-m", "fcmae.cli", *map(str, words)], check=True)


def screenshot(page: Path, path: Path) -> Image.Image:
    """What a browser shows first of a page."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1000, "height": 800})
        tab.goto(page.resolve().as_uri())
        tab.wait_for_timeout(3000)
        tab.screenshot(path=path)
        browser.close()
    return Image.open(path).convert("RGB")


def small(picture: Image.Image, path: Path) -> None:
    """Written in 256 colours, which keeps it small."""
    picture.quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    main()
