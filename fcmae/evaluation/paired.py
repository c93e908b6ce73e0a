"""Results of `fcmae worth`: scores of several starts with the same labels and seeds, their differences, a verdict.

OUT/worth.json holds a `Comparison`, and what follows from it: the rows of its table, and the verdict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal, NamedTuple

from markupsafe import escape
from pydantic import Field, FiniteFloat, TypeAdapter
from typing_extensions import NotRequired, TypedDict

from fcmae.evaluation.charts import COLOURS, LAYOUT, Chart, Table
from fcmae.evaluation.probes import mean_and_interval
from fcmae.evaluation.records import Count, Share
from fcmae.evaluation.runs import read_json
from fcmae.evaluation.verdicts import LEAST_RUNS, Verdict
from fcmae.tables import table

FILE = "worth.json"
METRIC = "balanced_accuracy"  # what is compared; worth.json has the others too
COLUMNS = ("labels", "start", "seeds", "balanced accuracy", "against scratch, of each seed", "")


class Arm(TypedDict):
    """One arm of the comparison.

    Attributes:
        name: of the arm.
        kind: a baseline without a network; random weights; or given weights.
        against: the arm from scratch, of the same network, that it is compared with; None for that one.
        network: in words; None for a control.
        init: where the weights are.
        license: licence of the weights, if they state one.
    """

    name: str
    kind: Literal["control", "scratch", "start"]
    against: str | None
    network: str | None
    init: str | None
    license: str | None


class Amount(TypedDict):
    """An amount of labels as it was given, the number of labels, and the epochs on them."""

    labels: str
    num_labels: Count
    epochs: FiniteFloat


class Score(TypedDict):
    """Scores of an arm on the test images, by name."""

    arm: str
    labels: str
    seed: Count
    scores: dict[str, Share]


class Comparison(TypedDict):
    """What is read from a worth.json.

    Attributes:
        num_train: images from which labels are drawn.
        num_test: test images.
        num_classes: of both.
        num_tested: classes that have a test image; if absent, all.
        notes: sentences on what was done.
        arms: controls, then from scratch, then from weights.
        amounts: in the order in which they were given.
        scores: so far.
        num_runs: number of training runs in total.
        num_done: number of those that are done.
        command: the command that made it, or resumes it.
        directory: where that was typed, if it is known.
    """

    num_train: Count
    num_test: Count
    num_classes: Annotated[int, Field(ge=2)]
    num_tested: NotRequired[Annotated[int, Field(ge=1)]]
    notes: list[str]
    arms: list[Arm]
    amounts: list[Amount]
    scores: list[Score]
    num_runs: Count
    num_done: Count
    command: str
    directory: NotRequired[str]


COMPARISON = TypeAdapter(Comparison)
Mean = tuple[float, tuple[float, float] | None]  # and its 95 % interval


ALIKE = 1e-9  # scores that are as close differ by rounding
LEAST_ALIKE = 6  # this many have one sign by chance once in 32 times


class Row(NamedTuple):
    """An arm at an amount of labels.

    Attributes:
        labels: the amount.
        arm: its name.
        num: number of seeds.
        mean: mean score, 0..1.
        gain: mean of the differences to scratch, seed by seed; None for scratch itself, or before there is a pair.
        told: what the differences say, see `tell`.
        num_pairs: number of seeds for which scratch has a score too.
        chance: how likely differences as large are where there is none (p of the paired t-test); 1 of too few runs.
    """

    labels: str
    arm: str
    num: int
    mean: Mean
    gain: Mean | None
    told: str
    num_pairs: int = 0
    chance: float = 1.0


def tell(differences: Sequence[float]) -> str:
    """What the 95 % interval of paired differences says, of three seeds or more: two may agree by chance.

    Args:
        differences: one per seed.

    Returns:
        better, worse, no difference seen, or too few runs; this also if the gains of few seeds are exactly equal, as
        happens with few test images.
    """
    interval = mean_and_interval(differences)[1] if len(differences) >= LEAST_RUNS else None
    alike = max(differences) - min(differences) < ALIKE and abs(differences[0]) >= ALIKE
    if interval is None or (alike and len(differences) < LEAST_ALIKE):
        return "too few runs"
    if max(map(abs, differences)) < ALIKE:  # rounding
        return "no difference seen"
    return "better" if interval[0] > 0 else "worse" if interval[1] < 0 else "no difference seen"


def compare(found: Comparison) -> list[Row]:
    """The rows of the table: each arm that has scores, amount by amount.

    Args:
        found: the comparison, as far as it has come.
    """
    rows = []
    for amount in found["amounts"]:
        by_arm = _by_arm(found, amount["labels"])
        for arm in found["arms"]:
            scores, other = by_arm[arm["name"]], by_arm.get(arm["against"] or "", {})
            gains = [score - other[seed] for seed, score in scores.items() if seed in other]
            if scores:
                gain = mean_and_interval(gains) if gains else None
                told = tell(gains) if gains else ""
                values = list(scores.values())
                mean = mean_and_interval(values)
                chance = _chance(gains) if told not in ("", "too few runs") else 1.0
                rows.append(Row(amount["labels"], arm["name"], len(values), mean, gain, told, len(gains), chance))
    return rows


def _chance(differences: Sequence[float]) -> float:
    from scipy import stats

    if max(differences) - min(differences) < ALIKE:
        return 1.0 if abs(differences[0]) < ALIKE else 2.0 ** (1 - len(differences))  # of one sign by chance
    return float(stats.ttest_1samp(differences, 0).pvalue)


def certain(rows: Sequence[Row]) -> list[Row]:
    """Rows with a difference that the number of rows does not explain: at 5 % for all together, by Holm's method.

    Args:
        rows: each with a difference.
    """
    found = list[Row]()
    for row in sorted(rows, key=lambda row: row.chance):
        if row.chance > 0.05 / (len(rows) - len(found)):
            break
        found.append(row)
    return found


def _by_arm(found: Comparison, labels: str) -> dict[str, dict[int, float]]:
    """The scores of each arm with this amount of labels, by seed."""
    by_arm: dict[str, dict[int, float]] = {arm["name"]: {} for arm in found["arms"]}
    for score in found["scores"]:
        if score["labels"] == labels and METRIC in score["scores"]:
            by_arm[score["arm"]][score["seed"]] = score["scores"][METRIC]
    return by_arm


def cells(row: Row) -> list[str]:
    """A row as texts, in the columns of COLUMNS: per cent and points, intervals in brackets."""
    gain = "" if row.gain is None else in_percent(row.gain, "+.1f")
    num = str(row.num) if row.gain is None or row.num_pairs == row.num else f"{row.num}, {row.num_pairs} of scratch too"
    return [_amount(row.labels), row.arm, num, in_percent(row.mean, ".1f"), gain, row.told]


def in_percent(value: Mean, form: str) -> str:
    """A mean in per cent, and its interval in brackets.

    Args:
        value: 0..1, and its interval, if it has one.
        form: of each number, as `format` has it.
    """
    mean, interval = value
    text = format(100 * mean, form)
    return text if interval is None else f"{text} [{', '.join(format(100 * end, form) for end in interval)}]"


def _amount(labels: str) -> str:
    if labels.endswith("%"):
        return "all labels" if labels == "100%" else f"{labels[:-1]} % of the labels"
    return f"{labels} labels a class"


def verdict(found: Comparison) -> Verdict:
    """Whether starting from weights is worth it, in plain words.

    Args:
        found: the comparison, as far as it has come.
    """
    rows = compare(found)
    starts = {arm["name"] for arm in found["arms"] if arm["kind"] == "start"}
    controls = {arm["name"] for arm in found["arms"] if arm["kind"] == "control"}
    sentences, needless = [], set[str]()
    for name in sorted(starts, key=[arm["name"] for arm in found["arms"]].index):
        if parts := [_gained(row) for row in rows if row.arm == name and row.gain is not None]:
            sentences.append(f"Starting from {name}, against scratch: {'; '.join(parts)}.")
    for amount in found["amounts"]:
        labels = amount["labels"]
        scores = {arm: by_seed for arm, by_seed in _by_arm(found, labels).items() if by_seed}
        plain = max((arm for arm in scores if arm in controls), key=lambda arm: fmean(scores[arm].values()), default="")
        # Of each network and of each baseline without one, on the seeds that both have.
        pairs = [_on_same_seeds(scores[arm], scores.get(plain, {})) for arm in scores if arm not in controls]
        if plain and pairs and all(pair is not None and pair[0] <= pair[1] for pair in pairs):
            needless.add(labels)
            best, its_plain = max(pair for pair in pairs if pair is not None)
            sentences.append(
                f"With {_amount(labels)}, {plain} and a linear classifier score {100 * its_plain:.1f}, no less than "
                f"any network ({100 * best:.1f}): these labels hardly need one."
            )
    judged = [row for row in rows if row.arm in starts and row.told not in ("", "too few runs")]
    sure = certain(judged)
    ahead = [row for row in sure if row.told == "better"]
    gained, state = {row.labels for row in ahead}, "attention"
    if ahead and len(ahead) < len(sure):
        answer = "! It depends"
    elif ahead and gained <= needless:
        answer = "! It gains, where no network is needed"
    elif ahead:
        where = "" if len(ahead) == len(judged) else f", in {len(ahead)} of {len(judged)} comparisons"
        state, answer = "good", f"✓ Yes{where}"
    elif sure:
        answer = "! No, it loses"
    elif num := sum(row.told != "no difference seen" for row in judged):
        answer = f"! No clear gain: {num} of {len(judged)} comparisons differ, which may be chance"
    elif judged:
        answer = "! No clear gain"
    else:
        state, answer = "unknown", "? Too early to tell"
    return Verdict("Is pretraining worth it?", state, answer, sentences)


def _on_same_seeds(scores: Mapping[int, float], others: Mapping[int, float]) -> tuple[float, float] | None:
    seeds = scores.keys() & others.keys()
    return (fmean(scores[s] for s in seeds), fmean(others[s] for s in seeds)) if seeds else None


def _gained(row: Row) -> str:
    assert row.gain is not None
    mean, interval = 100 * row.gain[0], row.gain[1]
    where = f"with {_amount(row.labels)}"
    if row.told == "too few runs" or interval is None:
        few = "1 seed is" if row.num_pairs == 1 else f"{row.num_pairs} seeds are"
        return f"{where} {few} too few to tell ({mean:+.1f} points)"
    low, high = (100 * end for end in interval)
    if row.told == "better":
        return f"{where} it gained {mean:.1f} points (95 % interval {low:.1f} to {high:.1f})"
    if row.told == "worse":
        return f"{where} it lost {-mean:.1f} points (95 % interval {-high:.1f} to {-low:.1f})"
    return f"{where} it cannot be told ({mean:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f})"


def notes(found: Comparison) -> list[str]:
    """What a reader of the numbers should know besides, in sentences."""
    labels = ", ".join(f"{_amount(a['labels'])}: {a['num_labels']:,}, {a['epochs']:g} epochs" for a in found["amounts"])
    told = [
        f"{found['num_train']:,} images to draw labels from, {found['num_test']:,} to test on, {found['num_classes']} "
        f"classes; a guess scores {100 / found.get('num_tested', found['num_classes']):.1f}. {labels}.",
        "Scores are of the last step, in %; in brackets the 95 % interval of the mean over the seeds (Student's t), of "
        "which one in twenty misses by chance; the verdict counts what holds for all comparisons together at 5 % (by "
        "Holm's method). A seed draws the same labels, order and head for every start, and all are tested on the same "
        "images: what others would give, the interval does not tell.",
    ]
    if any(amount["num_labels"] == found["num_train"] for amount in found["amounts"]):
        told.append("With all labels the seeds differ in order and head alone.")
    told += [f"{arm['name']}: {arm['network']}." for arm in found["arms"] if arm["kind"] == "scratch"]
    told += [
        f"The weights of {arm['name']} have the licence {arm['license']}." for arm in found["arms"] if arm["license"]
    ]
    if found["num_done"] < found["num_runs"]:
        told.append(f"{found['num_done']} of {found['num_runs']} runs are done.")
    return [*told, *found["notes"]]


def summary(found: Comparison) -> str:
    """The table, the notes on it, and the verdict.

    Args:
        found: the comparison, as far as it has come.
    """
    said = verdict(found)
    rows = table(COLUMNS, map(cells, compare(found)), left=2)
    return "\n".join([rows, "", *notes(found), "", f"{said.question} {said.answer}", *said.sentences])


def read(path: Path, problems: list[str]) -> Comparison | None:
    """Read a directory's worth.json.

    Args:
        path: the directory.
        problems: a sentence is added if it cannot be read.

    Returns:
        None if there is none that can be read.
    """
    found: Comparison | None = read_json(path / FILE, COMPARISON, "run `fcmae worth` again", problems)
    names = {arm["name"] for arm in found["arms"]} if found else set()
    if found and not names.issuperset(score["arm"] for score in found["scores"]):
        problems.append(
            f"{path / FILE} does not hold what it should (scores of an unknown arm): run `fcmae worth` again."
        )
        return None
    return found


def chart(found: Comparison) -> Chart:
    """Means and 95 % intervals by amount of labels, one colour per arm."""
    rows, amounts = compare(found), [_amount(amount["labels"]) for amount in found["amounts"]]
    traces: list[dict[str, Any]] = []
    for number, arm in enumerate(arm["name"] for arm in found["arms"]):
        mine = [row for row in rows if row.arm == arm]
        ends = [row.mean[1] or (row.mean[0],) * 2 for row in mine]
        traces.append(
            {
                "type": "bar",
                "name": str(escape(arm)),
                "x": [_amount(row.labels) for row in mine],
                "y": [100 * row.mean[0] for row in mine],
                "error_y": {"type": "data", "array": [50 * (high - low) for low, high in ends], "thickness": 1.2},
                "marker": {"color": COLOURS[number % len(COLOURS)]},
                "hovertemplate": "%{y:.1f}",
            }
        )
    axis = {"type": "category", "categoryarray": amounts, "categoryorder": "array", "automargin": True}
    layout = LAYOUT | {"barmode": "group", "height": 340, "showlegend": True, "xaxis": axis}
    layout["legend"] = {"orientation": "h", "y": 1.02, "yanchor": "bottom"}
    layout["yaxis"] = {"title": {"text": "balanced accuracy, %"}, "automargin": True}
    caption = "Balanced accuracy and its 95 % interval"
    return Chart(caption, {"data": traces, "layout": layout}, Table(caption, COLUMNS, list(map(cells, rows))))
