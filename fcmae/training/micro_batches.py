"""Micro-batches: how many images a process computes at once, by the settings alone."""

from __future__ import annotations

from fcmae.config import AnyRun, DenseConfig, PretrainConfig, RunConfig

AT_ONCE = {"cpu": 64, "cuda": 256}  # images that a process computes at once, unless told: more gain little


def _usual(device_type: str) -> int:
    return AT_ONCE.get(device_type, min(AT_ONCE.values()))


def micro_batch_size(cfg: RunConfig, num_processes: int) -> int:
    """Images that a process computes at once in training, each counted as often as it has masks."""
    return max(1, cfg.batch_size // num_processes // cfg.num_micro_batches)


def eval_batch_size(cfg: DenseConfig, num_processes: int, device_type: str) -> int:
    """Images that a process computes at once in an evaluation: a micro-batch; of a run that only evaluates, whose
    micro-batch is the whole batch, at most AT_ONCE.

    Args:
        cfg: of the run.
        num_processes: of it.
        device_type: of what computes.
    """
    at_once = micro_batch_size(cfg, num_processes)
    return at_once if cfg.trains else min(at_once, _usual(device_type))


def smaller_micro_batch(cfg: AnyRun, num_processes: int) -> AnyRun | None:
    """The settings with a smaller micro-batch: half, or the next size that divides the batch.

    None if it cannot shrink, or if its size changes the result (BatchNorm, grn_scope = batch).

    Args:
        cfg: of the run.
        num_processes: of it.
    """
    if depends_on_micro_batch(cfg):
        return None
    for num in range(2 * cfg.num_micro_batches, cfg.batch_size // num_processes + 1):
        smaller = cfg.model_copy(update={"grad_accum": num})
        if not any(smaller.conflicts(num_processes)):
            return smaller
    return None


def with_micro_batch(cfg: AnyRun, num_processes: int, most: float, slack: float = 1) -> AnyRun:
    """The settings with a micro-batch of at most `most` images, or the smallest that they allow.

    Args:
        cfg: of the run.
        num_processes: of it.
        most: images that a process computes at once.
        slack: a micro-batch up to slack * most is kept if splitting it would go below most / slack.
    """
    while (size := micro_batch_size(cfg, num_processes)) > most:
        smaller = smaller_micro_batch(cfg, num_processes)
        if smaller is None or (size <= most * slack and micro_batch_size(smaller, num_processes) < most / slack):
            break
        cfg = smaller
    return cfg


def settle_grad_accum(cfg: AnyRun, num_processes: int, device_type: str, saved: RunConfig | None = None) -> AnyRun:
    """Replace grad_accum = auto by a number without measuring: the saved run's, else the device's default micro-batch.

    Args:
        cfg: of the run.
        num_processes: of it.
        device_type: of what computes.
        saved: the settings that the run resumes with, whose number stays.
    """
    if cfg.grad_accum != "auto":
        return cfg
    if saved is not None:
        kept = cfg.model_copy(update={"grad_accum": saved.num_micro_batches, "chosen": cfg.chosen | saved.chosen})
        if not any(kept.conflicts(num_processes)):
            return kept
    found = cfg.model_copy(update={"grad_accum": 1})
    if not cfg.trains:
        return found  # nothing is trained
    found = with_micro_batch(found, num_processes, _usual(device_type), slack=4)
    why = f"{micro_batch_size(found, num_processes)} images at once in each process: not measured"
    if depends_on_micro_batch(cfg):
        what = "model.grn_scope = batch" if isinstance(cfg, PretrainConfig) else "BatchNorm"
        why = f"the whole batch, as {what} pools over what is computed at once"
    return found.model_copy(update={"chosen": cfg.chosen | {"grad_accum": why}})


def depends_on_micro_batch(cfg: RunConfig) -> bool:
    """Whether GRN or BatchNorm pools over what is computed at once, so that its size changes the result."""
    if isinstance(cfg, PretrainConfig):
        return cfg.model.grn_scope == "batch"
    return isinstance(cfg, DenseConfig) and cfg.model.spec is not None and cfg.model.spec.has_batch_norm
