"""Means, paired differences and what they say, against numbers worked by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fcmae.evaluation import paired


def arm(name: str, kind: str, against: str | None = None, **more: str) -> dict[str, object]:
    return {"name": name, "kind": kind, "against": against, "network": None, "init": None, "license": None} | more


def comparison(scores: dict[tuple[str, str], list[float]]) -> paired.Comparison:
    """Of a control, scratch and weights at 10 % and all labels; scores by arm and amount, one a seed."""
    listed = [
        {"arm": name, "labels": labels, "seed": seed, "scores": {"balanced_accuracy": value, "top1": 0.5}}
        for (name, labels), values in scores.items()
        for seed, value in enumerate(values)
    ]
    arms = [arm("histogram:8", "control", "scratch"), arm("scratch", "scratch", network="ConvNeXt V2 atto")]
    arms.append(arm("mine", "start", "scratch", license="cc-by-nc-4.0"))
    amounts = [{"labels": "10%", "num_labels": 20, "epochs": 100}, {"labels": "100%", "num_labels": 200, "epochs": 50}]
    found = {"num_train": 200, "num_test": 50, "num_classes": 4, "notes": [], "arms": arms, "amounts": amounts}
    return paired.COMPARISON.validate_python(
        found | {"scores": listed, "num_runs": 12, "num_done": len(listed), "command": "fcmae worth labelled"}
    )


# Differences of 5, 6 and 7 points: mean 6, standard deviation 1, and t of 2 degrees of freedom is 4.3027.
GAINED = {
    ("scratch", "10%"): [0.30, 0.50, 0.40],
    ("mine", "10%"): [0.35, 0.56, 0.47],
    ("scratch", "100%"): [0.80, 0.80, 0.80],
    ("mine", "100%"): [0.79, 0.82, 0.80],
}


def test_differences_are_of_the_same_seed_and_their_interval_is_students() -> None:
    rows = {(row.arm, row.labels): row for row in paired.compare(comparison(GAINED))}
    row = rows["mine", "10%"]
    assert row.mean[0] == pytest.approx((0.35 + 0.56 + 0.47) / 3) and row.num == 3
    assert row.gain is not None and row.gain[1] is not None
    half = 0.01 * 4.302653 / 3**0.5
    assert (row.gain[0], *row.gain[1]) == pytest.approx((0.06, 0.06 - half, 0.06 + half), abs=1e-6)
    assert row.told == "better" and rows["scratch", "10%"].gain is None
    # The arms' own intervals overlap by far: what tells them apart is the pairing.
    low, high = row.mean[1] or (0, 0)
    assert low < rows["scratch", "10%"].mean[0] < high
    assert rows["mine", "100%"].told == "no difference seen"


def test_a_seed_without_its_pair_makes_no_difference() -> None:
    found = comparison(GAINED | {("mine", "10%"): [0.35, 0.56, 0.47, 0.9]})
    row = next(row for row in paired.compare(found) if row.arm == "mine")
    assert row.num == 4 and row.gain is not None and row.gain[0] == pytest.approx(0.06)
    found = comparison(GAINED | {("mine", "10%"): [0.35, 0.56, 0.47], ("scratch", "10%"): [0.30, 0.50]})
    row = next(row for row in paired.compare(found) if row.arm == "mine")
    assert paired.cells(row)[2] == "3, 2 of scratch too" and row.told == "too few runs"
    assert "with 10 % of the labels 2 seeds are too few to tell" in paired.summary(found)


def test_the_verdict_is_in_plain_words() -> None:
    said = paired.verdict(comparison(GAINED))
    assert (said.state, said.answer) == ("good", "✓ Yes, in 1 of 2 comparisons")
    (sentence,) = said.sentences
    assert "with 10 % of the labels it gained 6.0 points (95 % interval 3.5 to 8.5)" in sentence
    assert "with all labels it cannot be told (+0.3 points, 95 % interval -3.5 to +4.1)" in sentence


@pytest.mark.parametrize(
    ("mine", "told", "answer", "words"),
    [
        ([0.25, 0.44, 0.33], "worse", "! No, it loses", "it lost 6.0 points (95 % interval 3.5 to 8.5)"),
        ([0.35, 0.56], "too few runs", "? Too early to tell", "2 seeds are too few to tell (+5.5 points)"),
        ([0.35], "too few runs", "? Too early to tell", "1 seed is too few to tell (+5.0 points)"),
        ([0.30, 0.53, 0.38], "no difference seen", "! No clear gain", "it cannot be told (+0.3 points"),
    ],
)
def test_a_loss_and_what_cannot_be_told_are_said_as_well(mine: list[float], told: str, answer: str, words: str) -> None:
    found = comparison({("scratch", "10%"): [0.30, 0.50, 0.40], ("mine", "10%"): mine})
    assert paired.compare(found)[-1].told == told
    said = paired.verdict(found)
    assert said.answer == answer and words in said.sentences[0]
    assert said.state == ("unknown" if told == "too few runs" else "attention")


def test_gains_here_and_losses_there_depend() -> None:
    lost = {("mine", "100%"): [0.70, 0.71, 0.72]}
    assert paired.verdict(comparison(GAINED | lost)).answer == "! It depends"


def test_labels_that_need_no_network_are_told_of() -> None:
    said = paired.verdict(comparison(GAINED | {("histogram:8", "10%"): [0.9, 0.9, 0.9]}))
    assert said.sentences[1].startswith("With 10 % of the labels, histogram:8 and a linear classifier score 90.0, ")
    assert len(said.sentences) == 2
    assert (said.state, said.answer) == ("attention", "! It gains, where no network is needed")
    elsewhere = paired.verdict(comparison(GAINED | {("histogram:8", "100%"): [0.9, 0.9, 0.9]}))
    assert (elsewhere.state, elsewhere.answer) == ("good", "✓ Yes, in 1 of 2 comparisons")  # it gained with 10 %
    alone = {key: scores for key, scores in GAINED.items() if key[1] == "10%"}
    assert paired.verdict(comparison(alone)).answer == "✓ Yes"


def test_a_network_is_held_against_what_needs_none_on_the_seeds_that_both_have() -> None:
    begun = {("scratch", "10%"): [0.30], ("mine", "10%"): [0.35], ("histogram:8", "10%"): [0.30, 0.60, 0.60]}
    assert not any("hardly need one" in sentence for sentence in paired.verdict(comparison(begun)).sentences)
    begun = {("scratch", "10%"): [0.5, 0.65, 0.62], ("mine", "10%"): [0.6], ("histogram:8", "10%"): [0.6, 0.55, 0.55]}
    assert not any("hardly need one" in sentence for sentence in paired.verdict(comparison(begun)).sentences)


def test_one_gain_among_many_comparisons_may_be_chance() -> None:
    found = comparison(GAINED)
    for name in ("second", "third"):
        found["arms"].append({**found["arms"][-1], "name": name})
        others = [score for score in found["scores"] if score["arm"] == "scratch"]
        found["scores"] += [{**score, "arm": name} for score in others]
    said = paired.verdict(found)
    chance = "! No clear gain: 1 of 6 comparisons differ, which may be chance"  # p = 0.0091 > 0.05 / 6
    assert (said.state, said.answer) == ("attention", chance)


def test_one_loss_that_chance_does_not_explain_is_held_against_gains_that_it_does_not_either() -> None:
    lost = {("mine", "100%"): [0.78, 0.80, 0.75]}  # -2, 0 and -5 points
    assert paired.verdict(comparison(GAINED | lost)).answer == "✓ Yes, in 1 of 2 comparisons"
    rows = {row.labels: row for row in paired.compare(comparison(GAINED)) if row.arm == "mine"}
    assert rows["10%"].chance == pytest.approx(0.00914, abs=1e-5)  # t = 10.392 of 2 degrees of freedom


def test_gains_that_are_all_the_same_are_as_sure_as_their_signs() -> None:
    same = {("scratch", "10%"): [0.5] * 6, ("mine", "10%"): [0.6] * 6}
    rows = {row.labels: row for row in paired.compare(comparison(same)) if row.arm == "mine"}
    assert (rows["10%"].told, rows["10%"].chance) == ("better", 1 / 32)


def test_gains_that_hold_one_by_one_hold_together_as_holm_has_it() -> None:
    both = GAINED | {("mine", "100%"): [0.84, 0.87, 0.82]}  # 4, 7 and 2 points: p = 0.099, so not
    assert paired.verdict(comparison(both)).answer == "✓ Yes, in 1 of 2 comparisons"
    both = GAINED | {("mine", "100%"): [0.84, 0.86, 0.83]}  # 4, 6 and 3 points: p = 0.040, above 0.05 / 2
    assert paired.verdict(comparison(both)).answer == "✓ Yes"


@pytest.mark.parametrize(
    ("num", "told"), [(2, "too few runs"), (3, "too few runs"), (5, "too few runs"), (6, "better")]
)
def test_few_gains_of_the_same_size_are_no_certainty(num: int, told: str) -> None:
    """One test image of a class of ten is ten points."""
    assert paired.tell([0.1] * num) == told
    assert paired.tell([0.0] * 3) == paired.tell([5.6e-17] * 8) == "no difference seen"


def test_the_summary_has_the_numbers_the_licence_and_what_is_left() -> None:
    text = paired.summary(comparison(GAINED))
    assert "+6.0 [+3.5, +8.5]" in text and "better" in text
    assert "The weights of mine have the licence cc-by-nc-4.0." in text
    assert "10 % of the labels: 20, 100 epochs" in text
    assert "a guess scores 25.0" in text
    assert "With all labels the seeds differ in order and head alone." in text
    few = paired.Comparison(**comparison(GAINED) | {"num_train": 400})
    assert "With all labels" not in paired.summary(few)
    assert "a guess scores 50.0" in paired.notes(paired.Comparison(**comparison(GAINED) | {"num_tested": 2}))[0]
    empty = paired.summary(comparison({}))
    assert "0 of 12 runs are done" in empty and "? Too early to tell" in empty


def test_the_chart_has_the_numbers_of_the_table() -> None:
    chart = paired.chart(comparison(GAINED))
    mine = chart.figure["data"][-1]
    assert mine["x"] == ["10 % of the labels", "all labels"] and mine["y"] == pytest.approx([46.0, 80.333], abs=1e-3)
    assert [row[1] for row in chart.table.rows] == ["scratch", "mine"] * 2


@pytest.mark.parametrize("damage", ["not json", "unknown arm", "cut off"])
def test_a_damaged_file_is_told_of_in_a_sentence(tmp_path: Path, damage: str) -> None:
    content = json.dumps(comparison(GAINED))
    broken = {
        "not json": "x",
        "unknown arm": content.replace('"arm": "mine"', '"arm": "other"'),
        "cut off": content[:99],
    }
    (tmp_path / paired.FILE).write_text(broken[damage])
    problems: list[str] = []
    assert paired.read(tmp_path, problems) is None
    assert len(problems) == 1 and "run `fcmae worth` again" in problems[0]
    (tmp_path / paired.FILE).write_text(content)
    assert paired.read(tmp_path, []) == comparison(GAINED)
