"""Tasks whose targets are tokens of a vocabulary: what their metrics are."""

from __future__ import annotations

from collections.abc import Sequence

from grass_dist.finetune.tasks.base import Predictions, Task, accuracy
from grass_dist.finetune.tasks.causal_lm import perplexity


class TokenTask(Task):
    """Perplexity, and accuracy of the likeliest token."""

    def counts(self, found: Predictions) -> list[float]:
        guess, truth = found.learnt()
        return [float((guess == truth).sum()), float(len(truth))]

    def metrics(self, loss: float, counts: Sequence[float]) -> dict[str, float]:
        return {"perplexity": perplexity(loss), "accuracy": accuracy(*counts)}
