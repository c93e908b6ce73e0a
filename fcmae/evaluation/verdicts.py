"""The questions that people have about their runs, and what the numbers answer."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fcmae.evaluation.charts import shown
from fcmae.evaluation.runs import Run, curve, is_untrained
from fcmae.training import health

K = 20  # neighbours: to take the best of several would be to choose by the test images
PROBES = {"linear": "Linear probes", "knn": "Nearest neighbours"}
BUDGET = ("epochs", "batch_size", "data.image_size")  # what runs must share to be compared
# Of 3 runs of either kind all of one are ahead of all of the other by chance once in 20 times, of 2 once in 6.
LEAST_RUNS = 3
LEARNT = 0.97  # a loss below shows that something was learnt, where predicting each patch's mean scores 1


@dataclass(frozen=True)
class Verdict:
    """An answer in plain words. state: good, attention or unknown."""

    question: str
    state: str
    answer: str
    sentences: list[str]


def is_working(runs: Sequence[Run]) -> Verdict:
    """Whether the loss of a pretraining falls, and whether a classifier is better than a guess."""
    return _verdict(
        "Is it working?",
        {"good": "✓ Yes", "attention": "! Look closer", "unknown": "? Too early to tell"},
        _named(runs, [_working(run) for run in runs]),
    )


def _working(run: Run) -> tuple[str, list[str]]:
    loss, val_loss = curve(run, "loss", "loss"), curve(run, "val_loss", "val_loss")
    scored = [line for line in run.lines if "top1" in line]
    found = [finding.text for finding in health.warnings(run.lines) if finding.kind in ("loss", "data")]
    state, sentences = "attention" if found else "unknown", [text[0].upper() + text[1:] for text in found]
    if loss is not None:
        held_out = f" ({shown(val_loss.values[-1])} on held-out images)" if val_loss is not None else ""
        sentence = (
            f"The loss went from {shown(loss.values[0])} to {shown(loss.values[-1])}{held_out} by epoch "
            f"{loss.epochs[-1]:.4g} of {run.settings.get('epochs')}{trend(loss.values)}."
        )
        if run.kind == "pretrain" and run.settings.get("model.normalize_target"):
            learnt = (val_loss or loss).values[-1] < LEARNT
            state = "good" if learnt and not found else state
            sentence += " Painting every patch in its own mean colour scores 1"
            sentence += "." if learnt else ", so next to nothing is learnt yet."
        elif run.kind == "pretrain" and loss.values[-1] < loss.values[0]:
            state = "attention" if found else "good"
        sentences.insert(0, sentence)
    if scored and run.counts.get("classes"):
        score, guess, num = _score(scored[-1]), 1 / run.counts["classes"], run.counts["held out"]
        noise = 2 * standard_error(guess, run.class_counts)
        sentences.insert(0, f"Balanced accuracy is {score:.3f} on {num:,} held-out images; a guess scores {guess:.3f}.")
        if not found:
            state = "good" if score > guess + noise else "attention"
    return state, sentences or ["Nothing is logged yet."]


def trend(values: Sequence[float]) -> str:
    """Where a noisy curve is going: its last fifth against the one before, at two standard errors. "" if short."""
    num = len(values) // 5
    if num < 4:
        return ""
    before, after = np.asarray(values[-2 * num : -num], float), np.asarray(values[-num:], float)
    error = math.sqrt((before.var(ddof=1) + after.var(ddof=1)) / num)
    change = float(after.mean() - before.mean())
    if abs(change) <= 2 * error:
        return "; of late it has not changed by more than its noise"
    return " and is still falling" if change < 0 else "; of late it has been rising"


def is_collapsing(runs: Sequence[Run]) -> Verdict:
    """What the monitors of the pretraining runs say of their features."""
    return _verdict(
        "Are the features collapsing?",
        {"good": "✓ No sign of it", "attention": "! Look closer", "unknown": "? Not known"},
        _named(runs, [_collapsing(run) if run.kind == "pretrain" else ("unknown", []) for run in runs]),
    )


def _collapsing(run: Run) -> tuple[str, list[str]]:
    watched = [line for line in run.lines if any(key.startswith("cosine_distance/") for key in line)]
    if not watched:
        return "unknown", [
            "It was not watched: monitor.num_images turns that on, and `fcmae analyze` looks afterwards."
        ]
    found = [f.text for f in health.warnings(run.lines) if f.kind in ("cosine_distance", "effective_rank")]
    sentences = [text[0].upper() + text[1:] for text in found]
    distances = {key: value for key, value in watched[-1].items() if key.startswith("cosine_distance/")}
    lowest = min(distances, key=lambda key: distances[key])
    sentences.append(
        f"At epoch {watched[-1]['epoch']:.4g} the cosine distance between channels is lowest in "
        f"{lowest.partition('/')[2]}: {distances[lowest]:.3f}, where 0.5 means unrelated and 0 all the same."
    )
    enough = len(watched) >= health.LEAST_EVALUATIONS
    if not enough:
        sentences.append(f"That is evaluation {len(watched)}; a judgement takes {health.LEAST_EVALUATIONS}.")
    return "attention" if found else "good" if enough else "unknown", sentences


def was_worth_it(runs: Sequence[Run]) -> Verdict:
    """Fine-tuning from given weights against scratch, and probes against an untrained network, where they are there."""
    found = [*_against_scratch(runs), *_named(runs, [_against_untrained(run) for run in runs])]
    if not any(sentences for _, sentences in found):
        path = next((shlex.quote(str(run.path)) for run in runs if run.kind == "pretrain"), "RUN")
        remedy = (
            f"Not measured yet. `fcmae evaluate {path} random:{path} --data LABELLED` compares "
            "with an untrained network; or fine-tune with and without --model.init and give all runs to `fcmae report`."
        )
        found = [("unknown", [remedy])]
    found += _named(runs, [("unknown", _neighbours(run)) for run in runs])
    answers = {"good": "✓ Yes, so far", "attention": "! No clear gain", "unknown": "? Not known"}
    return _verdict("Was it worth it?", answers, found)


def _against_scratch(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Fine-tuning runs on as many images that are scored on the same ones."""
    groups: dict[tuple[Any, ...], tuple[list[float], list[float]]] = {}
    for run in runs:
        scored = [line for line in run.lines if "top1" in line]
        if run.kind == "finetune" and scored and not run.settings.get("eval_only"):
            budget = [str(run.settings.get(key)) for key in BUDGET]
            group = groups.setdefault((run.counts.get("to learn from", 0), run.held_out, *budget), ([], []))
            group[run.settings.get("model.init") is None].append(_score(scored[-1]))
    found = []
    for (num_images, *_), (started, scratch) in groups.items():
        if not started or not scratch:
            continue
        few = min(len(started), len(scratch)) < LEAST_RUNS
        if few:
            state = "unknown" if np.mean(started) > np.mean(scratch) else "attention"
        else:
            state = "good" if min(started) > max(scratch) else "attention"
        each = [f"{np.mean(values):.3f} ({', '.join(f'{v:.3f}' for v in values)})" for values in (started, scratch)]
        sentence = (
            f"Fine-tuned on {num_images:,} images, the last balanced accuracy is {each[0]} from given weights and "
            f"{each[1]} from scratch."
        )
        if few:
            sentence += f" Fewer than {LEAST_RUNS} runs of a kind show little: other seeds may turn it round."
        found.append((state, [sentence]))
    return found


