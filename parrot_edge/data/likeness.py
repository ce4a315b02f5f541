"""Whether a classifier can tell messages of people from others'."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from parrot_edge.figures import Member, Resampling

COMPARED = 800
"""Characters of a message that are compared for diversity and by the classifier, about what Ask has room
for: so that a long text which somebody pasted is not told by its length."""

_FOLDS = 5


def tell_apart(
    pairs: Sequence[tuple[str, str]], members: Sequence[Member], resampling: Resampling
) -> np.ndarray:
    """How well a classifier tells messages of people from generated ones, given in pairs: AUC.

    Logistic regression on n-grams of letters and of words (TF-IDF), cross-validated so that the
    messages of a dialogue are judged by a classifier that saw none of them.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline, make_union

    groups = {member: number for number, member in enumerate(dict.fromkeys(members))}
    if len(groups) < 2:
        return np.full(1, np.nan)
    letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), sublinear_tf=True, lowercase=False)
    words = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]", ngram_range=(1, 2), sublinear_tf=True)
    sure = cross_val_predict(
        make_pipeline(make_union(letters, words), LogisticRegression(max_iter=1000)),
        [pair[side][:COMPARED] for side in (0, 1) for pair in pairs],
        np.repeat([1, 0], len(pairs)),
        groups=2 * [groups[member] for member in members],
        cv=GroupKFold(min(_FOLDS, len(groups))),
        method="decision_function",
    )
    return resampling.auc((members, sure[: len(pairs)]), (members, sure[len(pairs) :]))
