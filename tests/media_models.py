"""Tiny random models of speech and of images with their processors, and the recordings and images of their rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

RATE = 16_000
SPOKEN = {"ann": 300.0, "bob": 700.0, "one": 1200.0, "two": 2000.0}
"""The words that are spoken, each a tone of its own, in Hz."""
COLOURS = {"good": (250, 20, 20), "bad": (20, 20, 250)}

SEES = (
    "{% for m in messages %}{{ m.role + ' ' }}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}{{ '<image> ' }}{% else %}{{ c.text }}{% endif %}{% endfor %}"
    "{% endif %}{{ ' <end> ' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)
"""A chat template that writes images where messages have them."""


def write_speech(file: Path, words: str, rate: int = RATE, seconds: float = 0.1) -> Path:
    """A tone for each word, with a pause after it."""
    import soundfile

    time = np.arange(int(rate * seconds)) / rate
    tones = [np.sin(2 * np.pi * SPOKEN[word] * time) for word in words.split()]
    pause = np.zeros(int(rate * seconds / 2))
    file.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(file, 0.5 * np.concatenate([part for tone in tones for part in (tone, pause)]), rate)
    return file


def write_image(file: Path, colour: tuple[int, int, int], size: tuple[int, int] = (24, 16)) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(file)
    return file


def write_media(folder: Path) -> None:
    """The files that `tests.task_models.rows_of` names."""
    for name in ("ann", "bob"):
        for number in ("one", "two"):
            write_speech(folder / "clips" / f"{name}_{number}.wav", f"{name} {number}")
    for word, colour in COLOURS.items():
        write_image(folder / "pictures" / f"{word}.png", colour)


def whisper(folder: Path, **more: Any) -> Path:
    """An encoder-decoder that hears one second, and writes letters."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _letters(folder)
    extractor = WhisperFeatureExtractor(feature_size=16, sampling_rate=RATE, hop_length=160, chunk_length=1, n_fft=400)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = WhisperConfig(
        vocab_size=len(tokenizer) + len(tokenizer) % 2,
        num_mel_bins=16,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=50,
        max_target_positions=24,
        dropout=0.0,
        decoder_start_token_id=tokenizer.convert_tokens_to_ids("<|startoftranscript|>"),
        bos_token_id=tokenizer.eos_token_id,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **ids,
        **more,
    )
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    WhisperProcessor(extractor, tokenizer).save_pretrained(folder)
    return folder


def _letters(folder: Path) -> WhisperTokenizer:
    """A tokenizer of bytes, with the tokens that Whisper writes before a transcript."""
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    told = [
        "<|startoftranscript|>",
        "<|en|>",
        "<|zh|>",
        "<|de|>",
        "<|translate|>",
        "<|transcribe|>",
        "<|notimestamps|>",
    ]
    tokenizer = WhisperTokenizer(vocab=letters, merges=[], unk_token="<|endoftext|>", bos_token="<|endoftext|>")
    tokenizer.add_tokens([*told], special_tokens=True)
    return tokenizer


def wav2vec2(folder: Path, **more: Any) -> Path:
    """An encoder with CTC over letters."""
    import json

    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted({letter for word in SPOKEN for letter in word})
    vocabulary = {each: number for number, each in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *letters])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    extractor = Wav2Vec2FeatureExtractor(feature_size=1, sampling_rate=RATE, return_attention_mask=True)
    config = Wav2Vec2Config(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=[16, 16, 32],
        conv_stride=[8, 5, 4],
        conv_kernel=[10, 8, 4],
        num_feat_extract_layers=3,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        pad_token_id=0,
        **{
            f"{name}_dropout": 0.0
            for name in ("hidden", "activation", "attention", "feat_proj", "final", "feat_extract")
        },
        **{"layerdrop": 0.0, "mask_time_prob": 0.0, **more},
    )
    Wav2Vec2ForCTC(config).save_pretrained(folder)
    Wav2Vec2Processor(extractor, tokenizer).save_pretrained(folder)
    return folder


def llava(folder: Path, template: str | None = SEES) -> Path:
    """A vision tower and a decoder, two layers each, with four tokens for an image."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from tests.task_models import SIZES, WORDS, word_tokenizer

    torch.manual_seed(0)
    tokenizer = word_tokenizer([*WORDS, "user", "assistant", "<end>"])
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.eos_token = "<end>"
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        pixels, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    processor.chat_template = template
    sizes = {**SIZES, "num_hidden_layers": 2}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **sizes, "image_size": 16, "patch_size": 8},
        text_config={"model_type": "llama", **sizes, "vocab_size": len(tokenizer) + len(tokenizer) % 2},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
