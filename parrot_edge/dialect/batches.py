"""Features as batches: stretches of one length, drawn anew each epoch from its number and the seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from parrot_edge.dialect.augment import mask_spectrum
from parrot_edge.dialect.features import FRAMES_PER_SECOND, FeatureStore, normalize
from parrot_edge.recipe import DialectRecipe

_ALTERED_RISE = 0.25  # of a run's epochs, in which the share of altered recordings grows to its full size


class Batches:
    """The training side of a run.

    labels   int (N,): of each recording in the store
    sources  where each recording comes from, (N,); without them all come from one
    """

    def __init__(
        self, store: FeatureStore, labels: np.ndarray, recipe: DialectRecipe, sources: Sequence[str] = ()
    ) -> None:
        self._store, self._labels, self._recipe = store, labels, recipe
        self._sources = np.array(sources) if len(sources) else np.zeros(len(labels), dtype=int)
        self.steps = max(1, len(labels) // recipe.optim.batch_size)

    def epoch(self, number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Features float32 (B, F, 80) and labels int64 (B,), `steps` times; F is drawn for each batch.

        The first epoch takes the clean recordings alone, as dialects are heard sooner in them.
        """
        recipe = self._recipe
        random = np.random.default_rng((recipe.run.seed, number))
        order = self._order(random)
        altered = min(1.0, number / (_ALTERED_RISE * recipe.optim.epochs))
        low = round(recipe.data.min_seconds * FRAMES_PER_SECOND)
        high = round(recipe.data.seconds * FRAMES_PER_SECOND)
        for step in range(self.steps):
            chosen = order[step * recipe.optim.batch_size :][: recipe.optim.batch_size]
            frames = int(random.integers(low, high + 1))
            stretches = []
            for at in chosen:
                copy = int(random.integers(0, self._store.copies + 1))
                if random.random() >= altered:
                    copy = 0
                features = normalize(draw_stretch(self._store[int(at), copy], frames, random))
                stretches.append(mask_spectrum(features, recipe.augment.masks, random))
            yield np.stack(stretches), self._labels[chosen]

    def class_weights(self) -> np.ndarray | None:
        """What a loss of each label weighs, mean 1, where the recipe wants that: float32 (L,)."""
        if self._recipe.optim.balance != "weigh":
            return None
        counts = np.bincount(self._labels)
        return (counts.sum() / (len(counts) * counts)).astype(np.float32)

    def _order(self, random: np.random.Generator) -> np.ndarray:
        """Which recordings an epoch takes: all of them, or as many with each label as often, and of a label
        each source as often, so that a source does not tell the label."""
        count = max(len(self._labels), self._recipe.optim.batch_size)
        if self._recipe.optim.balance != "draw":
            return np.concatenate([random.permutation(len(self._labels)) for _ in range(2)])[:count]
        labels, drawn = np.unique(self._labels), []
        for label in labels:
            sources = np.unique(self._sources[self._labels == label])
            wanted = -(-count // (len(labels) * len(sources)))
            for source in sources:
                members = np.flatnonzero((self._labels == label) & (self._sources == source))
                drawn.append(deal(members, wanted, random))
        return random.permutation(np.concatenate(drawn))[:count]


def deal(members: Sequence[int] | np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """So many of the members, none a second time before all others had their turn."""
    rounds = -(-count // len(members))
    return np.concatenate([random.permutation(members) for _ in range(rounds)])[:count]


def draw_stretch(features: np.ndarray, frames: int, random: np.random.Generator) -> np.ndarray:
    """A stretch of so many frames; a shorter recording is repeated: (F, 80) to (frames, 80)."""
    if len(features) < frames:
        features = np.tile(features, (-(-frames // len(features)), 1))
    start = int(random.integers(0, len(features) - frames + 1))
    return features[start : start + frames]
