"""Class probabilities of images, and how good they are; shared by fine-tuning and prediction."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn

from fcmae.atomic import replacing
from fcmae.data.dataset import Batch
from fcmae.data.loader import readable
from fcmae.data.normalize import Normalize
from fcmae.training.launch import evaluating, sent_to_first

MAX_AUROC_CLASSES = 100  # for more, it takes as long as computing the images


@torch.no_grad()
def probabilities_of(model: nn.Module, images: Tensor, accelerator: Accelerator) -> NDArray[np.float32]:
    """Softmax outputs for images.

    Args:
        model: in evaluation mode; see `class_probabilities`.
        images: (B, C, H, W), normalised, at least one.
        accelerator: see `class_probabilities`.

    Returns:
        (B, classes).
    """
    with accelerator.autocast():  # a moving average is not prepared by accelerate
        # forward, as calling a compiled model would compile it again for another batch size
        probabilities: NDArray[np.float32] = model.forward(images).float().softmax(-1).cpu().numpy()
    return probabilities


def class_probabilities(
    model: nn.Module, batches: Iterable[Batch], normalize: Normalize, accelerator: Accelerator
) -> tuple[NDArray[np.int64], NDArray[np.float32], list[tuple[str, str]]]:
    """Softmax outputs for all images that could be read, in their order: those of all processes, in the first one.

    Args:
        model: maps normalised images to logits (B, classes); on the accelerator's device.
        batches: this process's share.
        normalize: on the model's device.
        accelerator: of this process.

    Returns:
        The images' positions (N,), their probabilities (N, classes), and names of those that could not be read, with
        reasons; nothing in other processes than the first.
    """
    outputs: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = []
    bad: list[tuple[str, str]] = []
    with evaluating(model):
        for images, batch in readable(batches, normalize):
            bad += batch.bad
            if len(images):
                outputs.append((batch.index.numpy(), probabilities_of(model, images, accelerator)))
    outputs, bad = sent_to_first(accelerator, outputs), sent_to_first(accelerator, bad)
    if not outputs:
        return np.empty(0, np.int64), np.empty((0, 0), np.float32), bad
    index = np.concatenate([i for i, _ in outputs])
    order = np.argsort(index)
    return index[order], np.concatenate([p for _, p in outputs])[order], bad


def scores(labels: Sequence[int] | NDArray[np.int64], probabilities: NDArray[np.float32]) -> dict[str, float]:
    """The usual scores of a classifier.

    Args:
        labels: (N,) class indices.
        probabilities: (N, classes).

    Returns:
        By name, each in 0..1 except the loss: top1; top5 if there are more than five classes; balanced_accuracy, the
        mean recall of the classes that occur; auroc (see `macro_auroc`) if there are at most MAX_AUROC_CLASSES classes
        and all occur; val_loss, the mean cross-entropy in nats.
    """
    from sklearn.metrics import recall_score

    truth = np.asarray(labels)
    num_classes = probabilities.shape[1]
    predicted = probabilities.argmax(1)
    present = np.unique(truth)
    chosen = probabilities[np.arange(len(truth)), truth]
    found = {
        "val_loss": float(-np.log(np.maximum(chosen, 1e-12)).mean()),
        "top1": float((predicted == truth).mean()),
        "balanced_accuracy": float(recall_score(truth, predicted, labels=present, average="macro", zero_division=0)),
    }
    if num_classes > 5:
        best = np.argpartition(probabilities, -5, axis=1)[:, -5:]
        found["top5"] = float((best == truth[:, None]).any(1).mean())
    # The caller reports probabilities that are not finite, by the loss.
    if 1 < len(present) == num_classes <= MAX_AUROC_CLASSES and np.isfinite(probabilities).all():
        found["auroc"] = macro_auroc(truth, probabilities)
    return found


def macro_auroc(labels: Sequence[int] | NDArray[np.int64], probabilities: NDArray[np.float32]) -> float:
    """Area under the ROC curve: of each class that occurs against all others, averaged over these classes.

    For two classes it is the usual area, which is the same for both.

    Args:
        labels: (N,) class indices, of at least two classes.
        probabilities: (N, classes).
    """
    from sklearn.metrics import roc_auc_score

    truth = np.asarray(labels)
    classes = [1] if probabilities.shape[1] == 2 else np.unique(truth)
    return float(np.mean([roc_auc_score(truth == label, probabilities[:, label]) for label in classes]))


def write_predictions(
    path: Path,
    image_paths: Sequence[str],
    probabilities: NDArray[np.float32],
    class_names: Sequence[str],
    labels: Sequence[int] | None = None,
) -> None:
    """Write a CSV file: path, label where known, predicted class, its probability, and that of every class.

    Args:
        path: the file.
        image_paths: of N images.
        probabilities: (N, classes).
        class_names: of the classes.
        labels: (N,) class indices, where known.
    """
    with replacing(path) as aside, open_table(aside, class_names, labelled=labels is not None) as table:
        add_predictions(table, image_paths, probabilities, class_names, labels)


def write_confusion(path: Path, confusion: NDArray[np.int64], class_names: Sequence[str]) -> None:
    """Write a CSV file: a line for each true class, with the images or pixels that were given each class.

    Args:
        path: the file.
        confusion: (classes, classes), by true and predicted class.
        class_names: of the classes.
    """
    with replacing(path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["true", *class_names])
        rows.writerows([name, *line] for name, line in zip(class_names, confusion.tolist(), strict=True))


def open_table(path: Path, class_names: Sequence[str], *, labelled: bool) -> TextIO:
    """A new CSV file for `add_predictions`, with its first line.

    Args:
        path: the file, which must not be there.
        class_names: of the classes.
        labelled: whether labels are known.

    Raises:
        OSError: if it cannot be written.
    """
    # A path that is not valid Unicode keeps its bytes.
    table = path.open("x", newline="", encoding="utf-8", errors="surrogateescape")
    known = ["label"] if labelled else []
    csv.writer(table).writerow(["path", *known, "predicted", "probability", *(f"p({name})" for name in class_names)])
    return table


def add_predictions(
    table: TextIO,
    image_paths: Sequence[str],
    probabilities: NDArray[np.float32],
    class_names: Sequence[str],
    labels: Sequence[int] | None = None,
) -> None:
    """Add lines to the file of `open_table` and flush them.

    Args:
        table: the file.
        image_paths: of N images.
        probabilities: (N, classes).
        class_names: of the classes.
        labels: (N,) class indices, where known.
    """
    writer = csv.writer(table)
    for i, (image, row) in enumerate(zip(image_paths, probabilities, strict=True)):
        best = int(row.argmax())
        label = [class_names[labels[i]]] if labels is not None else []
        writer.writerow([image, *label, class_names[best], f"{row[best]:.6g}", *(f"{p:.6g}" for p in row)])
    table.flush()
