"""Time an encoder's features by onnxruntime against torch, the same weights on the same whole images.

    python benchmarks/exported.py
    python benchmarks/exported.py --variant convnextv2_tiny --batch 1 --sides torch compiled onnxruntime

| side | what it does |
| --- | --- |
| torch | our encoder, eager |
| compiled | the same through torch.compile |
| onnxruntime | the file that `fcmae export` writes, on the CPU with as many threads as torch |

What the file gives is compared with torch's when it is written. Sides take turns within each repeat, and ratios are to
the first. Speed is reported, never asserted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import timing
import torch
from torch import Tensor

from fcmae.config.commands import ExportConfig
from fcmae.networks.build import make_encoder
from fcmae.networks.encoder import StagedEncoder
from fcmae.networks.spec import VARIANTS
from fcmae.tables import table
from fcmae.weights.files import save_weights
from fcmae.weights.formats import Architecture
from fcmae.weights.onnx import export_onnx
from fcmae.weights.record import Weights

SIDES = ("torch", "compiled", "onnxruntime")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    if args.compile or (args.device, args.precision) != ("cpu", "fp32"):
        raise SystemExit("all sides are float32 on the CPU, and `compiled` is one of them: leave these flags out")
    images, _, _, info = timing.begin(args, "features of whole images")
    encoder = make_encoder(VARIANTS[args.variant]).requires_grad_(False)
    with torch.inference_mode():
        sides = {name: side(name, encoder, images) for name in args.sides}
        seconds = timing.interleaved(sides, args.repeats)
    first = args.sides[0]
    results = {name: timing.summary(found) for name, found in seconds.items()}
    ratios = {name: timing.ratio(found, seconds[first]) for name, found in seconds.items()}
    rows = [
        [
            name,
            f"{1000 * found['median_s']:.1f} ms",
            "{:.1f} - {:.1f}".format(*(1000 * value for value in found["quartiles_s"])),
            f"{args.batch / found['median_s']:.1f}",
            f"{ratios[name]['time']:.2f}",
            "{:.2f} - {:.2f}".format(*ratios[name]["quartiles"]),
        ]
        for name, found in results.items()
    ]
    print("\n" + table(["", "median", "quartiles", "images/s", f"time / {first}", "quartiles"], rows))
    timing.write_json(__file__, argv, args, info, results=results, ratios=ratios)


def side(name: str, encoder: StagedEncoder, images: Tensor) -> Callable[[], object]:
    """One pass of the images."""
    if name == "onnxruntime":
        session = session_of(encoder)
        return lambda: session.run(None, {"images": images.numpy()})
    model = torch.compile(encoder, dynamic=False) if name == "compiled" else encoder
    return lambda: model(images).mean((1, 2))


def session_of(encoder: StagedEncoder) -> onnxruntime.InferenceSession:
    """The encoder's features, from the file that `fcmae export` writes."""
    state = {f"encoder.{key}": value for key, value in encoder.state_dict().items()}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        model, dest = Path(folder) / "encoder.safetensors", Path(folder) / "encoder.onnx"
        save_weights(model, Weights(state, Architecture(encoder.spec)), "fcmae")
        print(export_onnx(ExportConfig(model=model, dest=dest)))
        return onnxruntime.InferenceSession(dest, options, providers=["CPUExecutionProvider"])


def parser() -> argparse.ArgumentParser:
    found = timing.parser_of(__doc__, repeats=20)
    timing.add_sides(found, SIDES, ["torch", "onnxruntime"])
    found.set_defaults(batch=8, ratio=0)
    return found


if __name__ == "__main__":
    main()
