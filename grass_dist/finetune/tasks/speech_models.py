"""The two kinds of models that recognise speech: encoder-decoders, and encoders that learn by CTC."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from grass_dist.errors import ConfigError, shorten
from grass_dist.finetune.config import RunConfig
from grass_dist.finetune.data.batches import Example, collate
from grass_dist.finetune.data.loading import Data
from grass_dist.finetune.fit import Padding
from grass_dist.finetune.hub import loading_options
from grass_dist.finetune.tasks.base import Batch, Predictions, accuracy, bare
from grass_dist.finetune.tasks.causal_lm import perplexity
from grass_dist.finetune.tasks.speech import SpeechTask, drawn, inputs_of
from grass_dist.model.loss import IGNORED
from grass_dist.model.packaged import resolve_model


class SpeechSeq2Seq(SpeechTask):
    """Cross entropy over the tokens of the transcript; perplexity, accuracy of the next token, and word error rate."""

    auto = "AutoModelForSpeechSeq2Seq"

    def __init__(self, config: RunConfig, tokenizer: Any, settings: Any) -> None:
        super().__init__(config, tokenizer)
        self._kind = settings.model_type
        self._start = int(getattr(settings, "decoder_start_token_id", None) or 0)
        self._positions: int | None = getattr(settings, "max_target_positions", None)
        added = self.tokenizer.added_tokens_decoder.items()
        special = {*self.tokenizer.all_special_ids, *(token for token, about in added if about.special)}
        # A word that the tokenizer does not know is no special token, unless it is written as one.
        self._special = special - ({self.tokenizer.unk_token_id} - {self.tokenizer.eos_token_id})
        if config.data.language is not None:
            self._tell_language(config.data.language)

    def load(self, source: str, **how: Any) -> Any:
        from transformers.integrations import is_deepspeed_zero3_enabled

        if self._kind == "whisper" and is_deepspeed_zero3_enabled():
            problem = (
                "transformers computes the positions of Whisper when it makes the model, which ZeRO-3 has cut by then"
            )
            raise ConfigError("parallel.config", self.config.parallel.config, problem, "use ZeRO-2, or parallel: fsdp2")
        return super().load(source, **how)

    @property
    def longest(self) -> int:
        return min(self.data.max_length, self._positions or self.data.max_length)

    def encode(self, transcript: str) -> Example:
        """Makes the ids that the decoder is given. There is no loss on what stands before the transcript."""
        ids = list(self.tokenizer(transcript)["input_ids"])
        ids = ids if ids[:1] == [self._start] else [self._start, *ids]
        before = next((at for at, token in enumerate(ids) if at and token not in self._special), len(ids))
        return {"input_ids": ids[:-1], "labels": [IGNORED] * (before - 1) + ids[before:]}

    def targets_of(self, rows: Sequence[Example]) -> Batch:
        found = collate([{key: row[key] for key in ("input_ids", "labels")} for row in rows], self.pad_token_id)
        return {"decoder_input_ids": found["input_ids"], "labels": found["labels"]}

    def predict(self, model: nn.Module, batch: Batch) -> Predictions:
        with drawn(batch):
            logits = model(**inputs_of(model, batch), use_cache=False).logits
        return Predictions(logits.flatten(0, 1), batch["labels"].flatten())

    def measure(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, list[float]]:
        """Counts right tokens, tokens, wrong words and words. For the words, the model writes the transcripts."""
        found = self.predict(model, batch)
        guess, truth = found.learnt()
        errors = [0.0, 0.0]
        if self._counts_words:
            heard, wanted = inputs_of(model, batch), batch["labels"]
            del heard["decoder_input_ids"]
            together = dist.is_initialized() and dist.get_world_size() > 1
            said = self.say(model, heard, 2 * wanted.shape[1] + 8, in_step=together)
            errors = self.word_errors(said, self.transcripts(wanted))
        return found.summed_loss(), [float((guess == truth).sum()), float(len(truth)), *errors]

    def metrics(self, loss: float, counts: Sequence[float]) -> dict[str, float]:
        right, all, wrong, words = counts
        rate = self.word_error_rate(wrong, words)
        return {"perplexity": perplexity(loss), "accuracy": accuracy(right, all), **rate}

    def say(self, model: Any, batch: Mapping[str, torch.Tensor], most: int, *, in_step: bool = False) -> list[str]:
        own, given = bare(model), self._told_first()
        most = min(most, (self._positions or len(given) + most) - len(given))
        one = next(iter(batch.values()))
        said = own.generate(
            **batch,
            decoder_input_ids=torch.tensor([given] * len(one), device=one.device),
            max_length=len(given) + max(most, 1),
            do_sample=False,
            num_beams=1,
            use_cache=True,
            return_dict_in_generate=False,
            pad_token_id=self.pad_token_id,
            synced_gpus=in_step,
        )
        return [self.text_of(row) for row in said.tolist()]

    def _told_first(self) -> list[int]:
        """Returns the ids that the decoder is given before a transcript."""
        return self.encode("")["input_ids"] or [self._start]

    def _tell_language(self, language: str) -> None:
        """Has the tokenizer write the language before each transcript.

        Raises:
            ConfigError: the model is not told languages, or does not know this one.
        """
        if not hasattr(self.tokenizer, "set_prefix_tokens"):
            raise ConfigError("data.language", language, "the model is not told a language", "leave it out")
        try:
            self.tokenizer.set_prefix_tokens(language=language, task="transcribe")
            problem = ""
            if self.tokenizer.unk_token_id in (ids := self._told_first()) or None in ids:
                problem = "the model has no token for it"
        except ValueError as error:
            problem = shorten(" ".join(str(error).split()), 100)
        if problem:
            raise ConfigError("data.language", language, problem, "write it as english or en, or leave it out")


class SpeechCtc(SpeechTask):
    """Negative log likelihood of the transcripts by CTC, for each of their tokens; word error rate, and exact ones."""

    auto = "AutoModelForCTC"

    def __init__(self, config: RunConfig, tokenizer: Any, settings: Any) -> None:
        super().__init__(config, tokenizer)
        if (language := config.data.language) is not None:
            raise ConfigError("data.language", language, "a model with CTC is not told it", "leave it out")
        self._ratio: int | None = getattr(settings, "inputs_to_logits_ratio", None)
        self.left_out += ", or too short for it"

    def is_new(self, model: nn.Module, name: str) -> bool:
        return not name.startswith(f"{getattr(model, 'base_model_prefix', '')}.")

    def fit(self, model: nn.Module, data: Data) -> Padding:
        classes = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
        if len(self.tokenizer) > classes:
            problem = f"its tokenizer has {len(self.tokenizer)} tokens, and the model {classes} classes"
            raise ConfigError("model.name", self.config.model.name, problem, "give it the tokenizer of its head")
        return Padding(self.pad_token_id)

    def encode(self, transcript: str) -> Example:
        return {"input_ids": [], "labels": list(self.tokenizer(transcript)["input_ids"])}

    def hears(self, seconds: float, labels: Sequence[int]) -> bool:
        """Compares the frames of a recording with the tokens, with a blank between two equal ones."""
        if self._ratio is None:
            return True
        repeated = sum(one == other for one, other in pairwise(labels))
        return len(labels) + repeated < int(seconds * self._rate / self._ratio)

    def targets_of(self, rows: Sequence[Example]) -> Batch:
        longest = max(len(row["labels"]) for row in rows)
        return {"labels": torch.tensor([row["labels"] + [IGNORED] * (longest - len(row["labels"])) for row in rows])}

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return self._run(model, batch)[0]

    def measure(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, list[float]]:
        """Counts exact transcripts, transcripts, wrong words and words."""
        loss, logits = self._run(model, batch)
        said, wanted = self._read(logits, batch["lengths"]), self.transcripts(batch["labels"])
        right = sum(one == other for one, other in zip(said, wanted, strict=True))
        return loss, [float(right), float(len(wanted)), *self.word_errors(said, wanted)]

    def metrics(self, loss: float, counts: Sequence[float]) -> dict[str, float]:
        right, all, wrong, words = counts
        return {"accuracy": accuracy(right, all), **self.word_error_rate(wrong, words)}

    def text_of(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, group_tokens=False)).strip()

    def say(self, model: Any, batch: Mapping[str, torch.Tensor], most: int, *, in_step: bool = False) -> list[str]:
        return self._read(model(**batch).logits)

    def _run(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the loss, summed over the transcripts, and the logits."""
        learns = (batch["labels"] != IGNORED).any()
        with drawn(batch), _summed(bare(model).config):
            found = model(**inputs_of(model, batch), labels=batch["labels"])
        return found.loss.float() * learns, found.logits

    def _read(self, logits: torch.Tensor, lengths: torch.Tensor | None = None) -> list[str]:
        """Returns the likeliest transcripts, each of the frames of its own recording."""
        best = logits.argmax(-1).tolist()
        if lengths is not None:
            shares = (lengths / lengths.max()).tolist()
            best = [row[: round(len(row) * share)] for row, share in zip(best, shares, strict=True)]
        return [str(self.tokenizer.decode(row)).strip() for row in best]