def _against_untrained(run: Run) -> tuple[str, list[str]]:
    """The run's own probe against the one of an untrained network, on the same test images."""
    name = run.path.resolve().name
    own = [
        (found, best)
        for folder, found in run.evaluations.items()
        if folder == run.path / "evaluation" or Path(str(found.get("model"))).name == name
        if not is_untrained(found) and (best := _best_probe(found)) is not None
    ]
    if not own:
        return "unknown", []
    evaluation, (probe, score) = own[0]
    data = evaluation["data"]
    sizes = [sum(row) for row in evaluation["confusion"]["matrix"]]  # test images of each class
    sentence = (
        f"{PROBES[probe]} on the last stage's features score {score:.3f} in balanced accuracy on {data['num_test']:,} "
        f"images; a guess scores {1 / len(data['class_names']):.3f}."
    )
    for other in run.evaluations.values():
        untrained = _best_probe(other, probe)
        if is_untrained(other) and other.get("data") == data and untrained is not None:
            low = untrained[1]
            noise = 2 * math.hypot(standard_error(score, sizes), standard_error(low, sizes))
            gain = "more than chance would give" if score > low + noise else "no more than chance would give"
            sentence += f" An untrained network scores {low:.3f}: the gain is {gain}."
            return "good" if score > low + noise else "attention", [sentence]
    return "unknown", [f"{sentence} What an untrained network scores was not measured."]


def _neighbours(run: Run) -> list[str]:
    """What was watched of labelled images while training."""
    found = curve(run, "knn_balanced_accuracy", "")
    if found is None:
        return []
    first, last = (f"{found.values[i]:.3f} at epoch {found.epochs[i]:.4g}" for i in (0, -1))
    return [f"While training, nearest neighbours had a balanced accuracy of {first} and {last}."]


def standard_error(score: float, class_counts: Sequence[int]) -> float:
    """Of a balanced accuracy near `score`: the mean of the classes' recalls, each of so many images."""
    found = [count for count in class_counts if count]
    return math.sqrt(score * (1 - score) * sum(1 / count for count in found)) / max(1, len(found))


def _best_probe(evaluation: Mapping[str, Any], probe: str | None = None) -> tuple[str, float] | None:
    """The linear probe of the last stage, else nearest neighbours, and its balanced accuracy."""
    try:
        for name in (probe,) if probe else tuple(PROBES):
            scores = [
                float(result["scores"]["balanced_accuracy"])
                for result in evaluation["results"]
                if result["probe"] == name and result["stage"] == 4 and result["setting"].get("k", K) == K
            ]
            if scores and evaluation["data"]["class_names"] and evaluation["confusion"]["matrix"]:
                return name, scores[0]
    except (KeyError, TypeError, ValueError):
        pass  # the chapter of the run says what is wrong with the file
    return None


def _score(line: Mapping[str, Any]) -> float:
    """Balanced accuracy, of the moving average where there is one."""
    return float(line.get("ema_balanced_accuracy", line.get("balanced_accuracy", 0)))


def _named(runs: Sequence[Run], found: Iterable[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """The sentences with the name of their run, where there are several."""
    if len(runs) == 1:
        return list(found)
    named = zip(runs, found, strict=True)
    return [(state, [f"{run.name}: {sentence}" for sentence in sentences]) for run, (state, sentences) in named]


def _verdict(question: str, answers: Mapping[str, str], found: Sequence[tuple[str, list[str]]]) -> Verdict:
    """Of several runs the state is that of the one that needs most attention."""
    states = [state for state, sentences in found if sentences]
    state = next((state for state in ("attention", "good") if state in states), "unknown")
    return Verdict(question, state, answers[state], [sentence for _, sentences in found for sentence in sentences])
