"""The chunked loss: the loss and gradients of all logits, without them."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from grass_dist.errors import UnsupportedModel
from grass_dist.model.chunked_loss import chunk_loss, rows_of, summed_in_chunks

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 131,
    "pad_token_id": 0,
}


def llama(**more) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **more)).train()


def batch_of(rows: int = 3, length: int = 11) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 131, (rows, length), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)
    return {"input_ids": ids, "labels": labels}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(2, 60), st.booleans(), st.integers(0, 99))
def test_loss_and_gradients_are_those_of_all_logits(tokens, width, vocabulary, biased, seed):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    parts = [random(tokens, width), random(vocabulary, width), *([random(vocabulary)] if biased else [])]
    targets = torch.randint(-1, vocabulary, (tokens,), generator=generator)
    targets[targets < 0] = -100
    whole = F.cross_entropy(F.linear(*parts), targets, ignore_index=-100, reduction="sum")
    chunked = summed_in_chunks(parts[0], parts[1], parts[2] if biased else None, targets)
    torch.testing.assert_close(chunked.double(), whole, atol=1e-4, rtol=1e-5)
    expected = torch.autograd.grad(whole * 0.5, parts)
    for own, other in zip(torch.autograd.grad(chunked * 0.5, parts), expected, strict=True):
        torch.testing.assert_close(own, other, atol=2e-5, rtol=1e-4)


def test_a_chunk_has_as_many_logits_as_there_are_hidden_states():
    assert rows_of(1024, 4096, 128_000) == 33 and rows_of(8, 64, 32) == 8 and rows_of(1, 1, 1000) == 1


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("items", [None, 7.0])
def test_a_model_trains_as_with_whole_logits(tied, items):
    whole, chunked = llama(tie_word_embeddings=tied), llama(tie_word_embeddings=tied)
    names = [name for name, _ in chunked.named_parameters()]
    chunk_loss(chunked)
    assert [name for name, _ in chunked.named_parameters()] == names
    assert chunked.state_dict().keys() == whole.state_dict().keys()
    more = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    for model in (whole, chunked):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(3):
            found = model(**batch_of(), **more)
            found.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert (found.logits is None) == (model is chunked) and found["loss"] is found.loss
    for (name, own), other in zip(chunked.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(own, other, atol=2e-6, rtol=1e-5, msg=name)


def test_without_labels_and_in_evaluation_nothing_is_other():
    whole, chunked = llama(), llama()
    chunk_loss(chunked)
    ids = batch_of()["input_ids"]
    assert torch.equal(whole(input_ids=ids).logits, chunked(input_ids=ids).logits)
    for model in (whole, chunked):
        model.eval()
    with torch.no_grad():
        one, other = whole(**batch_of()), chunked(**batch_of())
        asked = chunked(**batch_of(), num_items_in_batch=1)
    assert torch.equal(one.logits, other.logits) and torch.equal(one.loss, other.loss)
    assert asked.logits is None
    torch.testing.assert_close(asked.loss / (batch_of()["labels"][:, 1:] != -100).sum(), one.loss)


def test_a_copy_of_the_model_has_a_loss_of_its_own():
    model = llama()
    chunk_loss(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    first, second = model(**batch_of()).loss, other(**batch_of()).loss
    torch.testing.assert_close(second.item(), float(torch.log(torch.tensor(131.0))))
    assert first.item() != second.item()


class Largest(TorchDispatchMode):
    """The most entries that an operator has made."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self.entries = max(self.entries, found.numel())
        return found


def test_the_logits_are_never_whole():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(SIZES | {"vocab_size": 4096}))).train()
    for parameter in (model.lm_head.weight, model.model.embed_tokens.weight):
        parameter.requires_grad_(False)
    batch = batch_of(4, 64)
    sizes = []
    for chunked in (False, True):
        if chunked:
            chunk_loss(model)
        with Largest() as largest:
            model(**batch).loss.backward()
        sizes.append(largest.entries)
    assert sizes[0] >= 4 * 64 * 4096 and sizes[1] <= 2 * 4 * 64 * 16 + 4096 * 16, sizes


