"""Finds the class of transformers that trains the model of a configuration, and makes it of its sizes alone.

A plan is of models that read tokens: causal, masked and sequence-to-sequence language models, and ESMFold. Code that
comes with a model is not run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from grass_dist.errors import UnsupportedModel


def folds(config: Any) -> bool:
    """Says whether the model is ESMFold: a language model of proteins, and a trunk with a state of each pair."""
    return bool(getattr(config, "is_folding_model", False))


def is_causal(config: Any) -> bool:
    """Says whether a query meets only the keys before it."""
    return not folds(config) and not config.is_encoder_decoder and _auto(config).__name__ == "AutoModelForCausalLM"


def make(config: Any, dtype: torch.dtype, device: str | torch.device) -> nn.Module:
    """The model with random weights; on "meta" it takes no memory. All of it has ``dtype``, also what is frozen.

    Raises:
        UnsupportedModel: it reads something else than tokens, or transformers has no such model.
    """
    with torch.device(device):
        if not folds(config):
            return _auto(config).from_config(config, dtype=dtype, trust_remote_code=False)
        import copy

        from transformers import EsmForProteinFolding

        config = copy.deepcopy(config)
        config.esmfold_config.fp16_esm = False
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # a module of fake tensors cannot be converted afterwards
        try:
            return EsmForProteinFolding(config)
        finally:
            torch.set_default_dtype(before)


def _auto(config: Any) -> Any:
    """The auto class that has the class which the configuration names, else the first that has one for it."""
    named = getattr(config, "architectures", None) or []
    found = list(_of_text(config))
    if wanted := [auto for auto, cls in found if cls.__name__ in named]:
        return wanted[0]
    others = [name for name in named if (cls := _own_class(name, config)) and cls.main_input_name != "input_ids"]
    if others or not found:
        what = others[0] if others else type(config).__name__
        raise UnsupportedModel(
            f"{what}: a plan is of models that read tokens alone (causal, masked and sequence-to-sequence language "
            "models, and ESMFold); give the number of parameters by --params."
        )
    return found[0][0]


def _of_text(config: Any) -> Iterator[tuple[Any, Any]]:
    import transformers as t

    for auto, mapping in (
        (t.AutoModelForCausalLM, t.MODEL_FOR_CAUSAL_LM_MAPPING),
        (t.AutoModelForMaskedLM, t.MODEL_FOR_MASKED_LM_MAPPING),
        (t.AutoModelForSeq2SeqLM, t.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
    ):
        if type(config) in mapping:
            yield auto, mapping[type(config)]


def _own_class(name: Any, config: Any) -> Any:
    """The class of that name of transformers itself, if it is one of models with such a configuration."""
    import transformers

    cls = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        return None
    return cls if cls.config_class is type(config) else None
