"""Lets the model answer before and after the fine-tune, so that a person sees what it did."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from grass_dist.errors import shorten
from grass_dist.finetune.fit import learnt_positions


@torch.no_grad()
def greedy_answer(
    model: nn.Module, tokenizer: Any, prompt_ids: list[int], max_new_tokens: int, device: torch.device | None = None
) -> str:
    """Returns the model's greedy continuation of ``prompt_ids``, up to its end-of-sequence token.

    The model is on ``device`` meanwhile, and in host memory afterwards; None leaves it where it is. The answer ends
    where the model has no more positions. It is a sentence in parentheses where the prompt fills them all, or where
    the model's generation_config.json holds something that cannot be used.
    """
    positions = learnt_positions(model)
    if positions is not None:
        max_new_tokens = min(max_new_tokens, positions - len(prompt_ids))
    if max_new_tokens < 1:
        return f"(the prompt has {len(prompt_ids)} tokens, and the model {positions} positions)"
    training = model.training
    try:
        if device is not None:
            model.to(device)
        ids = torch.tensor([prompt_ids], device=next(model.parameters()).device)
        out: Any = model.eval().generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            return_dict_in_generate=False,
            pad_token_id=0,  # one prompt has no padding, and transformers warns where no id is given
        )
    except (AttributeError, LookupError, TypeError, ValueError) as error:  # nobody has checked that file
        return f"(no answer: {shorten(' '.join(str(error).split()), 200)})"
    finally:
        model.train(training)
        if device is not None:
            model.to("cpu")
    return tokenizer.decode(out[0, len(prompt_ids) :], skip_special_tokens=True).strip()


@contextlib.contextmanager
def asked(model: nn.Module, device: torch.device | None) -> Iterator[torch.device]:
    """Inside the block, the model is on ``device``, if that is not None, and evaluates; yields the model's device.

    Afterwards it trains again as before, in host memory if a device was given.
    """
    training = model.training
    try:
        if device is not None:
            model.to(device)
        model.eval()
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        model.train(training)
        if device is not None:
            model.to("cpu")
