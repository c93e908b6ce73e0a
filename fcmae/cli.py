"""The `fcmae` command: one subcommand for each thing to do. torch is imported only by the one that runs."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import select
import signal
import sys
import threading
import webbrowser
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import fcmae
from fcmae import config, threads
from fcmae.config import commands
from fcmae.config.base import Settings
from fcmae.data.cores import all_processes
from fcmae.data.source import printable
from fcmae.options import load
from fcmae.options.line import HELP
from fcmae.options.problems import hint

if TYPE_CHECKING:
    from fcmae.training.run import Run

DEBUG = frozenset({"--debug", "--debug=true"})


def main(argv: list[str] | None = None) -> int:
    """Run a command line, by default the process's own.

    A ValueError or OSError, which the user can mend, and a FloatingPointError, which says where training broke down,
    are printed without their traceback; `--debug` anywhere on the line lets them through.

    Returns:
        The exit status: the command's own, which is 0 unless it says otherwise, as `doctor` does with 1 if nothing can
        be pretrained here, `verify` if backends differ, and `predict` if some images cannot be read; 2 after an error;
        130 after an interrupt; 141 if nobody reads on what it prints. Those that train give 143, 130 and 129 after a
        SIGTERM, SIGINT and SIGHUP that they have saved at; 0 after SIGUSR1, by which schedulers warn that time is up,
        as the job is then queued again.

    Raises:
        SystemExit: With status 0, after printing for `--help`, `--version` and `--print-config`; with 143 after a
            SIGTERM to a command that does not train, which has removed what is temporary.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = not DEBUG.isdisjoint(words)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be Unicode
    try:
        status = _run(words[1:] if DEBUG.issuperset(words[:1]) else words)
        sys.stdout.flush()
        return status
    except RuntimeError as error:
        if debug or type(error).__name__ != "OutOfMemoryError":  # torch's, which many commands never import
            raise
        said = str(error).partition("\n")[0].rstrip(".")
        print(f"fcmae: error: {said}: lower --batch_size, or give --device cpu", file=sys.stderr)
        return 2
    except (ValueError, OSError, FloatingPointError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 128 + signal.SIGPIPE
        if debug:
            raise
        for line in _told(error).splitlines() or [type(error).__name__]:
            print(f"fcmae: error: {printable(line)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            raise
        print("fcmae: interrupted", file=sys.stderr)
        return 130


def _told(error: Exception) -> str:
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    where = "" if error.filename is None else f"{error.filename}: "
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"{where}{error.strerror}{'; free some space there, or choose another place' if full else ''}"


def _nobody_reads() -> bool:
    """Whether who read what this prints is gone, as `head` is when it has enough; nothing more is printed then."""
    poll = select.poll()
    poll.register(1, 0)
    if gone := bool(poll.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return gone


def _run(words: list[str]) -> int:
    name, *rest = words or ["--help"]
    if name in HELP or name == "--version":
        print(f"fcmae {fcmae.__version__}" if name == "--version" else _help())
        raise SystemExit(0 if words else 2)
    settings, run = _command(name)
    processes = all_processes()
    complete = _complete if issubclass(settings, config.RunConfig) else None
    showing = _showing() if complete else contextlib.nullcontext()
    ending = contextlib.nullcontext() if name in TRAINING else _ending_tidily()
    with showing, ending:
        given = load(settings, rest, prog=f"fcmae {name}", num_processes=processes, complete=complete)
        if processes > 1 and name not in (*TRAINING, *IDLE):
            raise ValueError(f"{name} is one process, and WORLD_SIZE = {processes}: start it without a launcher")
        if name not in IDLE:
            threads.prepare()
        return run(given) or 0


def _showing() -> contextlib.AbstractContextManager[None]:
    """Around a run and what is chosen for it: what it says is shown, by its first process."""
    from fcmae.training.messages import showing

    return showing() if os.environ.get("RANK", "0") == "0" else contextlib.nullcontext()


@contextlib.contextmanager
def _ending_tidily() -> Iterator[None]:
    """A SIGTERM ends the command so that it removes what is temporary; those that train save, see `StopSignal`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _command(name: str) -> tuple[type[Settings], Callable[[Any], int | None]]:
    if name not in COMMANDS:
        raise ValueError(f"{name}: no such command{hint(name, COMMANDS) or '; there are: ' + ', '.join(COMMANDS)}")
    return COMMANDS[name]


def _help() -> str:
    lines = [f"  {name:11} {(settings.__doc__ or '').splitlines()[0]}" for name, (settings, _) in COMMANDS.items()]
    head = ["usage: fcmae COMMAND [WORD ...] [--KEY VALUE ...]", "", fcmae.__doc__ or "", "", "commands:"]
    return "\n".join([*head, *lines, "", "`fcmae COMMAND --help` explains it, `fcmae --version` prints the version."])


def _ended(run: Run) -> int:
    """Print where a run stands at its end, and what can be typed next; its exit status."""
    if os.environ.get("RANK", "0") == "0":
        from fcmae.evaluation.status import status

        with contextlib.suppress(ValueError, OSError):  # the run has ended as it did, whatever can be read of it
            print(status(run.path))
    return run.status


def _pretrain(cfg: config.PretrainConfig) -> int:
    from fcmae import pretraining

    return _ended(pretraining.pretrain(cfg))


def _finetune(cfg: config.FinetuneConfig) -> int:
    from fcmae import finetuning

    run = finetuning.finetune(cfg)
    return run.status if cfg.eval_only else _ended(run)


def _segment(cfg: config.SegmentConfig) -> int:
    from fcmae import segmenting

    run = segmenting.segment(cfg)
    return run.status if cfg.eval_only else _ended(run)


def _bench(cfg: config.BenchConfig) -> None:
    from fcmae.bench import bench

    bench(cfg)


def _convert(cfg: commands.ConvertConfig) -> None:
    from fcmae.weights import convert as weights

    if cfg.check:
        print(weights.check(cfg.source, cfg.variant, cfg.key, cfg.prefix))
    else:
        dest = None if cfg.dry_run else cfg.dest
        print(weights.convert(cfg.source, dest, cfg.to, cfg.variant, cfg.key, cfg.prefix))


def _prune(cfg: commands.PruneConfig) -> None:
    from fcmae.pruning import prune

    print(prune(cfg))


def _export(cfg: commands.ExportConfig) -> None:
    if cfg.to == "hub":
        from fcmae.hub import write_repository

        print(write_repository(cfg))
    else:
        from fcmae.weights.onnx import export_onnx

        print(export_onnx(cfg))


def _push(cfg: commands.PushConfig) -> None:
    from fcmae.hub import push

    print(push(cfg))


def _predict(cfg: commands.PredictConfig) -> int:
    from fcmae.prediction import predict

    return predict(cfg)


def _evaluate(cfg: commands.EvaluateConfig) -> None:
    from fcmae.evaluation.evaluate import evaluate

    print(evaluate(cfg))


def _worth(cfg: commands.WorthConfig) -> int:
    from fcmae.worth import worth

    return worth(cfg)


def _embed(cfg: commands.EmbedConfig) -> None:
    from fcmae.evaluation.embed import embed

    print(embed(cfg))


def _analyze(cfg: commands.AnalyzeConfig) -> None:
    from fcmae.evaluation.analyze import analyze

    print(analyze(cfg))


def _report(cfg: commands.ReportConfig) -> None:
    from fcmae.evaluation.report import report

    page = report(cfg.runs, cfg.out)
    print(f"report: {page}")
    if cfg.open:
        with contextlib.suppress(OSError, webbrowser.Error):  # where there is none, the page is there all the same
            webbrowser.open(page.absolute().as_uri())


def _status(cfg: commands.StatusConfig) -> None:
    from fcmae.evaluation.status import status

    print(status(cfg.run))


def _roadmap(cfg: commands.RoadmapConfig) -> None:
    from fcmae.roadmap import listing

    print(listing(cfg.regime, cfg.ours))


def _stats(cfg: commands.StatsConfig) -> None:
    from fcmae.data.survey import statistics_lines

    print(statistics_lines(cfg.path, cfg.in_chans, cfg.max_images, cfg.num_workers, cfg.max_pixels, cfg.nodata))


def _doctor(cfg: commands.DoctorConfig) -> int:
    from fcmae.doctor import doctor

    return 0 if doctor(cfg.out, cfg.quick, cfg.as_json) else 1


def _verify(cfg: commands.VerifyConfig) -> int:
    from fcmae.verify import verify

    return 0 if all(result.ok for result in verify(cfg.backend, cfg.device)) else 1


def _configs(cfg: commands.ConfigsConfig) -> None:
    from fcmae.options.files import shipped_configs

    shipped = shipped_configs()
    width = max(map(len, shipped), default=0)
    for name, path in shipped.items():
        lines = path.read_text(encoding="utf-8").splitlines()
        title = next(line for line in lines if not line.startswith("# yaml-language-server"))
        print(f"{name:{width}}  {title.removeprefix('# ')}")


def _completion(cfg: commands.CompletionConfig) -> None:
    from fcmae.completion import script

    print(script(cfg.shell, {name: settings for name, (settings, _) in COMMANDS.items()}), end="")


def _schema(cfg: commands.SchemaConfig) -> None:
    print(json.dumps(_command(cfg.command)[0].model_json_schema(), indent=1))


COMMANDS: dict[str, tuple[type[Settings], Callable[[Any], int | None]]] = {
    "pretrain": (config.PretrainConfig, _pretrain),
    "finetune": (config.FinetuneConfig, _finetune),
    "segment": (config.SegmentConfig, _segment),
    "bench": (config.BenchConfig, _bench),
    "convert": (commands.ConvertConfig, _convert),
    "prune": (commands.PruneConfig, _prune),
    "export": (commands.ExportConfig, _export),
    "push": (commands.PushConfig, _push),
    "predict": (commands.PredictConfig, _predict),
    "evaluate": (commands.EvaluateConfig, _evaluate),
    "worth": (commands.WorthConfig, _worth),
    "embed": (commands.EmbedConfig, _embed),
    "analyze": (commands.AnalyzeConfig, _analyze),
    "report": (commands.ReportConfig, _report),
    "status": (commands.StatusConfig, _status),
    "roadmap": (commands.RoadmapConfig, _roadmap),
    "stats": (commands.StatsConfig, _stats),
    "doctor": (commands.DoctorConfig, _doctor),
    "verify": (commands.VerifyConfig, _verify),
    "configs": (commands.ConfigsConfig, _configs),
    "schema": (commands.SchemaConfig, _schema),
    "completion": (commands.CompletionConfig, _completion),
}


def _complete(sketch: Any, given: Mapping[str, Any]) -> Mapping[str, Any]:
    threads.prepare()  # before steps are timed
    from fcmae import planning

    return planning.complete(sketch, given)


TRAINING = ("pretrain", "finetune", "segment")  # in several processes, where a signal saves
IDLE = frozenset(
    {"report", "status", "stats", "doctor", "configs", "schema", "completion"}
)  # they compute nothing with torch


if __name__ == "__main__":
    sys.exit(main())
