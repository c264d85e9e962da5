"""Accuracy, F1 and AUC of a classifier, by class and over all, from scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from components.evaluate import intervals


def probabilities(logits: Any) -> Any:
    """Softmax over the last axis, in float64 so that each row sums to 1 closely enough for any reader."""
    import numpy as np

    shifted = np.asarray(logits, dtype=np.float64)
    shifted = np.exp(shifted - shifted.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def score(truth: Sequence[int], scores: Any, labels: Sequence[str]) -> dict[str, Any]:
    """Metrics of one classifier.

    Args:
        truth: class index of each text.
        scores: probabilities [texts, classes].
        labels: class names, in the order of the columns.

    Returns:
        `accuracy`, `macro_f1` (over the classes that occur in truth or predictions), `auc` (one-vs-rest,
        mean over the classes; None when only one class occurs), `auc_classes`, `per_class`, `confusion`
        (rows are the truth) and `intervals`.
    """
    import numpy as np
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support

    actual = np.asarray(truth)
    predicted = scores.argmax(axis=1)
    every = list(range(len(labels)))
    columns = precision_recall_fscore_support(actual, predicted, labels=every, zero_division=0)
    aucs = {index: _auc(actual == index, scores[:, index]) for index in every}
    known = [auc for auc in aucs.values() if auc is not None]
    return {
        "accuracy": float(accuracy_score(actual, predicted)),
        "macro_f1": float(f1_score(actual, predicted, average="macro", zero_division=0)),
        "auc": float(np.mean(known)) if known else None,
        "auc_classes": len(known),
        "per_class": [
            {
                "label": label,
                "precision": float(columns[0][i]),
                "recall": float(columns[1][i]),
                "f1": float(columns[2][i]),
                "auc": aucs[i],
                "count": int(columns[3][i]),
            }
            for i, label in enumerate(labels)
        ],
        "confusion": confusion_matrix(actual, predicted, labels=every).tolist(),
        "intervals": _intervals(actual, predicted, len(labels)),
    }


def of_two(truth: Sequence[int], scores: Any, positive: int) -> dict[str, Any]:
    """Sensitivity and specificity (Altman and Bland 1994, BMJ 308:1552) where there are two classes.

    Args:
        truth: class index of each.
        scores: probabilities [examples, 2].
        positive: index of the class that is looked for.

    Returns:
        `sensitivity` and `specificity`, None where test lacks that class.
    """
    import numpy as np

    looked_for = np.asarray(truth) == positive
    said = scores.argmax(axis=1) == positive
    return {
        "sensitivity": float(said[looked_for].mean()) if looked_for.any() else None,
        "specificity": float(1 - said[~looked_for].mean()) if (~looked_for).any() else None,
    }


def _auc(is_class: Any, scores: Any) -> float | None:
    from sklearn.metrics import roc_auc_score

    # With only one side present there is nothing to rank.
    return float(roc_auc_score(is_class, scores)) if 0 < is_class.sum() < len(is_class) else None


def _intervals(actual: Any, predicted: Any, classes: int) -> dict[str, list[float]]:
    import numpy as np

    cells = actual * classes + predicted

    def macro_f1(drawn: Any) -> float:
        table = np.bincount(cells[drawn], minlength=classes * classes).reshape(classes, classes)
        occurring = table.sum(0) + table.sum(1)  # 2 TP + FP + FN of each class
        return float((2 * np.diag(table)[occurring > 0] / occurring[occurring > 0]).mean())

    right = actual == predicted
    return {
        "accuracy": intervals.interval(len(actual), lambda drawn: float(right[drawn].mean())),
        "macro_f1": intervals.interval(len(actual), macro_f1),
    }
