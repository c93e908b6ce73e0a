"""The `fcmae` command: one subcommand for each thing to do. torch is imported only by the one that runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import fcmae


def main(argv: list[str] | None = None) -> int:
    """Run a command line, by default the process's own; return its exit status.

    A ValueError or OSError, which the user can mend, and a FloatingPointError, which says where training broke down,
    are printed without their traceback and give 2; an interrupt gives 130. `--debug` anywhere on the line lets them
    through. Raises SystemExit as argparse does: 0 for `--help`, 2 for a usage error; 1 if `doctor` finds
    that nothing can be pretrained here.
    """
    words = sys.argv[1:] if argv is None else argv
    debug = "--debug" in words
    try:
        _run([word for word in words if word != "--debug"])
    except (ValueError, OSError, FloatingPointError) as error:
        if debug:
            raise
        for line in str(error).splitlines() or [type(error).__name__]:
            print(f"fcmae: error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            raise
        print("fcmae: interrupted", file=sys.stderr)
        return 130
    return 0


def _run(words: list[str]) -> None:
    # These three have a flag for each setting, so the rest of their line is not argparse's to read here.
    if words[:1] == ["pretrain"]:
        _pretrain(words[1:])
    elif words[:1] == ["finetune"]:
        _finetune(words[1:])
    elif words[:1] == ["bench"]:
        _bench(words[1:])
    else:
        args = _parser().parse_args(words)
        run: Callable[[argparse.Namespace], None] = args.run
        run(args)


def _pretrain(flags: list[str]) -> None:
    from fcmae import settings
    from fcmae.config import PretrainConfig

    config = settings.load(PretrainConfig, flags, prog="fcmae pretrain")

    from fcmae import pretrain

    pretrain.main(config)


def _finetune(flags: list[str]) -> None:
    from fcmae import settings
    from fcmae.config import FinetuneConfig

    config = settings.load(FinetuneConfig, flags, prog="fcmae finetune")

    from fcmae import finetune

    finetune.main(config)


def _bench(flags: list[str]) -> None:
    from fcmae import settings
    from fcmae.bench import BenchConfig, bench

    bench(settings.load(BenchConfig, flags, prog="fcmae bench"))


def _convert(args: argparse.Namespace) -> None:
    if args.check:
        from fcmae.convert import check

        print(check(args.source))
        return
    if args.dest is None and not args.dry_run:
        raise ValueError("DEST is missing: name a new path, or give --dry-run or --check")

    from fcmae.convert import convert

    print(convert(args.source, None if args.dry_run else args.dest, args.to, args.variant, args.key))


def _predict(args: argparse.Namespace) -> None:
    from fcmae.predict import predict

    predict(args.model, args.images, args.csv, args.batch_size)


def _stats(args: argparse.Namespace) -> None:
    from fcmae.data.index import find_images
    from fcmae.data.stats import channel_statistics

    mean, std, num_images = channel_statistics(
        find_images(args.path), args.in_chans, max_images=args.max_images, num_workers=args.num_workers
    )
    print(f"# {num_images} images\ndata:\n  in_chans: {args.in_chans}")
    for name, values in (("mean", mean), ("std", std)):
        print(f"  {name}: [{', '.join(f'{value:.4g}' for value in values)}]")


def _doctor(args: argparse.Namespace) -> None:
    from fcmae.doctor import doctor

    if not doctor(args.out, args.quick, args.json):
        sys.exit(1)


def _verify(args: argparse.Namespace) -> None:
    from fcmae.verify import verify

    if not all(result.ok for result in verify(args.backend, args.device)):
        sys.exit(1)


def _configs(args: argparse.Namespace) -> None:
    from fcmae.settings import shipped_configs

    shipped = shipped_configs()
    width = max(map(len, shipped), default=0)
    for name, path in shipped.items():
        print(f"{name:{width}}  {path.read_text(encoding='utf-8').partition(chr(10))[0].removeprefix('# ')}")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"received {text}; allowed: >= 1")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fcmae", description=fcmae.__doc__)
    parser.add_argument("--version", action="version", version=f"fcmae {fcmae.__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(
        name: str, run: Callable[[argparse.Namespace], None], summary: str, example: str
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=f"{summary}.", epilog=f"example: fcmae {example}")
        command.set_defaults(run=run)
        return command

    # Listed for the help; _run has taken them before the parser sees them.
    commands.add_parser("pretrain", help="Pretrain an encoder on unlabeled images (fcmae pretrain --help)")
    commands.add_parser("finetune", help="Train or evaluate a classifier (fcmae finetune --help)")
    commands.add_parser("bench", help="Time a pretraining run before it starts (fcmae bench --help)")

    command = add(
        "convert",
        _convert,
        "Turn weights of any format into any other, from a run to timm by default",
        "convert runs/first encoder",
    )
    command.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help="a run, a checkpoint, a timm or transformers directory, or a .safetensors or .pth file of any format, "
        "the released sparse and dense checkpoints too",
    )
    command.add_argument("dest", type=Path, nargs="?", metavar="DEST", help="where to write it")
    command.add_argument(
        "--to",
        choices=("fcmae", "timm", "fair", "transformers", "minkowski"),
        default="timm",
        help="timm and transformers: a directory; the others: a file that ends in .safetensors, .pth or .pt [timm]",
    )
    command.add_argument("--variant", metavar="NAME", help="what SRC must be of, e.g. convnextv2_atto [found out]")
    command.add_argument(
        "--key", metavar="NAME", help="the entry of a .pth file that holds the weights, e.g. model_ema [model]"
    )
    command.add_argument("--dry-run", action="store_true", help="print what goes where and write nothing")
    command.add_argument(
        "--check", action="store_true", help="compare SRC's output on a fixed image with the one stored in it, and stop"
    )

    command = add(
        "predict", _predict, "Classify images with a fine-tuned model", "predict runs/tuned photos --csv labels.csv"
    )
    command.add_argument("model", type=Path, metavar="MODEL", help="a fine-tuning run, or its exported model")
    command.add_argument("images", nargs="+", metavar="IMAGES", help="images, folders, lists or glob patterns")
    command.add_argument("--csv", type=Path, metavar="FILE", help="write the predictions here too")
    command.add_argument("--batch-size", type=_positive, default=64, metavar="N", help="images at a time [64]")

    command = add(
        "stats", _stats, "Print the images' mean and std, as lines for a configuration", "stats photos --in-chans 4"
    )
    command.add_argument("path", nargs="+", metavar="PATH", help="folders, lists or glob patterns")
    command.add_argument("--in-chans", type=_positive, default=3, metavar="N", help="channels of the images [3]")
    command.add_argument("--max-images", type=_positive, default=2000, metavar="N", help="images to read [2000]")
    command.add_argument(
        "--num-workers",
        type=_positive,
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="processes that decode [%(default)s]",
    )

    command = add(
        "doctor",
        _doctor,
        "Tell what this machine has for pretraining, what it lacks and how to mend it",
        "doctor --quick",
    )
    command.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="where runs are to be written [.]")
    command.add_argument(
        "--quick", action="store_true", help="try neither torch.compile, processes nor MinkowskiEngine"
    )
    command.add_argument("--json", action="store_true", help="print JSON")

    command = add(
        "verify",
        _verify,
        "Check that every backend computes the same on this machine, and time them",
        "verify --backend packed minkowski --device cuda",
    )
    command.add_argument(
        "--backend",
        nargs="+",
        choices=("packed", "triton", "masked", "minkowski"),
        metavar="NAME",
        help="packed, triton, masked, minkowski [those that can run here]",
    )
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where they run [cpu]")

    add("configs", _configs, "List the configurations that come with fcmae", "configs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
