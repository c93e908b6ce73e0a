"""Questions about runs, and the answers that the numbers give."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fcmae.config import FREE_ON_RESUME
from fcmae.evaluation.charts import shown
from fcmae.evaluation.records import EvaluationRecord
from fcmae.evaluation.runs import OF_A_START, RunFiles, curve, is_untrained
from fcmae.training import health
from fcmae.training.records import NOT_FINITE, last_failure, last_state, of_model

K = 20  # neighbours; taking the best of several numbers would be a choice by the test images
PROBES = {"linear": "Linear probes", "knn": "Nearest neighbours"}
# What runs must share to be compared, beside the network.
BUDGET = ("epochs", "batch_size", "data.image_size", "model.head")
COMPARED = {"finetune": ("balanced_accuracy", "balanced accuracy"), "segment": ("miou", "mean IoU")}  # key, in words
# With 3 runs of each kind, all of one are ahead of all of the other by chance once in 20 times; with 2, once in 6.
LEAST_RUNS = 3
LEARNT = 0.97  # a loss below this shows that something was learnt; predicting each patch's mean scores 1

Found = tuple[str, list[str]]  # a state (good, attention or unknown), and sentences


class Verdict(NamedTuple):
    """An answer in plain words.

    Attributes:
        question: what is answered.
        state: good, attention or unknown.
        answer: in a few words.
        sentences: what it rests on.
    """

    question: str
    state: str
    answer: str
    sentences: list[str]


def is_working(runs: Sequence[RunFiles]) -> Verdict:
    """Whether the loss of a pretraining falls, and whether a classifier is better than a guess."""
    answers = {"good": "✓ Yes", "attention": "! Look closer", "unknown": "? Too early to tell"}
    return _verdict("Is it working?", answers, _named(runs, map(_working, runs)))


def _working(run: RunFiles) -> Found:
    loss, val_loss = curve(run, "loss", "loss"), curve(run, "val_loss", "val_loss")
    scored = [line for line in run.lines if "top1" in line]
    sentences = _warnings(run, "loss", "data")
    worrying = bool(sentences)
    state = "attention" if worrying else "unknown"
    if loss is not None:
        held_out = f" ({shown(val_loss.values[-1])} on held-out images)" if val_loss is not None else ""
        sentence = (
            f"The loss went from {shown(loss.values[0])} to {shown(loss.values[-1])}{held_out} by epoch "
            f"{loss.epochs[-1]:.4g} of {run.settings.get('epochs')}{trend(loss.values)}."
        )
        judged = val_loss if val_loss is not None and len(val_loss.values) > 1 else loss
        learnt = run.kind == "pretrain" and judged.values[-1] < LEARNT * judged.values[0]
        if run.kind == "pretrain" and run.settings.get("model.normalize_target"):
            learnt = (val_loss or loss).values[-1] < LEARNT
            sentence += " Painting every patch in its own mean colour scores 1"
            sentence += "." if learnt else ", so next to nothing is learnt yet."
        state = "good" if learnt and not worrying else state
        sentences.insert(0, sentence)
    if run.kind == "segment" and (found := [line for line in run.lines if "miou" in line]):
        miou = of_model(found[-1], "miou")
        if (guess := found[-1].get("largest_class_miou")) is None:  # of an earlier version
            sentences.insert(0, f"Mean IoU is {miou:.3f}.")
        else:
            sentences.insert(0, f"Mean IoU is {miou:.3f}; the largest class everywhere scores {guess:.3f}.")
            state = "good" if miou > guess and not worrying else "attention"
    if scored and run.counts.get("classes"):
        score, guess = _score(scored[-1]), guessed(run.class_counts or [1] * run.counts["classes"])
        sentences.insert(
            0,
            f"Balanced accuracy is {score:.3f} on {run.counts['held out']:,} held-out images; a guess scores "
            f"{guess:.3f}.",
        )
        better = score > guess + 2 * standard_error(guess, run.class_counts)
        state = "good" if better and not worrying else "attention"
    if last_state(run.path) == "failed" and (why := last_failure(run.path)) and why.startswith(NOT_FINITE):
        state = "attention"
        sentences.append(f"It broke down, and would probably again: {why.removeprefix(NOT_FINITE)}.")
    return state, sentences or ["Nothing is logged yet."]


def _warnings(run: RunFiles, *kinds: str) -> list[str]:
    """What training warned of, or would have warned of, as sentences."""
    texts = [finding.text for finding in health.warnings(run.lines) if finding.kind in kinds]
    return [text[0].upper() + text[1:] for text in texts]


def trend(values: Sequence[float]) -> str:
    """Trend of a noisy curve: its last fifth against the one before, at two standard errors; "" if it is short."""
    num = len(values) // 5
    if num < 4:
        return ""
    before, after = np.asarray(values[-2 * num : -num], float), np.asarray(values[-num:], float)
    error = math.sqrt((before.var(ddof=1) + after.var(ddof=1)) / num)
    change = float(after.mean() - before.mean())
    if abs(change) <= 2 * error:
        return "; of late it has not changed by more than its noise"
    return " and is still falling" if change < 0 else "; of late it has been rising"


def is_collapsing(runs: Sequence[RunFiles]) -> Verdict:
    """What the monitors of the pretraining runs say about their features."""
    answers = {"good": "✓ No sign of it", "attention": "! Look closer", "unknown": "? Not known"}
    found = (_collapsing(run) if run.kind == "pretrain" else ("unknown", []) for run in runs)
    return _verdict("Are the features collapsing?", answers, _named(runs, found))


def _collapsing(run: RunFiles) -> Found:
    watched = [line for line in run.lines if any(key.startswith("cosine_distance/") for key in line)]
    if not watched:
        remedy = "monitor.num_images turns that on, and `fcmae analyze` looks afterwards"
        return "unknown", [f"It was not watched: {remedy}."]
    sentences = _warnings(run, "cosine_distance", "effective_rank")
    state = "attention" if sentences else "good" if len(watched) >= health.LEAST_EVALUATIONS else "unknown"
    distances = {value: key for key, value in watched[-1].items() if key.startswith("cosine_distance/")}
    lowest = min(distances)
    sentences.append(
        f"At epoch {watched[-1]['epoch']:.4g} the cosine distance between channels is lowest in "
        f"{distances[lowest].partition('/')[2]}: {lowest:.3f}, where 0.5 means unrelated and 0 all the same."
    )
    if len(watched) < health.LEAST_EVALUATIONS:
        sentences.append(f"That is evaluation {len(watched)}; a judgement takes {health.LEAST_EVALUATIONS}.")
    return state, sentences


def was_worth_it(runs: Sequence[RunFiles], *, else_how: bool = True) -> Verdict:
    """Runs on labels from given weights against scratch, and probes against an untrained network, if present.

    Args:
        runs: all.
        else_how: say how to measure it, where it was not.
    """
    found = [*_against_scratch(runs), *_named(runs, map(_against_untrained, runs))]
    if else_how and not any(sentences for _, sentences in found):
        path = next((shlex.quote(str(run.path)) for run in runs if run.kind == "pretrain"), "RUN")
        remedy = (
            f"Not measured yet. `fcmae evaluate {path} random:{path} --data LABELLED` compares "
            "with an untrained network; or fine-tune with and without --model.init and give all runs to `fcmae report`."
        )
        found = [("unknown", [remedy])]
    found += _named(runs, (("unknown", _neighbours(run)) for run in runs))
    answers = {"good": "✓ Yes, so far", "attention": "! No clear gain", "unknown": "? Not known"}
    return _verdict("Was it worth it?", answers, found)


def _against_scratch(runs: Sequence[RunFiles]) -> list[Found]:
    """Compare runs of a kind with equally many training images and the same test images; repetitions count once."""
    groups: dict[tuple[Any, ...], dict[str | None, dict[Any, RunFiles]]] = {}  # by what is started from, by seed
    others: dict[tuple[Any, ...], list[str]] = {}
    for run in runs:
        scored = _scored(run)
        if scored and not run.settings.get("eval_only") and _is_complete(run, scored[-1]):
            network = run.starts[-1].get("network") if run.starts else None
            budget = [str(network), *(str(run.settings.get(key)) for key in BUDGET)]
            key = (run.kind, run.counts.get("to learn from", 0), run.held_out, *budget)
            init = run.settings.get("model.init")
            init = init if init is None else str(init)
            first = groups.setdefault(key, {}).setdefault(init, {}).setdefault(str(run.settings.get("seed")), run)
            if _own_settings(run) != _own_settings(first):
                others.setdefault((key, init), []).append(run.name)
    found = []
    pairs = (
        (key, init, list(kinds[init].values()), list(kinds.get(None, {}).values()))
        for key, kinds in groups.items()
        for init in kinds
        if init is not None
    )
    for key, init, started_runs, scratch_runs in pairs:
        is_classifier, (metric, words) = started_runs[0].kind == "finetune", COMPARED[started_runs[0].kind]
        num_images = key[1]
        started, scratch = (
            [float(of_model(_scored(run)[-1], metric)) for run in each] for each in (started_runs, scratch_runs)
        )
        if not scratch:
            continue
        few = min(len(started), len(scratch)) < LEAST_RUNS
        ahead = min(started) > max(scratch)
        each = [f"{np.mean(values):.3f} ({', '.join(f'{v:.3f}' for v in values)})" for values in (started, scratch)]
        sentence = (
            f"{'Fine-tuned' if is_classifier else 'Trained'} on {num_images:,} images, the last {words} is {each[0]} "
            f"from {'given weights' if len(groups[key]) == 2 else init} and {each[1]} from scratch."
        )
        if differing := _differing(started_runs, scratch_runs):
            sentence += f" They differ in {', '.join(differing)} too."
        if few:
            sentence += (
                f" Fewer than {LEAST_RUNS} runs of a kind show little: other seeds, on the same data.val_path, may "
                f"turn it round{'; `fcmae worth` runs them' if is_classifier else ''}."
            )
        if left_out := [*others.get((key, init), []), *others.get((key, None), [])]:
            sentence += (
                f" Left out, as another run of the same start and seed has other settings: {', '.join(left_out)}."
            )
        found.append(("unknown" if few else "good" if ahead else "attention", [sentence]))
    return found


def _scored(run: RunFiles) -> list[dict[str, float]]:
    """The lines that have what runs of its kind are compared by; none of a pretraining."""
    return [line for line in run.lines if run.kind in COMPARED and COMPARED[run.kind][0] in line]


def _own_settings(run: RunFiles) -> dict[str, Any]:
    return {key: value for key, value in run.settings.items() if key not in OF_A_START | {"out"}}


def _differing(runs: Sequence[RunFiles], others: Sequence[RunFiles]) -> list[str]:
    """Settings of the recipe in which two kinds of runs differ, but for the layer decay, which is for weights."""
    recipe = ("data.", "optim.", "regularization.", "model.drop_path_rate", "precision")
    keys = {key for run in (*runs, *others) for key in run.settings if key.startswith(recipe)}
    # What comes from weights, which images are drawn, and what does not change the numbers.
    keys -= FREE_ON_RESUME | {"optim.layer_decay", "data.mean", "data.std"}
    values = [{key: {str(run.settings.get(key)) for run in side} for key in keys} for side in (runs, others)]
    return sorted(key for key in keys if values[0][key] != values[1][key])


def _is_complete(run: RunFiles, line: Mapping[str, Any]) -> bool:
    """Whether a line is of the run's last epoch: an unfinished run is not compared with a finished one."""
    epochs = run.settings.get("epochs")
    return not isinstance(epochs, int | float) or line["epoch"] > 0.99 * epochs


