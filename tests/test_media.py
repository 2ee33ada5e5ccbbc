"""Recordings and images of rows: where they are found, what is refused, and what reaches the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from grass_dist.errors import ConfigError, GrassError
from grass_dist.finetune.config import RunConfig
from grass_dist.finetune.data import media
from grass_dist.finetune.data.loading import Stream
from grass_dist.finetune.identity import data_identity
from grass_dist.finetune.setup import load_model, load_tokenizer
from grass_dist.finetune.tasks import image_text, speech
from tests.media_models import RATE, SEES, llava, wav2vec2, whisper, write_image, write_media, write_speech
from tests.task_models import WORDS, begun, model_for, rows_of, said, settings_of, word_tokenizer, write_rows

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"speech": whisper(folder / "w"), "speech ctc": wav2vec2(folder / "c"), "image-text": llava(folder / "l")}


@pytest.fixture
def run_of(models, tmp_path):
    def make(task: str, rows: list[dict[str, Any]], **data: Any) -> RunConfig:
        file = write_rows(tmp_path / "rows.jsonl", rows)
        settings = settings_of(task.split()[0], models[task], file, **{"eval_examples": 0, **data})
        settings["data"] = {key: value for key, value in settings["data"].items() if value is not None}
        return RunConfig(**settings)

    return make


def batch_of(config: RunConfig) -> tuple[Any, dict[str, torch.Tensor]]:
    task, data = begun(config)
    train = data.train
    items = [train.example(item) for item in train.epoch(0, 0)] if isinstance(train, Stream) else list(train)
    return task, task.collate([task.vary(example, 1, at) for at, example in enumerate(items)])


def test_recordings_in_every_form_are_the_same(run_of, tmp_path):
    file = write_speech(tmp_path / "clips" / "a.wav", "ann one")
    samples = media.samples_of(media.Medium("audio", str(file)), RATE)
    assert samples.shape == (int(0.3 * RATE),) and samples.dtype == np.float32
    row = {"transcript": "ann one"}
    forms = ["clips/a.wav", str(file), {"path": "clips/a.wav"}, {"array": samples.tolist(), "sampling_rate": RATE}]
    batches = [batch_of(run_of("speech ctc", [{**row, "audio": form}]))[1] for form in forms]
    template = run_of("speech ctc", [{**row, "id": "a"}], audio="clips/{id}.wav", streaming=True)
    batches.append(batch_of(template)[1])
    embedded = datasets.Dataset.from_list([{**row, "audio": {"bytes": file.read_bytes(), "path": "a.wav"}}])
    embedded.to_parquet(tmp_path / "rows.parquet")
    typed = embedded.cast_column("audio", datasets.Audio())
    typed.save_to_disk(str(tmp_path / "saved"))
    for name in ("rows.parquet", "saved"):
        config = run_of("speech ctc", [{**row, "audio": "none"}])
        data = config.data.model_copy(update={"name": str(tmp_path / name)})
        batches.append(batch_of(config.model_copy(update={"data": data}))[1])
    for batch in batches[1:]:
        assert batch.keys() == batches[0].keys()
        assert torch.allclose(batch["input_values"], batches[0]["input_values"], atol=1e-3)
        assert torch.equal(batch["labels"], batches[0]["labels"])


def test_another_rate_is_resampled(tmp_path, monkeypatch):
    file = media.Medium("audio", str(write_speech(tmp_path / "a.wav", "ann", rate=48_000)))
    own = media.samples_of(media.Medium("audio", str(write_speech(tmp_path / "b.wav", "ann"))), RATE)
    found = media.samples_of(file, RATE)
    assert found.shape == own.shape and np.abs(found - own)[100:1500].max() < 0.02
    monkeypatch.setitem(__import__("sys").modules, "soxr", None)
    message = r"a\.wav has 48000 samples a second, and the model takes 16000; pip install soxr"
    with pytest.raises(ConfigError, match=message):
        media.samples_of(file, RATE)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("task", "column"), [("speech", "audio"), ("image-text", "image")])
def test_files_that_cannot_be_read_are_named(task, column, streaming, run_of, tmp_path):
    model_for_files = rows_of(task, 6)
    for row in model_for_files:
        name = tmp_path / row[column] if row[column] else None
        if name and column == "audio":
            write_speech(name, row["transcript"])
        elif name:
            write_image(name, (9, 9, 9))
    (tmp_path / "broken").write_text("no such thing")
    for bad, problem in (
        ("gone", f"there is no file {tmp_path}/gone"),
        ("broken", f"{tmp_path}/broken cannot be read"),
    ):
        rows = [{**row, column: bad} if at == 2 else row for at, row in enumerate(model_for_files)]
        config = run_of(task, rows, streaming=streaming)
        assert f"line 3 of rows.jsonl does not fill {column} ({problem}" in _said_in_full(config)
        task_, data = begun(run_of(task, rows, streaming=streaming, on_bad_line="skip"))
        assert f"left out 1 broken line (3); line 3 does not fill {column} ({problem}" in "".join(data.told())
        assert task_.shown(data.first)["learnt"] > 0
    (tmp_path / model_for_files[0][column]).write_bytes(b"")
    embedded = [{**row, column: {"bytes": b"nothing", "path": "x.bin"}} for row in rows]
    datasets.Dataset.from_list(embedded).to_parquet(tmp_path / "rows.parquet")
    data = config.data.model_copy(update={"name": str(tmp_path / "rows.parquet")})
    assert f"data.{column}='x.bin': x.bin cannot be read (" in _said_in_full(config.model_copy(update={"data": data}))


def _said_in_full(config: RunConfig) -> str:
    """With what a stream says when it is read."""
    with pytest.raises(ConfigError) as error:
        batch_of(config)
    return str(error.value)


def test_too_long_recordings_and_transcripts_are_left_out(run_of, tmp_path):
    write_speech(tmp_path / "a.wav", "ann one")
    write_speech(tmp_path / "b.wav", "ann one", seconds=0.6)
    write_speech(tmp_path / "c.wav", "ann", seconds=0.02)
    rows = [{"audio": "a.wav", "transcript": "ann one"}, {"audio": "b.wav", "transcript": "ann one"}]
    for task in ("speech", "speech ctc"):
        limit = {} if task == "speech" else {"max_seconds": 1}  # the window of the one is a second
        _, data = begun(run_of(task, rows, **limit))
        assert len(data.train) == data.train.dropped == 1
        assert next(data.told()).startswith("1 examples are longer than max_seconds, or their transcript than max_len")
        _, data = begun(run_of(task, [*rows[:1], {**rows[0], "transcript": "ann " * 40}], **limit))
        assert len(data.train) == data.train.dropped == 1
        _, batch = batch_of(run_of(task, rows, streaming=True, **limit))  # a stream keeps it without loss
        assert len(batch["labels"]) == 1
    _, data = begun(run_of("speech ctc", [*rows[:1], {"audio": "c.wav", "transcript": "ann one"}]))
    assert data.train.dropped == 1  # fewer frames than letters
    assert "max_seconds=2.0" in said(run_of("speech", rows, max_seconds=2))
    assert "none of the 1 rows" in said(run_of("speech", rows[1:]))


def test_a_transcript_is_learnt_after_what_comes_before(run_of, tmp_path):
    write_speech(tmp_path / "a.wav", "ann one")
    rows = [{"audio": "a.wav", "transcript": "ann one"}]
    task, batch = batch_of(run_of("speech", rows, language="german"))
    names = task.tokenizer.convert_ids_to_tokens(batch["decoder_input_ids"][0].tolist())
    assert names[:4] == ["<|startoftranscript|>", "<|de|>", "<|transcribe|>", "<|notimestamps|>"]
    labels = batch["labels"][0].tolist()
    assert labels[:3] == [-100] * 3 and task.tokenizer.decode(labels[3:]) == "ann one<|endoftext|>"
    assert labels[3:-1] == batch["decoder_input_ids"][0].tolist()[4:]
    assert "data.language='klingon'" in said(run_of("speech", rows, language="klingon"))
    assert "a model with CTC is not told it" in said(run_of("speech ctc", rows, language="german"))


def test_ctc_is_a_sum_over_rows_that_hides_alike(run_of, tmp_path):
    """The loss of rows alone and together, and what numpy hides of them in training."""
    for name in ("ann one", "bob two"):
        write_speech(tmp_path / f"{name}.wav", name)
    rows = [{"audio": f"{name}.wav", "transcript": name} for name in ("ann one", "bob two")]
    config = run_of("speech ctc", rows)
    folder = wav2vec2(tmp_path / "hides", mask_time_prob=0.5, mask_time_length=2)
    config = config.model_copy(update={"model": config.model.model_copy(update={"name": str(folder)})})
    task, data = begun(config)
    model: Any = load_model(config, CPU, task).eval()
    together = task.collate([task.vary(each, 1, at) for at, each in enumerate(data.train)])
    parts = [task.collate([task.vary(each, 1, at)]) for at, each in enumerate(data.train)]
    model.config.ctc_loss_reduction = "mean"
    total = task.loss(model, together)
    assert total.item() == pytest.approx(sum(task.loss(model, part).item() for part in parts), rel=1e-4)
    assert task.targets(together) == 14 and model.config.ctc_loss_reduction == "mean"
    model.config.ctc_loss_reduction = "sum"
    inputs = speech.inputs_of(model, together)
    assert total.item() == pytest.approx(model(**inputs, labels=together["labels"]).loss.item(), rel=1e-5)
    model.train()
    before = np.random.get_state()[1].copy()  # type: ignore[union-attr, index]
    losses = [task.loss(model, together).item() for _ in range(2)]
    assert losses[0] == losses[1] != total.item()
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index]
    later = task.collate([task.vary(each, 2, at) for at, each in enumerate(data.train)])
    assert task.loss(model, later).item() != losses[0]
    empty = task.collate([{**data.train[0], "labels": [], "input_ids": []}])
    assert task.loss(model, empty).item() == 0 and task.targets(empty) == 0


def test_layers_are_not_left_out_by_chance(run_of, tmp_path):
    write_speech(tmp_path / "a.wav", "ann one")
    config = run_of("speech ctc", [{"audio": "a.wav", "transcript": "ann one"}])
    folder = wav2vec2(tmp_path / "drops", layerdrop=0.1)
    config = config.model_copy(update={"model": config.model.model_copy(update={"name": str(folder)})})
    task, _ = begun(config)
    model: Any = load_model(config, CPU, task)
    assert model.config.layerdrop == 0
    assert task.told() == ["the model's layerdrop of 0.1 is set to 0, because GRASS draws the layers"]


def test_word_errors_by_hand(run_of, tmp_path, monkeypatch):
    write_speech(tmp_path / "a.wav", "ann one")
    config = run_of("speech", [{"audio": "a.wav", "transcript": "ann one"}])
    task, _ = begun(config)
    assert task.word_errors(["ann two", "", "bob"], ["ann one", "", "bob one"]) == [2, 4]
    assert task.metrics(0.0, [3, 4, 2, 4]) == {"perplexity": 1, "accuracy": 0.75, "wer": 0.5}
    monkeypatch.setattr(speech, "find_spec", lambda name: None)
    task, _ = begun(config)
    assert task.metrics(0.0, [3, 4, 0, 0]) == {"perplexity": 1, "accuracy": 0.75}
    assert task.told() == ["there is no word error rate without jiwer: pip install 'grass-dist[speech]'"]
    monkeypatch.setattr(media, "find_spec", lambda name: None)
    with pytest.raises(GrassError, match=r"task=speech needs soundfile: pip install 'grass-dist\[speech\]'"):
        begun(config)


RED, BLUE = {"image": "red.png"}, {"image": "blue.png"}


@pytest.fixture
def pictures(tmp_path):
    write_image(tmp_path / "red.png", (255, 0, 0))
    write_image(tmp_path / "blue.png", (0, 0, 255), size=(16, 16))
    return tmp_path


def turns(*said: Any) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(said)]


@pytest.mark.parametrize(
    ("content", "images"),
    [
        ([{"type": "image"}, {"type": "text", "text": "was"}], ["red.png"]),
        ([{"type": "image", "path": "red.png"}, {"type": "text", "text": "was"}], None),
        ([{"type": "image_url", "image_url": {"url": "red.png"}}, {"type": "text", "text": "was"}], []),
        ("<image>was", "red.png"),
        ("was", {"path": "red.png"}),
    ],
)
def test_images_of_messages_in_every_form(content, images, run_of, pictures):
    rows = [{"m": turns(content, "good film", "the", "a film"), "image": images}]
    task, data = begun(run_of("image-text", rows, prompt=None, completion=None, messages="m"))
    text = "user <image> was <end> assistant good film <end> user the <end> assistant a film <end>"
    example = data.train[0]
    names = task.tokenizer.convert_ids_to_tokens(example["input_ids"])
    assert " ".join(names) == text and example["more"] == [3]
    batch = task.collate(list(data.train))
    assert batch["pixel_values"].shape == (1, 3, 16, 16) and batch["input_ids"].shape == (1, len(names) + 3)
    learnt = [token for token in batch["labels"][0].tolist() if token != -100]
    assert task.tokenizer.convert_ids_to_tokens(learnt) == ["good", "film", "<end>", "a", "film", "<end>"]
    assert task.shown(data.first)["tokens"] == len(names) + 3


def test_rows_with_none_one_and_two_images(run_of, pictures):
    rows = [
        {"image": None, "asks": "the film", "seen": "good"},
        {"image": ["red.png", "blue.png"], "asks": "the film was", "seen": "bad"},
        {"image": ["blue.png"], "asks": "was", "seen": "good film"},
    ]
    task, batch = batch_of(run_of("image-text", rows))
    assert batch["pixel_values"].shape[0] == 3
    mark = task.tokenizer.convert_tokens_to_ids("<image>")
    assert (batch["input_ids"] == mark).sum(1).tolist() == [0, 8, 4]
    config = run_of("image-text", rows[:1])
    task, data = begun(config)
    alone = task.collate(list(data.train))  # a blank image keeps all layers in use, and has no loss
    assert alone["pixel_values"].shape[0] == 1 and (alone["labels"][1] == -100).all()
    model: Any = load_model(config, CPU, task)
    task.loss(model, alone).backward()
    assert all(
        weight.grad is not None for name, weight in model.named_parameters() if "layers" in name and ".1." not in name
    )
    plain = model(input_ids=alone["input_ids"][:1, :9], attention_mask=alone["attention_mask"][:1, :9]).logits
    labels = alone["labels"][0, 1:9]
    expected = torch.nn.functional.cross_entropy(plain[0, :-1], labels, reduction="sum")
    assert task.loss(model, alone).item() == pytest.approx(expected.item(), rel=1e-5)


def test_placeholders_are_never_cut(run_of, pictures):
    rows = [{"image": "red.png", "asks": "the film was", "seen": "good"}, {"image": None, "asks": "was", "seen": "bad"}]
    _, data = begun(run_of("image-text", rows, max_length=12))
    assert len(data.train) == 2  # of 12 and 6 tokens
    _, data = begun(run_of("image-text", rows, max_length=11))
    assert len(data.train) == data.train.dropped == 1
    assert "1 examples are longer than max_length with the tokens of their images: left out" in data.told()
    _, batch = batch_of(run_of("image-text", rows, max_length=11, streaming=True))
    assert (batch["labels"][1] == -100).all()
    messages = [{"m": turns([{"type": "image"}], "good"), "image": []}, {"m": turns("a", "good"), "image": []}]
    form = {"prompt": None, "completion": None, "messages": "m"}
    assert "a row has 0 images, and its messages have more places" in said(run_of("image-text", messages, **form))
    audio = [{"m": turns([{"type": "audio"}], "good"), "image": None}]
    assert "a message has a part of type 'audio'; write parts of type text and image" in said(
        run_of("image-text", audio, **form)
    )


def test_identity_has_the_names_of_files(run_of, pictures):
    row = {"asks": "the film was", "seen": "good"}
    one, other = (data_identity(begun(run_of("image-text", [{**row, **image}]))[1].train) for image in (RED, BLUE))
    assert one != other and one == data_identity(begun(run_of("image-text", [{**row, **RED}]))[1].train)
    streams = [run_of("image-text", [{**row, **image}] * 2, streaming=True) for image in (RED, BLUE)]
    found = []
    for config, image in zip(streams, (RED, BLUE), strict=True):
        write_rows(pictures / "rows.jsonl", [{**row, **image}] * 2)
        found.append(begun(config)[1].train.identity()["first rows of the stream"])
    assert found[0] != found[1]


def test_templates_and_models_without_images(models, run_of, pictures, tmp_path):
    """Plain prompts where there is no chat template, and one that writes messages as text."""
    rows = [{"image": "red.png", "asks": "the film was", "seen": " good"}]
    plain = run_of("image-text", rows, chat_template=False)
    task, data = begun(plain)
    names = task.tokenizer.convert_ids_to_tokens(data.train[0]["input_ids"])
    assert " ".join(names) == "[CLS] <image> the film was good <end> [SEP]"
    assert [label != -100 for label in data.train[0]["labels"]] == [False] * 5 + [True] * 2 + [False]
    text_alone = SEES.replace("m.content is string", "true")
    other = llava(tmp_path / "other", text_alone)
    task, data = begun(plain.model_copy(update={
        "model": plain.model.model_copy(update={"name": str(other)}),
        "data": plain.data.model_copy(update={"chat_template": True}),
    }))  # fmt: skip
    names = task.tokenizer.convert_ids_to_tokens(data.train[0]["input_ids"])
    assert " ".join(names) == "user <image> the film was <end> assistant good <end>"
    words = model_for("causal-lm", tmp_path / "words")
    for name, message in (("image-text", "has no image_processor"), ("speech", "neither an encoder-decoder")):
        settings = settings_of(name, words, tmp_path / "rows.jsonl")
        with pytest.raises(ConfigError, match=message):
            begun(RunConfig(**settings))


def test_processors_of_tiles_reach_the_model(tmp_path):
    """Idefics3 cuts an image into tiles, writes other tokens around them, and pads rows to as many tiles."""
    from transformers import Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    folder = llava(tmp_path / "model")
    tokenizer = load_tokenizer(RunConfig(**settings_of("image-text", folder, tmp_path / "rows.jsonl")).model)
    tokenizer.add_tokens(["<fake_token_around_image>", "<end_of_utterance>", "<global-img>"], special_tokens=True)
    pixels = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    processor = Idefics3Processor(pixels, tokenizer, image_seq_len=2, chat_template=SEES)
    for file in folder.glob("*.json*"):
        if file.name != "config.json":
            file.unlink()
    processor.save_pretrained(folder)
    write_image(tmp_path / "wide.png", (255, 0, 0), size=(40, 20))
    write_image(tmp_path / "small.png", (255, 0, 0), size=(20, 20))
    rows = [
        {"image": ["wide.png"], "asks": "the film was", "seen": "good"},
        {"image": None, "asks": "the film", "seen": "bad"},
        {"image": ["small.png", "wide.png"], "asks": "the film", "seen": "bad film"},
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    settings = settings_of("image-text", folder, tmp_path / "rows.jsonl", eval_examples=0, max_length=200)
    task, data = begun(RunConfig(**settings))
    assert type(task.processor) is Idefics3Processor
    batch = task.collate(list(data.train))
    assert {"pixel_values", "pixel_attention_mask"} <= batch.keys()
    for row, wanted in zip(batch["labels"].tolist(), ("good <end>", "bad <end>", "bad film <end>"), strict=True):
        learnt = [token for token in row if token != -100]
        assert " ".join(task.tokenizer.convert_ids_to_tokens(learnt)) == wanted
    lengths = batch["attention_mask"].sum(1).tolist()
    assert lengths == [len(each["input_ids"]) + each["more"][0] for each in data.train]


def test_grids_of_patches_reach_the_model(models, run_of, pictures, monkeypatch):
    """Qwen2-VL, whose processor can be loaded with torchvision alone; rows together have the loss of each alone."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class Processor(Qwen2VLProcessor):
        def check_argument_for_proper_class(self, argument_name, argument):
            """Takes None for what reads videos."""

    marks = {f"{name}_token_id": f"<|{name}|>" for name in ("vision_start", "vision_end", "image_pad", "video_pad")}
    tokenizer = word_tokenizer([*WORDS, "user", "assistant", "<end>"])
    tokenizer.add_tokens([*marks.values()], special_tokens=True)
    template = SEES.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
    pixels = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56, patch_size=14)
    processor = Processor(pixels, tokenizer, None, chat_template=template)
    monkeypatch.setattr(image_text, "load_processor", lambda config, part: processor)
    write_image(pictures / "wide.png", (255, 0, 0), size=(60, 40))
    rows = [
        {"image": ["wide.png"], "asks": "the film was", "seen": "good"},
        {"image": None, "asks": "the film", "seen": "bad"},
        {"image": ["red.png", "wide.png"], "asks": "the film", "seen": "bad film"},
    ]
    task, data = begun(run_of("image-text", rows, max_length=64))
    batch = task.collate(list(data.train))
    assert {"pixel_values", "image_grid_thw", "mm_token_type_ids"} <= batch.keys()
    ids = {name.replace("_pad", ""): tokenizer.convert_tokens_to_ids(mark) for name, mark in marks.items()}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    text = {**sizes, "vocab_size": len(tokenizer), "intermediate_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 14}
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **ids)).eval()
    alone = [task.loss(model, task.collate([example])).item() for example in data.train]
    assert task.loss(model, batch).item() == pytest.approx(sum(alone), rel=1e-4)


