"""Compiled blocks: what is said where dynamo's limit is too low, and that the limit named is enough."""

from __future__ import annotations

import re

import pytest
import torch
import torch._dynamo
from torch import nn

from grass_dist import GrassConfig, GrassOptimizer
from grass_dist.model.compiled import compile_layers
from tests.tiny import Block, loss_of, tiny

CONFIG = {"active_layers": 2, "probe_steps": 3, "sampling_interval": 1, "update_interval": 1}


class Indexed(Block):
    """A block that knows which one it is, as those of transformers do."""

    def __init__(self, width: int, index: int) -> None:
        super().__init__(width)
        self.index = index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.index < 0 else super().forward(x)


class Counter:
    """A backend of torch.compile that counts the graphs that run."""

    def __init__(self) -> None:
        self.ran = 0

    def __call__(self, module: torch.fx.GraphModule, _: list) -> object:
        def run(*inputs: torch.Tensor) -> object:
            self.ran += 1
            return module.forward(*inputs)

        return run


def run(caplog, limit: int, *, indexed: bool, wrapped: bool = False, **config) -> tuple[list[str], int]:
    """What is said, and the fewest layers of six that ran compiled in a forward."""
    torch._dynamo.reset()
    caplog.clear()
    model, counter = tiny(layers=6), Counter()
    blocks = [Indexed(8, index) if indexed else Block(8) for index in range(6)]
    for block in () if wrapped else blocks:
        block.compile(backend=counter)
    model.layers = nn.ModuleList(torch.compile(block, backend=counter) if wrapped else block for block in blocks)
    fewest = 6
    with torch._dynamo.config.patch(recompile_limit=limit):
        optimizer = GrassOptimizer(model, torch.optim.AdamW, {"lr": 1e-2}, config=GrassConfig(**CONFIG, **config))
        for step in range(30):
            for evaluation in (False, True):
                counter.ran = 0
                with torch.set_grad_enabled(not evaluation):
                    loss = loss_of(model, step)
                if not evaluation:
                    loss.backward()
                    fewest = min(fewest, counter.ran)
            optimizer.step()
            optimizer.zero_grad()
    return [r.getMessage() for r in caplog.records if r.name == "grass_dist" and "dynamo" in r.getMessage()], fewest


@pytest.mark.parametrize("always_active", [(), ("embeddings", "final_norm", "lm_head")])
def test_blocks_that_differ_need_the_limit_that_is_named(caplog, always_active):
    said, fewest = run(caplog, 8, indexed=True, always_active=always_active)
    assert len(said) == 1 and "6 compiled blocks of Indexed differ (by index)" in said[0]
    assert fewest < 6
    needed = int(re.search(r"torch\._dynamo\.config\.recompile_limit = (\d+)", said[0])[1])
    assert run(caplog, needed, indexed=True, always_active=always_active) == ([], 6)


def test_blocks_that_are_alike_need_no_other_limit(caplog):
    assert run(caplog, 8, indexed=False) == ([], 6)
    assert run(caplog, 8, indexed=False, always_active=()) == ([], 6)


def test_what_torch_compile_returns_is_looked_into(caplog):
    said, _ = run(caplog, 8, indexed=True, wrapped=True)
    assert len(said) == 1 and "6 compiled blocks of Indexed differ (by index)" in said[0]


@pytest.mark.parametrize(("always_active", "most"), [(("embeddings", "final_norm", "lm_head"), 3), ((), 4)])
def test_thirty_draws_of_compiled_layers_need_few_graphs(caplog, always_active, most):
    import transformers

    torch._dynamo.reset()
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 6}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2, use_cache=False))
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list) -> object:
        graphs.append(graph)
        return graph.forward

    with torch._dynamo.config.patch(recompile_limit=8):
        compile_layers(model, [f"model.layers.{i}" for i in range(6)], backend=backend)
        config = GrassConfig(**CONFIG, always_active=always_active)
        optimizer = GrassOptimizer(model, torch.optim.AdamW, {"lr": 1e-2}, config=config)
        for step in range(33):
            ids = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(step))
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert optimizer.grass.round >= 30
    assert 2 <= len(graphs) <= most
    assert not [r for r in caplog.records if "dynamo" in r.getMessage()]


def test_a_model_that_is_compiled_whole_is_told_of_once(caplog):
    for compiled in (True, False):
        caplog.clear()
        model = tiny(layers=6)
        if compiled:
            model = torch.compile(model, backend="eager")
        GrassOptimizer(model, torch.optim.AdamW, {"lr": 1e-2}, config=GrassConfig(**CONFIG)).detach()
        said = [r.getMessage() for r in caplog.records if "compiled as a whole" in r.getMessage()]
        assert len(said) == compiled
        assert not compiled or said[0].startswith("Tiny is compiled as a whole with 6 layers in it")