def _against_untrained(run: RunFiles) -> Found:
    """The run's own probe against the one of an untrained network, on the same test images."""
    for folder, evaluation in run.evaluations.items():
        if run.is_own(folder, evaluation) and (best := _best_probe(evaluation)) is not None:
            break
    else:
        return "unknown", []
    (probe, score), data = best, evaluation["data"]
    assert evaluation["confusion"] is not None
    sizes = [sum(row) for row in evaluation["confusion"]["matrix"]]  # test images of each class
    sentence = (
        f"{PROBES[probe]} on the last stage's features score {score:.3f} in balanced accuracy on {data['num_test']:,} "
        f"images; a guess scores {guessed(sizes):.3f}."
    )
    step, last = evaluation.get("step"), run.lines[-1]["step"] if run.lines else 0
    late = run.kind == "pretrain" and step is not None and step < last  # of a fine-tuning the best is of an earlier one
    if late:
        sentence += f" That was at step {step:,} of {last:,}: evaluate it again."
    for other in run.evaluations.values():
        untrained = _best_probe(other, probe)
        if is_untrained(other) and other.get("data") == data and untrained is not None:
            low = untrained[1]
            more = score > low + 2 * math.hypot(standard_error(score, sizes), standard_error(low, sizes))
            gain = "more than chance would give" if more else "no more than chance would give"
            sentence += f" An untrained network scores {low:.3f}: the gain is {gain}."
            return "unknown" if late else "good" if more else "attention", [sentence]
    return "unknown", [f"{sentence} What an untrained network scores was not measured."]