@pytest.mark.parametrize("name", ["speech", "speech ctc", "image-text"])
def test_inputs_have_the_dtype_of_the_model(name, models, run_of, tmp_path):
    write_media(tmp_path)
    config = run_of(name, rows_of(name, 4))
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    task, data = begun(config)
    model: Any = load_model(config, CPU, task)
    assert model.dtype == torch.bfloat16
    batch = task.collate([task.vary(example, 1, at) for at, example in enumerate(data.train)])
    loss = task.loss(model, batch)
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    assert task.measure(model.eval(), batch)[0].isfinite()


@pytest.mark.parametrize(
    ("task", "data", "message"),
    [
        ("causal-lm", {"image": "image"}, r"^data.image='image': task=causal-lm sees no images; leave it out"),
        ("causal-lm", {"max_seconds": 2}, r"^data.max_seconds=2.0: task=causal-lm hears nothing; leave it out"),
        ("masked-lm", {"audio": "audio"}, r"^data.audio='audio': task=masked-lm hears nothing; leave it out"),
        ("speech", {"audio": None}, r"^data.audio=None: task=speech needs it; name the column of the recordings"),
        ("speech", {"text": None}, r"^data.audio='audio': needs text; set text"),
        ("speech", {"label": "label"}, r"^data.label='label': task=speech does not learn it; set data.text instead"),
        ("speech", {"pair": "text"}, r"^data.pair='text': task=speech does not use it; leave it out"),
        ("image-text", {"image": None}, r"^data.image=None: task=image-text needs it with prompt and completion"),
        ("image-text", {"packing": True}, r"^data.packing=True: task=image-text has one example a row"),
        ("image-text", {"name": "a.parquet", "on_bad_line": "skip"}, r"^data.on_bad_line='skip': a .parquet file with"),
    ],
)  # fmt: skip
def test_settings_of_media_that_do_not_fit(task, data, message, tmp_path):
    settings = settings_of(task, tmp_path, tmp_path / "rows.jsonl")
    settings["data"] = {key: value for key, value in {**settings["data"], **data}.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        RunConfig(**settings)


def test_images_lie_as_the_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=exif)
    image = media.Medium("image", str(tmp_path / "a.jpg"))
    assert media.size_of(image) == media.pixels_of(image).size == (10, 20)
    assert media.media_in(json.dumps(["a.jpg", "b.jpg"]), "image", "image", "x")[1].file == Path("x/b.jpg")
