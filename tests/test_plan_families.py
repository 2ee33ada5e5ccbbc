"""Plans of encoders, of encoder-decoders, and of a folding trunk, whose memory grows with the cube of the length."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from grass_dist import find_layers
from grass_dist.cli import app
from grass_dist.errors import GrassError, UnsupportedModel
from grass_dist.plan.cost import flops
from grass_dist.plan.memory import memory_of, states_of, weights_of
from grass_dist.plan.pairs import Pairs, pairs_of
from grass_dist.plan.runs import Method, PlannedRun
from grass_dist.plan.shape import elements_in, shape_of_config, shape_of_model
from grass_dist.plan.simulate import simulate
from grass_dist.terminal import size
from tests.families import ESM, TRUNK, T, jamba, loss_of

WIDE = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
BOTH = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 1024, "decoder_ffn_dim": 1024}
MASKED = T.EsmConfig(**{**ESM, **WIDE})
SIDES = T.BartConfig(
    vocab_size=2000,
    d_model=256,
    encoder_layers=3,
    decoder_layers=3,
    **BOTH,
    architectures=["BartForConditionalGeneration"],
)
FOLDING = {
    "num_blocks": 4,
    "sequence_state_dim": 64,
    "pairwise_state_dim": 32,
    "sequence_head_width": 16,
    "pairwise_head_width": 16,
    "structure_module": {**TRUNK["structure_module"], "sequence_dim": 32, "pairwise_dim": 32, "num_heads_ipa": 4},
}


def esmfold(**trunk: Any) -> Any:
    folds = {"fp16_esm": True, "lddt_head_hid_dim": 8, "trunk": {**FOLDING, "chunk_size": None, **trunk}}
    return T.EsmConfig(**ESM, is_folding_model=True, esmfold_config=folds)


def job_of(**changes: Any) -> PlannedRun:
    given = {"gpus": 1, "gpus_per_host": 8, "gpu_bytes": 24e9, "seq_len": 48, "backend": "single", "dtype": "float32"}
    return PlannedRun(**{**given, **changes})


# --- what is read of a configuration


def test_the_shapes_are_those_of_what_trains():
    for config, make in (
        (MASKED, T.EsmForMaskedLM),
        (SIDES, T.BartForConditionalGeneration),
        (jamba().config, T.JambaForCausalLM),
        (esmfold(), T.EsmForProteinFolding),
    ):
        with torch.device("meta"):
            model = make(config)
        shape, found = shape_of_config("it", config), find_layers(model)
        assert shape.numel == sum(p.numel() for p in model.parameters())
        assert [elements_in(layer) for layer in shape.layers] == [unit.numel for unit in found.layers]
        assert elements_in(shape.frozen) == sum(p.numel() for p in model.parameters() if not p.requires_grad)
        assert shape.causal == (make is T.JambaForCausalLM) and (shape.pairs is None) == (
            make is not T.EsmForProteinFolding
        )


def test_the_largest_layer_of_several_stacks_sizes_the_slots():
    shape = shape_of_config("bart", SIDES)
    encoder, decoder = elements_in(shape.layers[0]), elements_in(shape.layers[-1])
    assert shape.num_layers == 6 and decoder > encoder and shape.layer_numel == decoder
    roles = sum(map(elements_in, shape.roles.values()))
    device, host = states_of(shape, job_of(), Method("grass", 2))
    assert device == 8 * (3 * decoder + roles) and host == 8 * 3 * (encoder + decoder)


def test_a_configuration_says_of_which_class_the_plan_is(tmp_path):
    plain = shape_of_config("bert", T.BertConfig(**WIDE))
    masked = shape_of_config("bert", T.BertConfig(**WIDE, architectures=["BertForMaskedLM"]))
    assert plain.causal and not masked.causal
    MASKED.save_pretrained(tmp_path)
    assert shape_of_model(str(tmp_path)).num_layers == 4


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (T.ViTConfig(architectures=["ViTForImageClassification"]), "ViTForImageClassification"),
        (T.WhisperConfig(architectures=["WhisperForConditionalGeneration"]), "WhisperForConditionalGeneration"),
        (T.LlavaConfig(), "LlavaConfig"),
    ],
)
def test_what_reads_more_than_tokens_is_refused_by_name(config, named):
    with pytest.raises(UnsupportedModel, match=f"{named}: a plan is of models that read tokens alone .* by --params"):
        shape_of_config("it", config)


# --- the closed form against the simulation


@pytest.mark.parametrize(
    ("config", "checkpointing"),
    [(MASKED, False), (MASKED, True), (SIDES, False), (SIDES, True)],
    ids=["esm2", "esm2 again", "bart", "bart again"],
)
def test_encoders_and_encoder_decoders_are_simulated(config, checkpointing):
    shape, job = shape_of_config("it", config), job_of(seq_len=256, checkpointing=checkpointing)
    found, closed = simulate(shape, job, Method("grass", 2)), memory_of(shape, job, Method("grass", 2))
    print(f"{found.allocated / 1e6:.1f} simulated, {closed.allocated / 1e6:.1f} MB by the closed form")
    assert found.weights == pytest.approx(weights_of(shape, job), rel=0.01)
    assert closed.allocated == pytest.approx(found.allocated, rel=0.35)


def test_what_the_simulation_cannot_follow_is_a_sentence():
    with pytest.raises(GrassError, match="it.*cannot run on fake"):
        simulate(shape_of_config("it", esmfold()), job_of(checkpointing=True), Method("grass", 2))


# --- pairs


class Block(nn.Module):
    """A folding block of ESMFold, and the bytes that its forward keeps for a backward."""

    def __init__(self, config: Any, trained: bool) -> None:
        super().__init__()
        with torch.random.fork_rng():
            self.block = T.EsmForProteinFolding(config).trunk.blocks[0].requires_grad_(trained)
        self.single = config.esmfold_config.trunk.sequence_state_dim
        self.pair = config.esmfold_config.trunk.pairwise_state_dim

    def run(self, length: int, chunk: int | None = None) -> torch.Tensor:
        single = torch.randn(1, length, self.single, requires_grad=True) * 1
        pairs = torch.randn(1, length, length, self.pair, requires_grad=True) * 1
        mask = torch.ones(1, length, dtype=torch.long)
        return self.block(single, pairs, mask=mask, chunk_size=chunk)[1]

    def kept(self, length: int, chunk: int | None = None) -> int:
        own = {p.untyped_storage().data_ptr() for p in self.parameters()}
        seen: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.run(length, chunk)
        return sum(storage.nbytes() for storage in seen.values())


@pytest.mark.parametrize("trained", [True, False])
def test_what_a_block_keeps_is_counted_to_a_percent(trained):
    block, pairs = Block(esmfold(), trained), pairs_of(esmfold())
    for length in (16, 32, 64):
        assert pairs.kept(length, 4, trained=trained) == pytest.approx(block.kept(length), rel=0.01)
    assert block.kept(32, chunk=4) == block.kept(32)  # chunks keep the same


def test_the_products_of_a_block_are_counted():
    config = esmfold()
    shape, length = shape_of_config("fold", config), 40
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        Block(config, trained=False).run(length)
    job = job_of(seq_len=length)
    forward = flops(shape, job, Method("grass", 2))[0]
    outside = 2 * (64 * 32 * length**2 + elements_in(tuple(s for s in shape.frozen if len(s) == 2)) * length)
    assert (forward - outside) / 4 == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_the_memory_of_a_trunk_follows_the_cube_of_the_length():
    def of(length: int, **more: Any) -> float:
        return memory_of(
            shape_of_config("fold", esmfold()), job_of(seq_len=length, **more), Method("grass", 2)
        ).activations

    assert of(2**15) / of(2**14) == pytest.approx(8, rel=0.1) and of(64) / of(32) == pytest.approx(4, rel=0.2)
    assert of(512, checkpointing=True) < 0.4 * of(512)  # one block of four, and the inputs of all
    pairs, chunked = pairs_of(esmfold()), pairs_of(esmfold(chunk_size=64))
    assert chunked.kept(512, 4, trained=True) == pairs.kept(512, 4, trained=True)
    assert chunked.flow(512, 4) < pairs.flow(512, 4) / 5


class Peak(TorchDispatchMode):
    """The most bytes of tensors that ops have made, at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self._alive = 0, dict[int, tuple[StorageWeakRef, int]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and (at := tensor.untyped_storage())._cdata not in given:
                self._alive[at._cdata] = StorageWeakRef(at), at.nbytes()
        self._alive = {at: entry for at, entry in self._alive.items() if not entry[0].expired()}
        self.most = max(self.most, sum(nbytes for _, nbytes in self._alive.values()))
        return made


@pytest.mark.parametrize("chunk", [None, 8])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_closed_form_of_a_trunk_is_near_what_a_step_takes(checkpointing, chunk):
    """All of ESMFold, forward and backward, with the trunk's blocks and what is around them trained."""
    config, length = esmfold(num_blocks=3, chunk_size=chunk), 64
    config.esmfold_config.fp16_esm = False
    with torch.random.fork_rng():
        model: Any = T.EsmForProteinFolding(config).train()
    for untrained in (model.lm_head, model.lddt_head, model.ptm_head):
        untrained.requires_grad_(False)
    if checkpointing:
        for block in model.trunk.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    ids = torch.zeros(1, length, dtype=torch.long)
    with Peak() as peak:
        loss_of(model(input_ids=ids, num_recycles=0)).backward()
    shape, job = shape_of_config("fold", config), job_of(seq_len=length, checkpointing=checkpointing)
    closed = memory_of(shape, job, Method("full", 3))
    planned = closed.allocated - closed.weights - closed.states
    print(f"chunk {chunk}, checkpointing {checkpointing}: {peak.most / 1e6:.1f} taken, {planned / 1e6:.1f} MB planned")
    assert planned == pytest.approx(peak.most, rel=0.10)


def test_the_page_has_the_figures_of_the_released_trunk():
    pairs = pairs_of(T.EsmConfig(**ESM, is_folding_model=True, esmfold_config={}))
    lines = (Path(__file__).parents[1] / "docs" / "science.md").read_text()
    for length in (128, 256, 384, 512, 1024):
        block, scores = pairs.kept(length, 2, trained=True), pairs.scores(length, 2)
        chunks = scores * min(pairs.chunk or length, length) / length
        every = (block, scores, 48 * block, 48 * pairs.inputs(length, 2) + block, scores, chunks)
        assert f"| {length} | {' | '.join(map(size, every))} |" in lines


def test_the_command_says_what_the_length_costs(tmp_path):
    esmfold(chunk_size=16).save_pretrained(tmp_path)
    told = tmp_path / "plan.json"
    options = ["--gpus", "1", "--gpu-memory", "24GB", "--seq-len", "128", "--dtype", "float32", "--fast"]
    result = CliRunner().invoke(app, ["plan", "--model", str(tmp_path), *options, "--json", str(told)])
    assert result.exit_code == 0, result.output
    pairs: Pairs = pairs_of(esmfold(chunk_size=16))
    first, second, *_ = json.loads(told.read_text())["sentences"]
    assert first == pairs.sentences(128, 4)[0] and "grow with the cube of the length" in first
    assert "in chunks of 16 rows 4.19 MB instead of 33.6 MB" in second
    refused = CliRunner().invoke(app, ["plan", "--model", str(tmp_path), *options, "--write", str(tmp_path / "a.yaml")])
    assert refused.exit_code == 1 and "causal language models" in refused.output