@contextlib.contextmanager
def _summed(settings: Any) -> Iterator[None]:
    """Inside the block, a model with CTC sums its loss over the rows, without those that no path leads to."""
    wanted = {"ctc_loss_reduction": "sum", "ctc_zero_infinity": True}
    before = {name: getattr(settings, name) for name in wanted if hasattr(settings, name)}
    try:
        settings.update(wanted)
        yield
    finally:
        settings.update(before)


def speech_task(config: RunConfig, tokenizer: Any) -> SpeechTask:
    """Returns the task of speech recognition that fits the model.

    Raises:
        ConfigError: the model is neither an encoder-decoder of speech nor one with CTC.
    """
    from transformers import MODEL_FOR_CTC_MAPPING, MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING, AutoConfig

    name, trust = config.model.name, config.model.trust_remote_code
    try:
        source = resolve_model(name)
        settings: Any = AutoConfig.from_pretrained(source, trust_remote_code=trust, **loading_options(name))
    except Exception as error:  # whatever transformers makes of a folder that nobody has checked
        problem = f"it cannot be loaded ({shorten(' '.join(str(error).split()), 200)})"
        raise ConfigError("model.name", name, problem, "give a model's name or folder") from error
    if type(settings) in MODEL_FOR_CTC_MAPPING:
        return SpeechCtc(config, tokenizer, settings)
    if type(settings) in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING and getattr(settings, "is_encoder_decoder", False):
        return SpeechSeq2Seq(config, tokenizer, settings)
    problem = f"it is a {settings.model_type}, neither an encoder-decoder of speech nor a model with CTC"
    raise ConfigError("model.name", name, problem, "choose one such as openai/whisper-small")
