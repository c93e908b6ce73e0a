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

    from fcmae import pretraining

    pretraining.main(config)


def _finetune(flags: list[str]) -> None:
    from fcmae import settings
    from fcmae.config import FinetuneConfig

    config = settings.load(FinetuneConfig, flags, prog="fcmae finetune")

    from fcmae import finetuning

    finetuning.main(config)


def _bench(flags: list[str]) -> None:
    from fcmae import settings
    from fcmae.bench import BenchConfig, bench

    bench(settings.load(BenchConfig, flags, prog="fcmae bench"))


def _convert(args: argparse.Namespace) -> None:
    if args.check:
        from fcmae.weights.convert import check

        print(check(args.source))
        return
    if args.dest is None and not args.dry_run:
        raise ValueError("DEST is missing: name a new path, or give --dry-run or --check")

    from fcmae.weights.convert import convert

    print(convert(args.source, None if args.dry_run else args.dest, args.to, args.variant, args.key))


def _predict(args: argparse.Namespace) -> None:
    from fcmae.prediction import predict

    predict(args.model, args.images, args.csv, args.batch_size)


def _evaluate(args: argparse.Namespace) -> None:
    from fcmae.evaluation.evaluate import Data, Options, evaluate

    options = Options(
        probes=tuple(args.probes),
        labels=tuple(args.labels),
        draws=args.draws,
        stages=_stages(args.stages),
        image_size=_image_size(args.image_size),
        seed=args.seed,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        device=args.device,
    )
    print(evaluate(args.models, Data(args.data, args.test, args.test_share), options, args.out, args.overwrite))


def _image_size(sides: list[int] | None) -> tuple[int, int] | None:
    if sides is not None and len(sides) > 2:
        raise ValueError(f"image_size: received {sides}; give one side, or height and width")
    return None if sides is None else (sides[0], sides[-1])


def _stages(words: list[str]) -> tuple[int, ...] | None:
    if words == ["all"]:
        return None
    if wrong := [word for word in words if word != "last" and not word.isdecimal()]:
        raise ValueError(f"stages: {wrong[0]!r} is neither a number nor last: use such as 3 4, last or all")
    return tuple(-1 if word == "last" else int(word) for word in words)


def _embed(args: argparse.Namespace) -> None:
    from fcmae.evaluation.embed import Pictures, embed

    stages = _stages([args.stage])
    if stages is None:
        raise ValueError("stage = all: features of one stage are written: give its number, or last")
    print(
        embed(
            args.model,
            args.out,
            images=args.images,
            data=args.data,
            pictures=Pictures(args.map, tuple(args.neighbours)),
            parquet=args.parquet,
            stage=stages[0],
            image_size=_image_size(args.image_size),
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            device=args.device,
            seed=args.seed,
            overwrite=args.overwrite,
        )
    )


def _analyze(args: argparse.Namespace) -> None:
    from fcmae.evaluation.analyze import analyze

    print(
        analyze(
            args.models,
            args.images,
            args.data,
            args.out,
            max_images=args.max_images,
            image_size=_image_size(args.image_size),
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            device=args.device,
            overwrite=args.overwrite,
        )
    )


