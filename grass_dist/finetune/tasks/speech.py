"""What both kinds of speech recognition share: recordings, their transcripts, and the word error rate."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from grass_dist.errors import ConfigError
from grass_dist.finetune.answers import asked
from grass_dist.finetune.config import RunConfig
from grass_dist.finetune.data.batches import Example
from grass_dist.finetune.data.config import fill_template
from grass_dist.finetune.data.json_lines import Row
from grass_dist.finetune.data.media import Medium, check_library, samples_of, seconds_of
from grass_dist.finetune.tasks.base import Batch
from grass_dist.finetune.tasks.media import HELD, MediaTask, digest_of, kept
from grass_dist.finetune.tasks.processors import arguments_of, in_dtype, load_processor
from grass_dist.model.loss import IGNORED

SECONDS = 30.0
"""Longest recording, where neither the configuration nor the model says another length."""

_OWN = ("draw", "lengths", "labels")
"""Entries of a batch that are for the task, not for the model."""


class SpeechTask(MediaTask):
    """Speech recognition by any model: `example` and `collate`, the word error rate, and the question.

    Raises:
        ConfigError: the model's processor does not fit the task.
        GrassError: soundfile is not installed.
    """

    part = "audio"

    def __init__(self, config: RunConfig, tokenizer: Any) -> None:
        check_library("audio", config.task)
        super().__init__(config, tokenizer)
        self.processor = load_processor(config, "feature_extractor")
        self.tokenizer, self._extractor = self.processor.tokenizer, self.processor.feature_extractor
        self.pad_token_id = self.tokenizer.pad_token_id or 0
        self._rate = int(self._extractor.sampling_rate)
        self._window = padded_to(self._extractor)
        self._most = config.data.max_seconds or self._window or SECONDS
        if self._window is not None and self._most > self._window:
            problem = f"{config.model.name} hears {self._window:g} s of a recording"
            raise ConfigError("data.max_seconds", self._most, problem, f"use {self._window:g} or less")
        self._counts_words = find_spec("jiwer") is not None
        self._switched_off: dict[str, float] = {}
        self._given: Medium | None = None
        self.left_out = "are longer than max_seconds, or their transcript than max_length"

    # ------------------------------------------------------------------------------------------- the model

    def check_model(self, model: Any) -> None:
        """Switches off the chance by which some models leave out layers: each rank would draw other ones."""
        for module in model.modules():
            if getattr(module, "layerdrop", 0):
                module.layerdrop = 0.0
        for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
            if getattr(model.config, name, 0):
                self._switched_off[name] = getattr(model.config, name)
                setattr(model.config, name, 0.0)

    # ------------------------------------------------------------------------------------------- the examples

    @property
    def longest(self) -> int:
        """Returns the most tokens of a transcript."""
        return self.data.max_length

    def hears(self, seconds: float, labels: Sequence[int]) -> bool:
        """Says whether a recording is long enough for its transcript."""
        return True

    def encode(self, transcript: str) -> Example:
        """Returns ``input_ids``, which the decoder is given, and ``labels``."""
        raise NotImplementedError

    def targets_of(self, rows: Sequence[Example]) -> Batch:
        """Returns what the model is given beside the recordings, and the labels."""
        raise NotImplementedError

    def example(self, row: Row) -> Example:
        """Makes the example of a row; one that is too long has neither ids nor labels."""
        media = self.media_of(row)
        if not media:
            raise ConfigError("audio", self.data.audio, "a row has no recording", "leave the row out")
        seconds, found = seconds_of(media[0]), self.encode(self._transcript(row))
        fits = seconds <= self._most and len(found["labels"]) <= self.longest and self.hears(seconds, found["labels"])
        found = found if fits else {"input_ids": [], "labels": []}
        return {**found, "milliseconds": [round(1000 * seconds)], "names": digest_of(media), HELD: media}

    def vary(self, example: Example, step: int, place: int) -> Example:
        return {**example, "draw": [step, place]}

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Reads the recordings, and makes the tensors of a micro-batch.

        Beside the arguments of the model it has ``lengths``, the samples of each recording, and ``draw``, see `drawn`.
        """
        rows = kept(examples)
        recordings = [samples_of(self.held(row)[0], self._rate) for row in rows]
        if not rows:  # of a stream all may be too long, and every rank runs the model
            rows = [{"input_ids": [self.pad_token_id], "labels": [IGNORED]}]
            recordings = [np.zeros(self._rate, dtype=np.float32)]
        batch = {**self._features(recordings), **self.targets_of(rows)}
        batch["lengths"] = torch.tensor([len(each) for each in recordings])
        batch["draw"] = torch.tensor([self.config.train.seed, *examples[0].get("draw", [0, 0])])
        return batch

    def _transcript(self, row: Row) -> str:
        return fill_template(self.data.text or "", row, "text").strip()

    def _features(self, recordings: Sequence[np.ndarray]) -> Batch:
        # Without a window, it is the extractor's own setting whether the model takes a mask.
        how = {"return_attention_mask": True} if self._window is not None else {"padding": True}
        found = self._extractor(list(recordings), sampling_rate=self._rate, return_tensors="pt", **how)
        return arguments_of(self.config.model.name, found)

    # ------------------------------------------------------------------------------------------- metric and answer

    def text_of(self, ids: Sequence[int]) -> str:
        """Returns the text of ids that are learnt."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def transcripts(self, labels: torch.Tensor) -> list[str]:
        """Returns the texts of the labels of a batch."""
        return [self.text_of([token for token in row if token != IGNORED]) for row in labels.tolist()]

    def word_errors(self, said: Sequence[str], wanted: Sequence[str]) -> list[float]:
        """Returns the number of wrong words and that of the words of the transcripts; zeros without jiwer."""
        pairs = [(one, other) for one, other in zip(said, wanted, strict=True) if other.split()]
        if not self._counts_words or not pairs:
            return [0.0, 0.0]
        import jiwer

        found = jiwer.process_words([other for _, other in pairs], [one for one, _ in pairs])
        wrong = found.substitutions + found.deletions + found.insertions
        return [float(wrong), float(found.hits + found.substitutions + found.deletions)]

    def word_error_rate(self, wrong: float, words: float) -> dict[str, float]:
        """Returns the metric ``wer``, from 0 up; nothing without jiwer."""
        return {"wer": wrong / words if words else 0.0} if self._counts_words else {}

    def say(self, model: Any, batch: Mapping[str, torch.Tensor], most: int, *, in_step: bool = False) -> list[str]:
        """Returns what the model hears in recordings.

        Args:
            batch: what the feature extractor gives, on the model's device.
            most: tokens of a transcript.
            in_step: whether all ranks do this at the same time, and have to run as many forwards.
        """
        raise NotImplementedError

    def ask(self, rows: Sequence[Row]) -> dict[str, Any] | None:
        """Asks for the first held-out recording, or for the file that ``sample_prompt`` names."""
        if (path := self.config.sample_prompt) is not None:
            self._given = Medium("audio", path)
            return {"prompt": path, "expected": None}
        for row in rows:
            media = self.media_of(row)
            if media and seconds_of(media[0]) <= self._most:
                self._given = media[0]
                return {"prompt": f"(audio) {media[0].path or media[0].name}", "expected": self._transcript(row)}
        return None

    def answer(self, model: Any, prompt: str, device: torch.device | None = None) -> str:
        assert self._given is not None
        with asked(model, device) as own:
            heard = self._features([samples_of(self._given, self._rate)])
            batch = in_dtype(model, {name: each.to(own) for name, each in heard.items()})
            return self.say(model, batch, self.config.answer_tokens)[0]

    # ------------------------------------------------------------------------------------------- for the reader

    def told(self) -> list[str]:
        found = []
        if self._switched_off:
            named = ", ".join(f"{name} of {value:g}" for name, value in self._switched_off.items())
            found.append(f"the model's {named} is set to 0, because GRASS draws the layers")
        if not self._counts_words:
            found.append("there is no word error rate without jiwer: pip install 'grass-dist[speech]'")
        return found

    def shown(self, example: Example) -> dict[str, Any]:
        labels = [token for token in example["labels"] if token != IGNORED]
        text = super().shown({"input_ids": labels, "labels": labels})
        heard = f"({example['milliseconds'][0] / 1000:.1f} s of audio) "
        return {**text, "pieces": [{"text": heard, "learnt": False, "special": True}, *text["pieces"]]}


def inputs_of(model: Any, batch: Batch) -> Batch:
    """Returns the arguments of the forward but the labels, in the dtype of the model."""
    return in_dtype(model, {name: each for name, each in batch.items() if name not in _OWN})


@contextlib.contextmanager
def drawn(batch: Batch) -> Iterator[None]:
    """Inside the block, numpy draws from the seed, the step and the place of the batch alone (its ``draw``).

    Models draw from it which part of their input they hide in training (SpecAugment). So it is the same on any number
    of ranks.
    """
    before = np.random.get_state()
    np.random.seed(np.random.SeedSequence(batch["draw"].tolist()).generate_state(4))
    try:
        yield
    finally:
        np.random.set_state(before)


def padded_to(extractor: Any) -> float | None:
    """Returns the seconds to which a feature extractor pads and cuts each recording; None if it does not."""
    padding = inspect.signature(type(extractor).__call__).parameters.get("padding")
    if padding is None or padding.default != "max_length":
        return None
    return float(getattr(extractor, "chunk_length", SECONDS))
