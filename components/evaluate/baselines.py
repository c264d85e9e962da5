"""What an encoder must beat to be worth its weights: its own base, frozen, and no network at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from components.evaluate.text_metrics import words

PROBE_EXAMPLES = 1000


def probe_examples(train: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """At most about PROBE_EXAMPLES of train: of each class its share, at least one, the first by id."""
    by_label: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(train, key=lambda row: row["id"]):
        by_label.setdefault(row["label"], []).append(row)
    share = min(1.0, PROBE_EXAMPLES / len(train))
    return [row for rows in by_label.values() for row in rows[: max(1, int(len(rows) * share))]]


def linear_probe(train: Any, truth: Sequence[int], test: Any, classes: int) -> Any:
    """Logistic regression on frozen embeddings.

    Args:
        train: embeddings [train texts, width].
        truth: class index of each.
        test: embeddings [test texts, width].
        classes: how many classes the tuned model knows.

    Returns:
        Probabilities [test texts, classes]; 0 for a class that train does not show.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    model.fit(train, truth)
    return _spread(model.predict_proba(test), model.classes_, classes)


def tfidf_logreg(train: Sequence[str], truth: Sequence[int], test: Sequence[str], classes: int) -> Any:
    """Logistic regression on TF-IDF of one and two words (characters where a script has no spaces).

    Returns:
        Probabilities [test texts, classes]; 0 for a class that train does not show.
    """
    from sklearn.linear_model import LogisticRegression

    vectorizer = _vectorizer()
    features = vectorizer.fit_transform(train)
    # Same optimum as the default solver's, in a third of its time on many sparse columns (5 s against 16 s of
    # processor time for the 5,485 training texts of Reuters R8).
    model = LogisticRegression(C=10, solver="newton-cg", max_iter=1000).fit(features, truth)
    return _spread(model.predict_proba(vectorizer.transform(test)), model.classes_, classes)


def tfidf_ridge(train: Sequence[str], truth: Sequence[float], test: Sequence[str]) -> Any:
    """Ridge regression on the same features.

    Returns:
        Scores [test texts].
    """
    from sklearn.linear_model import Ridge

    vectorizer = _vectorizer()
    # The strength for rows of length one, as those of TF-IDF are.
    model = Ridge(alpha=1.0).fit(vectorizer.fit_transform(train), truth)
    return model.predict(vectorizer.transform(test))


def tfidf_similarity(corpus: Sequence[str], anchors: Sequence[str], pool: Sequence[str]) -> Any:
    """Cosines [anchors, pool] of TF-IDF vectors, the frequencies from a corpus."""
    vectorizer = _vectorizer().fit(corpus)
    # Rows have length one, so a product is a cosine.
    return (vectorizer.transform(anchors) @ vectorizer.transform(pool).T).toarray()


def _vectorizer() -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    # lowercase and token_pattern are off because `words` does both jobs.
    return TfidfVectorizer(
        tokenizer=words, token_pattern=None, lowercase=False, ngram_range=(1, 2), sublinear_tf=True
    )


def _spread(scores: Any, seen: Any, classes: int) -> Any:
    import numpy as np

    full = np.zeros((len(scores), classes))
    full[:, seen] = scores
    return full