def _neighbours(run: RunFiles) -> list[str]:
    """What was measured on labelled images during training."""
    found = curve(run, "knn_balanced_accuracy", "")
    if found is None:
        return []
    first, last = (f"{found.values[i]:.3f} at epoch {found.epochs[i]:.4g}" for i in (0, -1))
    return [f"While training, nearest neighbours had a balanced accuracy of {first} and {last}."]


def guessed(class_counts: Sequence[int]) -> float:
    """The balanced accuracy of a guess, which is over the classes that occur in the images."""
    return 1 / max(1, sum(map(bool, class_counts)))


def standard_error(score: float, class_counts: Sequence[int]) -> float:
    """Standard error of a balanced accuracy near `score`: the mean of the classes' recalls, each over its images."""
    found = [count for count in class_counts if count]
    return math.sqrt(score * (1 - score) * sum(1 / count for count in found)) / max(1, len(found))


def _best_probe(evaluation: EvaluationRecord, probe: str | None = None) -> tuple[str, float] | None:
    """The linear probe of the last stage, else nearest neighbours, and its balanced accuracy."""
    # Earlier ones lack it.
    num_stages = evaluation.get("num_stages") or max((each["stage"] or 0 for each in evaluation["results"]), default=0)
    for name in (probe,) if probe else PROBES:
        for result in evaluation["results"]:
            found = result["scores"].get("balanced_accuracy")
            last = result["probe"] == name and result["stage"] == num_stages and result["setting"].get("k", K) == K
            if last and found is not None and evaluation["confusion"] and evaluation["confusion"]["matrix"]:
                return name, found
    return None


def _score(line: Mapping[str, Any]) -> float:
    """Balanced accuracy."""
    return float(of_model(line, "balanced_accuracy") or 0)


def _named(runs: Sequence[RunFiles], found: Iterable[Found]) -> list[Found]:
    """The sentences with the name of their run, if there are several."""
    start = ["" if len(runs) == 1 else f"{run.name}: " for run in runs]
    return [(state, [name + text for text in texts]) for name, (state, texts) in zip(start, found, strict=True)]


def _verdict(question: str, answers: Mapping[str, str], found: Sequence[Found]) -> Verdict:
    """With several runs, the state is that of the one that needs most attention."""
    states = [state for state, sentences in found if sentences]
    state = next((state for state in ("attention", "good") if state in states), "unknown")
    return Verdict(question, state, answers[state], [sentence for _, sentences in found for sentence in sentences])
