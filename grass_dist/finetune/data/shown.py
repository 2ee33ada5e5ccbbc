"""Shows one example as the model sees it, cut where what is learnt begins and ends."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from grass_dist.finetune.data.batches import Example
from grass_dist.model.loss import IGNORED

LONGEST = 400
"""Most tokens of a piece; the middle of a longer one is left out."""


def shown(example: Example, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Cuts an example into pieces that JSON can hold.

    Returns:
        ``tokens`` and ``learnt``, two numbers of tokens, and ``pieces``, a list of ``{"text": str, "learnt": bool,
        "special": bool}``: text between special tokens, or one special token.
    """
    ids, added = example["input_ids"], tokenizer.added_tokens_decoder.items()
    special = {*tokenizer.all_special_ids, *(token for token, about in added if about.special)}
    learnt = [label != IGNORED for label in example["labels"]]
    alone = [index if token in special else -1 for index, token in enumerate(ids)]
    pieces, end = list[dict[str, Any]](), 0
    for (learns, index), group in groupby(zip(learnt, alone, strict=True)):
        start, end = end, end + len(list(group))
        text = _text(ids, start, end, tokenizer)
        pieces.append({"text": text, "learnt": learns, "special": index >= 0})
    return {"tokens": len(ids), "learnt": sum(learnt), "pieces": pieces}


def _text(ids: list[int], start: int, end: int, tokenizer: PreTrainedTokenizerBase) -> str:
    if end - start > LONGEST:
        half = LONGEST // 2
        first, last = _text(ids, start, start + half, tokenizer), _text(ids, end - half, end, tokenizer)
        return f"{first} [… {end - start - 2 * half} tokens …] {last}"
    # By itself, a piece might lose the space before its first word.
    context = ids[max(0, start - 8) : start]
    before, both = str(tokenizer.decode(context)), str(tokenizer.decode(context + ids[start:end]))
    return both.removeprefix(before) if both.startswith(before) else str(tokenizer.decode(ids[start:end]))
