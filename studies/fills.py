"""What should a patch that has left show its neighbours? Sea, land and lakes, trained and scored with each fill.

    python studies/fills.py --out runs/fills                # 2 cores
    python studies/fills.py --out runs/fills --list         # the commands, without running them
    python studies/fills.py radial --config segment_cpu ...         # one run, by the flags of `fcmae segment`

zero       nothing, as hidden patches in pretraining: what fcmae does, and the only one that packed rows compute
carried    its own features, carried on by the downsampling alone
radial     to a depthwise convolution, the mean of computed sites within a 7x7 window under exp(-lambda^2 d^2), lambda
           learnt from 3, as in arXiv 2104.00749

Each fill is in training from the first step, from one pretraining, and in scoring. All compute dense maps here, so this
tells accuracy, not time: that is benchmarks/anytime.py's. carried and radial are no settings of fcmae, and models
trained so are not to be predicted with. The 150 tiles that are tested on choose nothing: the last model counts. What is
finished is not done again. What is found is in OUT/fills.json, of which docs/fills.json is ours, with the share of the
patches that each stage computed in scoring: where it is 1, nothing was filled and nothing compared.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fcmae import threads

threads.prepare()  # as the commands do, before torch is loaded

import torch
import torch.nn.functional as F
from study import FCMAE, STUDIES, Job, add_arguments, chosen, end, facts, last_scores, paired, schedule, write_images
from torch import Tensor, nn

from fcmae import segmenting, starting
from fcmae.anytime import Anytime, unsure
from fcmae.atomic import write_text
from fcmae.config import SegmentConfig
from fcmae.evaluation.paired import cells
from fcmae.heads import Exits
from fcmae.layouts import Masked, Packed
from fcmae.layouts.sites import upsample_mask
from fcmae.networks.encoder import StagedEncoder
from fcmae.options import load
from fcmae.tables import table

FILLS = ("zero", "carried", "radial")
TAU = 0.8  # by the paper's .998 nearly nothing leaves here
COLUMNS = ("labels", "fill", "seeds", "mean IoU, %", "against zero, of each seed", "", "computed by stage, %")
WINDOW = 7


class Carried(Masked):
    """A patch that has left shows what the downsampling makes of its features, through all blocks of a stage."""

    shown: Tensor

    def downsample(self, f: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self.shown = F.conv2d(f.permute(0, 3, 1, 2), weight, bias, stride=2).permute(0, 2, 3, 1)
        return self.shown

    def fill(self, f: Tensor) -> Tensor:
        """f, (B, H, W, C), with what is shown at hidden sites."""
        assert self.mask is not None
        return torch.where(upsample_mask(self.mask, f.shape[1] // self.mask.shape[1])[..., None], self.shown, f)

    def depthwise_conv(self, f: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = self.fill(f).permute(0, 3, 1, 2)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight)).permute(0, 2, 3, 1)


class Radial(Masked):
    """A site of a patch that has left shows the mean of computed ones near it, and zero where there is none."""

    def __init__(self, mask: Tensor, decay: Tensor) -> None:
        super().__init__(mask)
        self.decay = decay

    def depthwise_conv(self, f: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert self.mask is not None
        hidden = upsample_mask(self.mask, f.shape[1] // self.mask.shape[1])[:, None]  # (B, 1, H, W)
        x = torch.where(hidden, 0, f.permute(0, 3, 1, 2))
        steps = torch.arange(WINDOW, device=f.device) - WINDOW // 2
        kernel = torch.exp(-self.decay.square() * (steps[:, None].square() + steps.square()))  # (7, 7)
        near = kernel.to(x.dtype).expand(x.shape[1], 1, -1, -1)
        sums = F.conv2d(x, near, padding=WINDOW // 2, groups=x.shape[1])
        weights = F.conv2d((~hidden).to(x.dtype), near[:1], padding=WINDOW // 2)
        x = torch.where(hidden & (weights > 1e-30), sums / weights.clamp(min=1e-30), x)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight)).permute(0, 2, 3, 1)


class Filled(Anytime):
    """Anytime with another fill, on dense maps in training and in use."""

    def __init__(self, encoder: StagedEncoder, head: Exits, fill: str) -> None:
        super().__init__(encoder, head)
        self.fill = fill
        self.computed: list[list[float]] = []  # in scoring, the share of the patches of each image and stage
        head.register_parameter("decay", nn.Parameter(torch.tensor(3.0)) if fill == "radial" else None)
        if fill != "zero":
            self.narrow = self.fill_in

    def fill_in(
        self, hidden: Tensor, num_visible: int | None, layout: Masked | Packed, f: Tensor
    ) -> tuple[Masked, Tensor]:
        """See `narrow_masked`."""
        if self.fill == "radial":
            assert isinstance(self.head.decay, Tensor)
            return Radial(hidden, self.head.decay), f
        return Carried(hidden), layout.fill(f) if isinstance(layout, Carried) else f

    @torch.no_grad()
    def within(
        self,
        images: Tensor,
        tau: float | None = None,
        budget: float | Sequence[float] | None = None,
        limit_s: float = math.inf,
    ) -> Tensor:
        def choose(stage: int, confidence: Tensor, hidden: Tensor) -> tuple[Tensor, None]:
            return unsure(confidence, hidden, self.head.tau if tau is None else tau), None

        answers = list(self.answers(images, choose, self.narrow))
        shares = [answer.computed.flatten(1).double().mean(1) for answer in answers]
        shares += [torch.zeros_like(shares[0])] * (len(self.head) - len(shares))
        self.computed += torch.stack(shares, 1).tolist()
        return answers[-1].pixels()


def segment(fill: str, flags: Sequence[str]) -> int:
    """`fcmae segment` with a fill."""
    cfg = load(SegmentConfig, flags, prog=f"fills.py {fill}")
    weights = starting.starting_weights(cfg)
    plain = segmenting.build_model(cfg, weights, cfg.data.class_names)
    assert isinstance(plain, Anytime)
    net = Filled(plain.encoder, plain.head, fill)
    run = segmenting.segment(cfg, net)
    if run.finished and net.computed:  # none of a run that had finished before
        shares = [sum(stage) / len(stage) for stage in zip(*net.computed, strict=True)]
        write_text(run.path / "computed.json", json.dumps(shares) + "\n")
    return run.status


def jobs(out: Path, epochs: float, seeds: int) -> Iterator[Job]:
    """All commands."""
    yield pretrained(out)
    for seed in range(seeds):
        for fill in FILLS:
            words = segmented(out, f"{fill}-{seed}", seed, TAU, epochs)
            yield Job(f"{fill}-{seed}", (sys.executable, str(STUDIES / "fills.py"), fill, *words), ("pretrained",))


def pretrained(out: Path) -> Job:
    """The pretraining on the tiles of the earth that the front page has."""
    words = ("pretrain", f"{out}/landsea/unlabeled.txt", "--config=pretrain_cpu", "--epochs=80")
    return Job("pretrained", (*FCMAE, *words, f"--out={out}/runs/pretrained"))


def segmented(out: Path, name: str, seed: int, tau: float, epochs: float) -> tuple[str, ...]:
    """The flags of a run on all its label maps, with exits."""
    data = f"{out}/landsea"
    return (
        *("--config=segment_cpu", f"--init={out}/runs/pretrained", f"--data.path={data}/train-100-0.csv"),
        *(f"--data.val_path={data}/test.csv", "--data.class_names=sea,land,lake", f"--seed={seed}"),
        *("--model.head=anytime", f"--model.tau={tau:g}", f"--epochs={epochs:g}"),
        *(f"--log.eval_epochs={epochs:g}", f"--out={out}/runs/{name}"),
    )


def collect(out: Path, every: Sequence[Job], epochs: float) -> dict[str, Any]:
    """What the finished runs have found."""
    scores = []
    for name, values in last_scores(out, every, "miou").items():
        fill, _, seed = name.partition("-")
        computed = json.loads((out / "runs" / name / "computed.json").read_text())
        scores.append({"arm": fill, "labels": "100%", "seed": int(seed), "computed": computed, "scores": values})
    return {**facts(out, every), "epochs": epochs, "scores": scores}


def rows(found: dict[str, Any]) -> list[list[str]]:
    """The table of what was found, of mean IoU."""
    scores = [(one["arm"], one["labels"], one["seed"], one["scores"]["miou"]) for one in found["scores"]]
    lines = [cells(row) for row in paired(scores, {fill: None if fill == "zero" else "zero" for fill in FILLS})]
    for row in lines:
        shares = zip(*(one["computed"] for one in found["scores"] if one["arm"] == row[1]), strict=True)
        row.append(", ".join(f"{100 * sum(stage) / len(stage):.0f}" for stage in shares))
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in FILLS:
        return segment(argv[0], argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=float, default=20, help="of each run [20]")
    parser.add_argument("--seeds", type=int, default=3, help="of each arm [3]")
    add_arguments(parser, "runs/fills", at_once=1)
    args = parser.parse_args(argv)
    out = args.out.absolute()
    every = list(jobs(out, args.epochs, args.seeds))
    wanted = chosen(args, every)
    write_images("landsea", out)
    failed = schedule(wanted, out, args.at_once, None if args.at_once == 1 else 1)
    found = collect(out, every, args.epochs)
    write_text(out / "fills.json", json.dumps(found, indent=1) + "\n")
    print("\n" + table(COLUMNS, rows(found), left=2))
    end(failed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
