"""Every class of transformers that people fine-tune, built tiny: it trains all of itself, or is refused with a way."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

pytest.importorskip("transformers")

from integration_tests.support.model_sweep import every_class, sweep
from integration_tests.support.model_table import tables
from integration_tests.support.model_trial import BARE, NOT_COUNTED, SAID, SILENT, WORKS, WRONG, Outcome, try_class

ONE_OF_EACH = {
    "LlamaForCausalLM", "JambaForCausalLM", "T5ForConditionalGeneration", "AlbertForMaskedLM", "BertForMaskedLM",
    "LlamaForSequenceClassification", "SwinForImageClassification", "WhisperForConditionalGeneration",
    "Wav2Vec2ForCTC", "LlavaForConditionalGeneration",
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    done = sweep(list(every_class()), processes=2)
    (tmp_path_factory.mktemp("sweep") / "models.json").write_text(json.dumps([asdict(o) for o in done]))
    print(tables(done))
    return done


@pytest.mark.long
@pytest.mark.timeout(3 * 3600)
def test_nothing_is_frozen_in_silence_or_fails_bare(outcomes: list[Outcome]) -> None:
    bad = [(o.name, o.verdict, o.detail) for o in outcomes if o.verdict in (SILENT, SAID, BARE, WRONG)]
    assert not bad


@pytest.mark.long
@pytest.mark.timeout(3 * 3600)
def test_nearly_all_models_train_without_a_setting(outcomes: list[Outcome]) -> None:
    counted = [o for o in outcomes if o.verdict not in NOT_COUNTED]
    assert len(counted) >= 400
    assert sum(o.verdict == WORKS for o in counted) >= 0.95 * len(counted)


def test_a_trial_notices_a_head_that_does_not_train() -> None:
    import transformers

    found = Outcome("sequence-classification", "llama", "LlamaForSequenceClassification")
    found.way = {"always_active": ("embeddings", "final_norm")}
    try_class(found, transformers.LlamaForSequenceClassification, {})
    assert "not trained: ['score.weight'] of 1" in found.detail


@pytest.mark.integration
@pytest.mark.timeout(600)
def test_one_class_of_each_kind_trains() -> None:
    done = sweep([o for o in every_class() if o.name in ONE_OF_EACH])
    assert {o.name for o in done if o.verdict != WORKS} == {"AlbertForMaskedLM"}, [(o.name, o.detail) for o in done]
    assert len(done) == len(ONE_OF_EACH)