def test_a_frozen_head_forms_no_gradient_of_it():
    model = llama()
    chunk_loss(model)
    model.lm_head.weight.requires_grad_(False)
    model(**batch_of()).loss.backward()
    assert model.lm_head.weight.grad is None and model.model.layers[0].mlp.up_proj.weight.grad is not None


def test_16_bits_and_autocast_are_as_whole_logits():
    for how in ("weights", "autocast"):
        whole, chunked = llama(), llama()
        chunk_loss(chunked)
        found = []
        for model in (whole, chunked):
            if how == "weights":
                model.to(torch.bfloat16)
            with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
                loss = model(**batch_of()).loss
            loss.backward()
            found.append((loss.item(), model.lm_head.weight.grad.float()))
        assert found[0][0] == pytest.approx(found[1][0], rel=5e-3)
        assert (found[0][1] - found[1][1]).norm() < 0.02 * found[0][1].norm(), how


def test_a_forward_that_fails_leaves_nothing_behind():
    model = llama()
    chunk_loss(model)
    with pytest.raises(TypeError):
        model(**batch_of(), no_such_argument=1, position_ids="none")
    assert model(input_ids=batch_of()["input_ids"]).logits.shape == (3, 11, 131)


def test_what_the_loss_cannot_be_made_of_is_refused():
    capped = Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=5.0)).train()
    chunk_loss(capped)
    with pytest.raises(UnsupportedModel, match="changes its logits after the head"):
        capped(**batch_of())
    routed = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2, output_router_logits=True)).train()
    chunk_loss(routed)
    with pytest.raises(UnsupportedModel, match="adds a loss of its router"):
        routed(**batch_of())
    with pytest.raises(UnsupportedModel, match="leave it whole"):
        chunk_loss(torch.nn.Linear(2, 2))
    t5 = T5ForConditionalGeneration(T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8, vocab_size=30))
    with pytest.raises(UnsupportedModel, match="leave it whole"):
        chunk_loss(t5)
    model = llama()
    chunk_loss(model)
    with pytest.raises(UnsupportedModel, match="do not fit hidden states"):
        model(**batch_of(), logits_to_keep=3)
    with pytest.raises(UnsupportedModel, match="a ChunkedHead"):
        chunk_loss(model)


def test_another_head_in_its_place_gives_whole_logits():
    whole, chunked = llama(), llama()
    chunk_loss(chunked)
    for model in (whole, chunked):
        torch.manual_seed(3)
        model.resize_token_embeddings(140, mean_resizing=False)
    one, other = whole(**batch_of()), chunked(**batch_of())
    assert torch.equal(one.loss, other.loss) and torch.equal(one.logits, other.logits)


def test_a_tuple_has_no_place_for_the_loss():
    model = llama()
    chunk_loss(model)
    with pytest.raises(UnsupportedModel, match="return_dict=True"):
        model(**batch_of(), return_dict=False)


@pytest.mark.parametrize("lora", [False, True])
def test_trainer_trains_and_evaluates_as_with_whole_logits(lora, tmp_path):
    rows = [{name: tensor[i % 3] for name, tensor in batch_of().items()} for i in range(12)]
    found = []
    for chunked in (False, True):
        model = llama()
        if chunked:
            chunk_loss(model)
        if lora:
            peft = pytest.importorskip("peft")
            torch.manual_seed(1)
            model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
        args = TrainingArguments(
            output_dir=str(tmp_path / str(chunked)),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=3,
            learning_rate=1e-2,
            eval_strategy="steps",
            eval_steps=3,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            seed=5,
        )
        trainer = Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows[:4])
        trainer.train()
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        found.append((weights, [row["loss"] for row in trainer.state.log_history if "loss" in row]))
        found[-1][1].append(next(row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row))
    torch.testing.assert_close(found[0][0], found[1][0], atol=2e-4, rtol=1e-3)
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-3) and len(found[0][1]) == 4
