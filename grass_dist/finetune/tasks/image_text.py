"""Vision-language models: text about images, with loss on the completion or on the turns of the assistant.

An example keeps its text with one placeholder for each image. The model's processor puts in its place as many tokens as
the image has features, and tells where. The images are read for the micro-batch that needs them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from grass_dist.errors import ConfigError, shorten
from grass_dist.finetune.answers import asked
from grass_dist.finetune.config import RunConfig
from grass_dist.finetune.data.batches import Example
from grass_dist.finetune.data.conversations import Dialogues, Span, dialogues_of, is_learnt, tools_of
from grass_dist.finetune.data.json_lines import Row
from grass_dist.finetune.data.media import Medium, check_library, pixels_of, size_of
from grass_dist.finetune.tasks.base import Batch, Predictions
from grass_dist.finetune.tasks.image_messages import Turns, turns_of
from grass_dist.finetune.tasks.media import HELD, MediaTask, digest_of, kept, packed, unpacked
from grass_dist.finetune.tasks.processors import arguments_of, in_dtype, load_processor
from grass_dist.finetune.tasks.tokens import TokenTask
from grass_dist.model.loss import IGNORED

_TOLD = ("offset_mapping", "text_replacement_offsets")
"""What the processor tells of its tokens, and is not for the model."""


class ImageText(TokenTask, MediaTask):
    """Next-token prediction over text with images; perplexity, and accuracy of the next token.

    Raises:
        ConfigError: the model's processor does not fit the task.
        GrassError: Pillow is not installed.
    """

    auto = "AutoModelForImageTextToText"
    part = "image"
    left_out = "are longer than max_length with the tokens of their images"

    def __init__(self, config: RunConfig, tokenizer: Any) -> None:
        check_library("image", config.task)
        super().__init__(config, tokenizer)
        self.processor = load_processor(config, "image_processor")
        self.tokenizer = self.processor.tokenizer
        self.pad_token_id = self.tokenizer.pad_token_id or 0
        self._mark = str(getattr(self.processor, "image_token", None) or "")
        if not self._mark or not self.tokenizer.is_fast:
            problem = "its processor has no image_token" if not self._mark else "its tokenizer is a slow one"
            raise ConfigError("model.name", config.model.name, problem, "choose a model such as LLaVA or SmolVLM")
        self._dialogues: Dialogues | None = None
        template = getattr(self.processor, "chat_template", None) or self.tokenizer.chat_template
        if self.data.messages is not None or (self.data.chat_template and template):
            writer = copy.copy(self.tokenizer)  # the tokenizer may have another template than the processor
            writer.chat_template = template
            self._dialogues = dialogues_of(writer)
        self._takes_parts = self._writes_parts()
        self._more: dict[tuple[tuple[int, int], ...], int] = {}
        self._given: tuple[str, list[Medium]] | None = None

    # ------------------------------------------------------------------------------------------- the examples

    def example(self, row: Row) -> Example:
        """Makes the example of a row; one that is too long has neither ids nor labels."""
        text, spans, images = self._written(row)
        encoded = self.tokenizer(text, add_special_tokens=self._dialogues is None, return_offsets_mapping=True)
        ids, labels = list(encoded["input_ids"]), self._labels(encoded["input_ids"], encoded["offset_mapping"], spans)
        more = self._tokens_of(text, images, len(ids)) if images else 0
        if len(ids) + more > self.data.max_length:
            ids, labels, text, spans = [], [], "", []
        bounds = [at for span in spans for at in span]
        made = {"input_ids": ids, "labels": labels, "text": packed(text), "spans": bounds, "more": [more]}
        return {**made, "names": digest_of(images), HELD: images}

    def held(self, example: Example) -> list[Medium]:
        return example[HELD] if HELD in example else self._turns(self.row_of(example)).images

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Reads the images, and makes the tensors of a micro-batch: all that the processor gives, and ``labels``.

        Where no row has an image, a row with a blank one is added, which has no loss: every rank has to run the same
        layers, and a layer that the batch does not use would be updated in another way.
        """
        rows = kept(examples)
        texts = [unpacked(row["text"]) for row in rows]
        spans = [[Span(*row["spans"][at : at + 2]) for at in range(0, len(row["spans"]), 2)] for row in rows]
        images = [[pixels_of(image) for image in self.held(row)] for row in rows]
        if not any(images):
            from PIL import Image

            texts, spans = [*texts, self._blank()], [*spans, []]
            images = [*images, [Image.new("RGB", (64, 64))]]
        found = self._processed(texts, images)
        told = [found.pop(name, None) for name in _TOLD]
        replaced = told[1] or [[]] * len(texts)
        labels = [
            self._labels(ids.tolist(), places.tolist(), _shifted(row, its))
            for ids, places, row, its in zip(found["input_ids"], told[0], spans, replaced, strict=True)
        ]
        batch = arguments_of(self.config.model.name, found)
        batch["labels"] = torch.tensor(labels)
        return batch

    def predict(self, model: nn.Module, batch: Batch) -> Predictions:
        inputs = {name: each for name, each in batch.items() if name != "labels"}
        logits = model(**in_dtype(model, inputs), use_cache=False).logits[:, :-1]
        return Predictions(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    # ------------------------------------------------------------------------------------------- for the reader

    def shown(self, example: Example) -> dict[str, Any]:
        found = super().shown(example)
        return {**found, "tokens": found["tokens"] + example["more"][0]}

    def ask(self, rows: Sequence[Row]) -> dict[str, Any] | None:
        """Asks for the last turn of the assistant in the first held-out row; ``sample_prompt`` is about no image."""
        if (prompt := self.config.sample_prompt) is not None:
            self._given = self._question(Turns([{"role": "user", "content": prompt}], []), None)
            return {"prompt": prompt, "expected": None}
        for row in rows:
            turns = self._turns(row)
            last = max(number for number, message in enumerate(turns.messages) if is_learnt(message))
            given = turns.upto(last, self._mark)
            if not given.messages:
                continue
            self._given = self._question(given, tools_of(row, self.data))
            names = "".join(f"(image) {image.path or image.name} " for image in given.images)
            expected = turns.messages[last].get("content")
            prompt = names + given.last_text(self._mark)
            return {"prompt": prompt, "expected": expected if isinstance(expected, str) else None}
        return None

    def answer(self, model: Any, prompt: str, device: torch.device | None = None) -> str:
        assert self._given is not None
        text, media = self._given
        found = self._processed([text], [[pixels_of(image) for image in media]] if media else [])
        batch = arguments_of(self.config.model.name, {name: each for name, each in found.items() if name not in _TOLD})
        with asked(model, device) as own:
            said = model.generate(
                **in_dtype(model, {name: each.to(own) for name, each in batch.items()}),
                max_new_tokens=self.config.answer_tokens,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                return_dict_in_generate=False,
                pad_token_id=self.pad_token_id,
            )
        return str(self.tokenizer.decode(said[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)).strip()

    # ------------------------------------------------------------------------------------------- text and images

    def _written(self, row: Row) -> tuple[str, list[Span], list[Medium]]:
        """Returns the text of a row with a placeholder for each image, what of it is learnt, and its images."""
        turns = self._turns(row)
        if self._dialogues is None:
            given = self._question(turns.upto(1, self._mark), None)[0]
            text = f"{given}{turns.messages[1]['content']}{self.tokenizer.eos_token or ''}"
            spans = [Span(len(given), len(text))]
        else:
            text, spans = self._dialogues.spans(turns.messages, tools_of(row, self.data))
        self._check_marks(text, turns.images)
        return text, spans, turns.images

    def _turns(self, row: Row) -> Turns:
        return turns_of(row, self.data, self.media_of(row), self._mark, self.folder(row), self._takes_parts)

    def _question(self, turns: Turns, tools: list[Any] | None) -> tuple[str, list[Medium]]:
        """Returns what the model is given before an answer."""
        if self._dialogues is not None:
            return self._dialogues.given(turns.messages, tools), turns.images
        return str(turns.messages[0]["content"]), turns.images

    def _check_marks(self, text: str, images: Sequence[Medium]) -> None:
        if (count := text.count(self._mark)) != len(images):
            problem = f"a row has {len(images)} images, and its text {count} places for one ({self._mark})"
            raise ConfigError(*self._about, problem, "give each image one place, or none to all of them")

    @property
    def _about(self) -> tuple[str, Any]:
        return ("data.image", self.data.image) if self.data.image else ("data.messages", self.data.messages)

    def _writes_parts(self) -> bool:
        """Says whether the chat template writes a placeholder for a part of a message that is an image."""
        if self._dialogues is None:
            return False
        parts = [{"type": "image"}, {"type": "text", "text": "a"}]
        try:
            return self._dialogues.given([{"role": "user", "content": parts}], None).count(self._mark) == 1
        except ConfigError:
            return False

    def _blank(self) -> str:
        """Returns the text of a row that is an image alone."""
        parts = [{"type": "image"}, {"type": "text", "text": "a"}]
        if self._dialogues is not None and self._takes_parts:
            return self._dialogues.given([{"role": "user", "content": parts}], None)
        return f"{self._mark}\n"

    # ------------------------------------------------------------------------------------------- tokens

    def _tokens_of(self, text: str, images: Sequence[Medium], before: int) -> int:
        """Returns how many tokens the processor adds to the ``before`` ones of a text for its images.

        They depend on the sizes of the images alone, so only the first images of these sizes are read.
        """
        sizes = tuple(map(size_of, images))
        if sizes not in self._more:
            found = self._processed([text], [[pixels_of(image) for image in images]])
            more = found["input_ids"].shape[1] - before
            if more and not found.get("text_replacement_offsets"):
                problem = "its processor does not tell where it writes the tokens of an image"
                raise ConfigError("model.name", self.config.model.name, problem, "choose another model")
            self._more[sizes] = more
        return self._more[sizes]

    def _labels(self, ids: Sequence[int], places: Sequence[Sequence[int]], spans: Sequence[Span]) -> list[int]:
        """Returns the ids of the tokens that begin in a span, and `IGNORED` for all others and the first one."""
        labels, at = [IGNORED] * len(ids), 0
        for number, (start, stop) in enumerate(places):
            if stop <= start:  # padding, and what the tokenizer puts around a text
                continue
            while at < len(spans) and spans[at].stop <= start:
                at += 1
            if number and at < len(spans) and spans[at].start <= start:
                labels[number] = ids[number]
        return labels

    def _processed(self, texts: list[str], images: list[list[Any]]) -> dict[str, Any]:
        """Runs the processor.

        Raises:
            ConfigError: it refuses the texts or the images.
        """
        how = {"return_tensors": "pt", "padding": True, "add_special_tokens": self._dialogues is None}
        told = {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
        try:
            return dict(self.processor(text=texts, images=images if any(images) else None, **how, **told))
        except Exception as error:  # a processor may raise anything
            reason = shorten(" ".join(str(error).split()) or type(error).__name__, 200).rstrip(".")
            problem = f"the processor of {self.config.model.name} refuses a row ({reason})"
            raise ConfigError(*self._about, problem, "repair or leave out that row, or choose another model") from error


def _shifted(spans: Sequence[Span], replaced: Sequence[dict[str, Any]]) -> list[Span]:
    """Returns spans of a text as they are once its placeholders are replaced."""
    gains = [(each["span"][1], each["new_span"][1] - each["span"][1]) for each in replaced]

    def moved(at: int) -> int:
        return at + next((gain for end, gain in reversed(gains) if end <= at), 0)

    return [Span(moved(span.start), moved(span.stop)) for span in spans]