def _report(args: argparse.Namespace) -> None:
    from fcmae.evaluation.report import report

    print(f"report: {report(args.runs, args.out)}")


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


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"received {text}; allowed: between 0 and 1")
    return value


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

    def add_reading(command: argparse.ArgumentParser) -> None:
        """How images are read and features computed."""
        command.add_argument(
            "--image-size", type=_positive, nargs="+", metavar="N", help="side, or height and width [each model's own]"
        )
        command.add_argument("--batch-size", type=_positive, default=64, metavar="N", help="images at a time [64]")
        command.add_argument(
            "--device", choices=("auto", "cpu"), default="auto", help="auto takes a GPU, if there is one"
        )
        command.add_argument("--num-workers", type=_positive, metavar="N", help="processes that decode [found out]")

    command = add(
        "evaluate",
        _evaluate,
        "Tell by kNN, linear and few-label probes how well frozen features separate classes",
        "evaluate runs/first random:runs/first --data labelled",
    )
    command.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="runs, checkpoints, exported models, names of timm's models, or random: before one of these, for the same "
        "network untrained",
    )
    command.add_argument(
        "--data", required=True, metavar="DIR|CSV", help="labelled images: a folder a class, or columns path,label"
    )
    command.add_argument("--test", metavar="DIR|CSV", help="images to test on [a share of --data]")
    command.add_argument("--test-share", type=_share, default=0.2, metavar="X", help="share, of each class [0.2]")
    command.add_argument(
        "--probes", nargs="+", choices=("knn", "linear", "few-shot"), default=["knn", "linear"], help="[knn linear]"
    )
    command.add_argument(
        "--labels",
        nargs="+",
        default=["1%", "10%"],
        metavar="N|N%",
        help="of few-shot: images a class, or a share of the training images [1%% 10%%]",
    )
    command.add_argument(
        "--draws", type=_positive, default=5, metavar="N", help="of few-shot: how often labels are drawn [5]"
    )
    command.add_argument(
        "--stages", nargs="+", default=["last"], metavar="N", help="which outputs: numbers from 1, last, or all [last]"
    )
    add_reading(command)
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is drawn [0]")
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="where results go [RUN/evaluation, for RUN and random:RUN]"
    )
    command.add_argument("--overwrite", action="store_true", help="replace earlier results")

    command = add(
        "embed",
        _embed,
        "Write features of images, a map of them, and pictures of nearest neighbours",
        "embed runs/first --data labelled --neighbours photo.jpg --out embedded",
    )
    command.add_argument("model", metavar="MODEL", help="as for evaluate")
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", nargs="+", metavar="PATH", help="images, folders, lists or glob patterns")
    source.add_argument("--data", metavar="DIR|CSV", help="labelled images: a folder a class, or columns path,label")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results go")
    command.add_argument(
        "--map",
        choices=("tsne", "umap", "none"),
        default="tsne",
        help="how the map is made; umap needs umap-learn [tsne]",
    )
    command.add_argument("--neighbours", nargs="+", default=[], metavar="PATH", help="images whose 8 nearest are shown")
    command.add_argument("--parquet", action="store_true", help="one Parquet file in place of .npy and .csv")
    command.add_argument("--stage", default="last", metavar="N", help="which output: a number from 1, or last [last]")
    add_reading(command)
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the map [0]")
    command.add_argument("--overwrite", action="store_true", help="replace earlier results")

    command = add(
        "analyze",
        _analyze,
        "Compare what the channels of ConvNeXts do: diversity, dead ones, effective rank, GRN, class selectivity",
        "analyze runs/v1 runs/v2 random:runs/v2 --images photos --out compared",
    )
    command.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="ConvNeXts: runs, checkpoints, exported models, names of timm's models, or random: before one of these",
    )
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", nargs="+", metavar="PATH", help="images, folders, lists or glob patterns")
    source.add_argument(
        "--data",
        metavar="DIR|CSV",
        help="labelled images, for class selectivity too: a folder a class, or columns path,label",
    )
    command.add_argument(
        "--max-images", type=_positive, default=1000, metavar="N", help="of more, N are taken, evenly spread [1000]"
    )
    add_reading(command)
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="where figures go [RUN/analysis, for RUN and random:RUN]"
    )
    command.add_argument("--overwrite", action="store_true", help="replace earlier results")

    command = add(
        "report",
        _report,
        "Write one HTML page on runs: settings, curves, reconstructions, scores, and what they say",
        "report runs/first runs/tuned runs/scratch --out report.html",
    )
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directories of pretraining or fine-tuning")
    command.add_argument("--out", type=Path, metavar="FILE", help="the page [RUN/report.html, for one run]")

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
