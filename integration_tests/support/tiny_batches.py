"""Small batches for any class of transformers, made from the signature of its forward and tried until one fits."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from integration_tests.support.tiny_configs import FIRST_SPECIAL

Batch = dict[str, Any]
ROWS, LENGTH = 2, 16
NO_IMAGE = "text alone"

_MISMATCH = re.compile(r"tokens?:? \(?(\d+)\)?,? .*?features:? \(?(\d+)")


class NoBatch(Exception):
    """No batch was found with which the class trains in plain PyTorch."""


class Maker:
    """Makes the batch of a step; the same for the same step.

    Args:
        sizes: names of the forward's arguments and their shapes; drawn from a normal distribution.
        fixed: arguments that are the same in each step.
        special: how many of the first tokens of each row have the id that follows: those of an image or a sound.
    """

    def __init__(self, model: nn.Module, kind: str, sizes: dict[str, tuple[int, ...]], fixed: Batch, note: str) -> None:
        self.model, self.kind, self.sizes, self.fixed, self.note = model, kind, sizes, fixed, note
        self.takes = set(inspect.signature(model.forward).parameters)
        self.special, self.token = 0, _special_token(model, sizes)

    def __call__(self, step: int) -> Batch:
        made = torch.Generator().manual_seed(step)
        batch = {name: torch.randn(size, generator=made) for name, size in self.sizes.items()}
        batch |= {name: value.clone() if torch.is_tensor(value) else value for name, value in self.fixed.items()}
        length = max(LENGTH, self.special + 4)
        if "flattened_patches" in batch:
            batch["flattened_patches"][..., :2] = 1  # row and column
        if self.has_text:
            ids = torch.randint(3, 60, (ROWS, length), generator=made)
            if self.special and self.token is not None:
                ids[:, 1 : 1 + self.special] = self.token
            ids[:, -1] = 2  # the end of the sequence, which some classifiers look for
            batch["input_ids"] = ids
            batch["attention_mask"] = torch.ones_like(ids)
            if "mm_token_type_ids" in self.takes or self.special:
                batch["mm_token_type_ids"] = (ids == self.token).long()
            if "token_type_ids" in self.takes and self.special:
                batch["token_type_ids"] = (ids == self.token).long()
        batch["labels"], batch["use_cache"] = self._labels(step, length, made), False
        return {name: value for name, value in batch.items() if name in self.takes and value is not None}

    @property
    def has_text(self) -> bool:
        """Whether the batch has tokens that are not the labels."""
        of_text = self.kind not in ("image-classification", "ctc", "audio-classification")
        return (of_text or self.model.main_input_name == "input_ids") and "input_ids" in self.takes

    def _labels(self, step: int, length: int, made: torch.Generator) -> torch.Tensor:
        if self.kind.endswith("classification"):
            return torch.tensor([step % 2, 1])
        length = 6 if self.kind in ("ctc", "speech-seq2seq") and not self.has_text else length
        return torch.randint(3, 30 if self.kind == "ctc" else 60, (ROWS, length), generator=made)

    def fit(self, error: str) -> bool:
        """Takes the number of an image's tokens from an error. Returns whether that changed it."""
        if not (found := _MISMATCH.search(error)):
            return False
        wanted = int(found[2])
        wanted = wanted // ROWS if wanted % ROWS == 0 else wanted
        if wanted == self.special or not 0 < wanted < 400:
            return False
        self.special = wanted
        return True


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The loss of a batch; of a class that gives none, the mean square of its first output."""
    out = model(**batch)
    loss = out.get("loss") if isinstance(out, dict) else None
    if loss is None:
        first = next(
            v for v in (out.values() if isinstance(out, dict) else out) if torch.is_tensor(v) and v.is_floating_point()
        )
        loss = first.float().square().mean()
    return loss.mean()


def find_batch(model: nn.Module, kind: str) -> Maker:
    """The first of the possible batches of which the loss is finite and gives gradients.

    Raises:
        NoBatch: none is.
    """
    problems: list[str] = []
    for maker in _makers(model, kind):
        for _ in range(4):
            try:
                loss = loss_of(model, maker(0))
                if not torch.isfinite(loss):
                    raise ValueError(f"loss is {loss.item()}")
                loss.backward()
            except Exception as error:
                problems.append(f"{maker.note}: {type(error).__name__}: {str(error)[:160]}")
                if not maker.fit(str(error)):
                    break
            else:
                return maker
            finally:
                model.zero_grad()
    raise NoBatch(" | ".join(dict.fromkeys(problems)))


def _makers(model: nn.Module, kind: str) -> Iterator[Maker]:
    takes = set(inspect.signature(model.forward).parameters)
    fixed: Batch = {}
    if "bbox" in takes:
        fixed["bbox"] = torch.zeros(ROWS, LENGTH, 4, dtype=torch.long)
    if "qformer_input_ids" in takes:
        fixed["qformer_input_ids"] = torch.full((ROWS, 4), 5)
    if "image_attention_mask" in takes:
        fixed["image_attention_mask"] = torch.ones(ROWS, LENGTH, 1, dtype=torch.long)
    if "image_embeds_position_mask" in takes:
        count = getattr(model.config, "latent_query_num", 4)
        fixed["image_embeds_position_mask"] = (torch.arange(LENGTH) < count).long().expand(ROWS, -1)
    if kind in ("image-text", "image-classification"):
        yield from (Maker(model, kind, sizes, fixed | more, note) for sizes, more, note in _images(model, takes))
    if kind in ("speech-seq2seq", "ctc", "audio-classification"):
        yield from (Maker(model, kind, sizes, fixed | more, note) for sizes, more, note in _sounds(model, takes))
    if kind not in ("image-classification", "ctc", "audio-classification") or model.main_input_name == "input_ids":
        yield Maker(model, kind, {}, fixed, NO_IMAGE)
        ids = torch.randint(3, 60, (ROWS, LENGTH), generator=torch.Generator().manual_seed(9))
        yield Maker(model, kind, {}, fixed | {"decoder_input_ids": ids}, "with the decoder's tokens")
        yield from (Maker(model, kind, sizes, fixed | more, note) for sizes, more, note in _images(model, takes))


def _images(model: nn.Module, takes: set[str]) -> Iterator[tuple[dict[str, tuple[int, ...]], Batch, str]]:
    vision = _part(model.config, "vision_config", "vit_config", "encoder", "vision_encoder_config")
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3
    size, patch = _side(vision, "image_size", 32), _side(vision, "patch_size", 8)
    time = getattr(vision, "temporal_patch_size", 1) or 1
    sizes = {"image_sizes": torch.tensor([[size, size]] * ROWS)}
    if {"image_grid_thw", "image_grid_hw"} & takes:
        grid = torch.tensor([[1, 4, 4]] * ROWS)
        merge = {"image_merge_sizes": torch.full((ROWS,), 2), "image_grid_hw": grid[:, 1:]}
        for wide in dict.fromkeys((channels * time * patch**2, channels * patch**2)):
            yield {"pixel_values": (ROWS * 16, wide)}, {"image_grid_thw": grid, **merge}, "patches and their grid"
        yield {"pixel_values": (ROWS * 16, channels, patch, patch)}, {"image_grid_thw": grid, **merge}, "square patches"
        whole = {"pixel_values": (1, ROWS * 16, channels, patch, patch)}
        yield whole, {"image_grid_thw": grid, **merge}, "a batch of square patches"
    if "spatial_shapes" in takes:
        shapes = {"spatial_shapes": torch.tensor([[4, 4]] * ROWS), "pixel_attention_mask": torch.ones(ROWS, 16).long()}
        yield {"pixel_values": (ROWS, 16, channels * patch**2)}, shapes, "patches and their shapes"
    if "flattened_patches" in takes:
        wide = getattr(vision, "patch_embed_hidden_size", channels * patch**2) + 2
        yield {"flattened_patches": (ROWS, 16, wide)}, {}, "flattened patches"
    if "pixel_values" in takes:
        more = {name: (ROWS, channels, size, size) for name in ("high_res_pixel_values",) if name in takes}
        yield {"pixel_values": (ROWS, channels, size, size), **more}, sizes, "an image"
        yield {"pixel_values": (ROWS, 1, channels, size, size)}, sizes, "a list of one image"
        yield {"pixel_values": (ROWS, 2, channels, size, size)}, sizes, "a list of two images"
        yield {"pixel_values": (ROWS, 1, 1, channels, size, size)}, sizes, "a list of one tile"
        for side in (32, 64, 224):
            yield {"pixel_values": (ROWS, channels, side, side)}, {}, f"an image of {side}"


def _sounds(model: nn.Module, takes: set[str]) -> Iterator[tuple[dict[str, tuple[int, ...]], Batch, str]]:
    audio = _part(model.config, "audio_config", "encoder_config", "speech_config", "encoder")
    bands = next(
        (
            getattr(audio, n)
            for n in (
                "num_mel_bins",
                "feature_size",
                "input_feat_per_channel",
                "input_dim",
                "feature_projection_input_dim",
            )
            if getattr(audio, n, None)
        ),
        80,
    )
    frames = 2 * (getattr(audio, "max_source_positions", None) or 64)
    if "input_features" in takes:
        for length in dict.fromkeys((frames, 128)):
            names = ("input_features_mask", "feature_attention_mask", "attention_mask")
            mask = {name: torch.ones(ROWS, length).long() for name in names}
            yield {"input_features": (ROWS, bands, length)}, mask, "bands by frames"
            for wide in dict.fromkeys((bands, 64, 80, 160)):
                yield {"input_features": (ROWS, length, wide)}, mask, "frames by bands"
    if "input_values" in takes:
        yield {"input_values": (ROWS, getattr(audio, "max_length", 0) or 64, bands)}, {}, "frames by bands"
        for length in (4000, 16000):
            yield {"input_values": (ROWS, length)}, {"padding_mask": torch.ones(ROWS, length).long()}, "samples"
            yield (
                {"input_values": (ROWS, 1, length)},
                {"padding_mask": torch.ones(ROWS, length).long()},
                "a channel of samples",
            )


def _part(config: Any, *names: str) -> Any:
    found = [getattr(config, name) for name in names if getattr(config, name, None) is not None]
    return found[0] if found and not isinstance(found[0], dict | int | str) else config


def _side(config: Any, name: str, default: int) -> int:
    value = getattr(config, name, None) or default
    return value if isinstance(value, int) else value[-1] if isinstance(value, list | tuple) else default


def _special_token(model: nn.Module, sizes: dict[str, tuple[int, ...]]) -> int | None:
    what = "audio|speech" if {"input_features", "input_values"} & set(sizes) else "image"
    for name in ("_token_id", "_token_index", "_id", "_token"):
        for word in what.split("|"):
            value = getattr(model.config, f"{word}{name}", None)
            if isinstance(value, int) and value >= FIRST_SPECIAL:
                return value
    return None


Finder = Callable[[nn.Module, str], Maker]
