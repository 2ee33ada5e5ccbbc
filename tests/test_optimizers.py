"""What `optim=` of transformers' `TrainingArguments` becomes with GRASS, class by class, and `MuonAdamW`."""

from __future__ import annotations

import copy
import functools
import importlib.util
from pathlib import Path

import pytest
import torch

from grass_dist import ConfigError, GrassConfig, GrassOptimizer, MuonAdamW, disable, enable
from grass_dist.huggingface.arguments import arguments_of
from tests.optimizer_cases import CASES, MARKS, PAGE, table
from tests.tiny import loss_of, take_steps, tiny

transformers = pytest.importorskip("transformers")

ALL = GrassConfig(active_layers=8, probe_steps=0)


# --- optim= of a Trainer


def trained(folder, optim, more, *, layers=4):
    """Weights and the optimizer after a run of four steps."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_hidden_layers=layers))
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(16 * 8).view(16, 8) % 61]
    args = transformers.TrainingArguments(
        folder, max_steps=4, per_device_train_batch_size=2, optim=optim, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant", **more,
    )  # fmt: skip
    trainer = transformers.Trainer(model, args, train_dataset=rows)
    trainer.train()
    return [p.detach().clone() for p in model.parameters()], trainer.optimizer.optimizer


def test_every_name_that_transformers_knows_has_a_case():
    assert [case.name for case in CASES] == [name.value for name in transformers.training_args.OptimizerNames]


@pytest.mark.integration
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_optimizer_stays_what_it_is_or_is_refused_by_name(case, tmp_path, monkeypatch):
    if case.needs and importlib.util.find_spec(case.needs) is None:
        with pytest.raises((ImportError, ValueError)):  # transformers' own
            trained(tmp_path, case.name, case.more)
        pytest.skip(f"{case.needs} is not installed: transformers refuses it itself")
    if case.compiles:  # for each shape, which takes minutes on a CPU: its update is traced, and runs as it is
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    if case.broken:
        with pytest.raises(Exception, match=case.broken):
            trained(tmp_path, case.name, case.more)
        pytest.skip("stock fails here, too")
    enable(GrassConfig(active_layers=4, probe_steps=0))
    try:
        if case.refused:
            with pytest.raises(ConfigError, match=case.refused):
                trained(tmp_path, case.name, case.more)
            return
        ours, grass = trained(tmp_path, case.name, case.more)
    finally:
        disable()
    stock, inner = trained(tmp_path, case.name, case.more)
    assert all(map(torch.equal, ours, stock))
    assert isinstance(grass, GrassOptimizer)
    own = grass._unit_optimizers[0].inner
    assert own is not None and type(own) is type(inner)
    for key, value in vars(inner).items():
        if isinstance(value, bool | int | float | str):
            assert getattr(own, key) == value or key == "initialized"
    if hasattr(inner, "args"):
        assert vars(own.args) == vars(inner.args)


def test_the_page_has_the_table_of_these_cases():
    text = Path(PAGE).read_text()
    begin, end = (text.index(mark) for mark in MARKS)
    assert text[begin + len(MARKS[0]) : end].strip() == table().strip()


# --- arguments


class Hidden(torch.optim.SGD):
    """Keeps what it was given where nobody finds it by its name."""

    def __init__(self, params, lr=0.1, secret=1):
        super().__init__(params, lr=lr)
        self.kept_elsewhere = secret * 2


def test_an_argument_that_cannot_be_found_is_refused():
    assert arguments_of(Hidden(tiny().parameters()))["lr"] == 0.1
    with pytest.raises(ConfigError, match="another one has another 'kept_elsewhere'"):
        arguments_of(Hidden(tiny().parameters(), secret=3))


# --- classes that keep other weights for training


class Averaging(torch.optim.SGD):
    """Evaluates another point than it trains at, as optimizers without a schedule do."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group["train_mode"] = False

    @torch.no_grad()
    def step(self, closure=None):
        if not self.param_groups[0]["train_mode"]:
            raise RuntimeError("call train() first")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    z = self.state[p].setdefault("z", p.detach().clone())
                    z.sub_(p.grad, alpha=group["lr"])
                    p.lerp_(z, 0.5)

    def _change(self, training, weight):
        for group in self.param_groups:
            for p in group["params"] if group["train_mode"] is not training else ():
                if "z" in self.state[p]:
                    p.data.lerp_(self.state[p]["z"], weight)
            group["train_mode"] = training

    def train(self):
        self._change(True, -0.25)

    def eval(self):
        self._change(False, 0.2)


@pytest.mark.parametrize("mode", ["none", "interval"])
def test_train_and_eval_reach_the_class_in_every_layer(mode):
    model, stock = tiny(), tiny()
    with pytest.raises(ConfigError, match="host_dtype"):
        GrassOptimizer(tiny(), Averaging, config={**ALL.model_dump(), "offload": {"host_dtype": "bfloat16"}})
    ours = GrassOptimizer(
        model, Averaging, {"lr": 0.05}, config={**ALL.model_dump(), "offload": {"mode": mode}}
    )  # fmt: skip
    plain = Averaging(stock.parameters(), lr=0.05)
    for optimizer, trained_model in ((ours, model), (plain, stock)):
        optimizer.train()
        take_steps(trained_model, optimizer, range(2))
        optimizer.eval()
    assert all(map(torch.equal, model.parameters(), stock.parameters()))
    with pytest.raises(RuntimeError, match=r"call train\(\) first"):
        take_steps(model, ours, range(2, 3))


def test_layers_at_rest_show_their_evaluated_weights_too():
    model = tiny()
    config = GrassConfig(active_layers=2, probe_steps=0, sampling_interval=2)
    optimizer = GrassOptimizer(model, Averaging, {"lr": 0.05}, config=config)
    optimizer.train()
    take_steps(model, optimizer, range(6))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.eval()
    with_state = {id(p) for p, own in optimizer.state.items() if own}
    changed = {id(p) for p, old in zip(model.parameters(), before, strict=True) if not torch.equal(p, old)}
    assert changed and changed <= with_state
    assert len({p for layer in model.layers for p in layer.parameters() if id(p) in changed}) > 2 * 6 - 1
    optimizer.train()
    torch.testing.assert_close(before, [p.detach() for p in model.parameters()])


# --- Muon


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_for_layers_and_adamw_for_the_rest_are_torchs(adjust, nesterov):
    model, stock = tiny(), tiny()
    of_muon = {"momentum": 0.9, "nesterov": nesterov, "ns_steps": 4, "adjust_lr_fn": adjust}
    ours = GrassOptimizer(model, MuonAdamW, {"lr": 0.01, "weight_decay": 0.1, **of_muon}, config=ALL)
    matrices = [p for layer in stock.layers for p in layer.parameters() if p.ndim == 2]
    known = {id(p) for p in matrices}
    others = [p for p in stock.parameters() if id(p) not in known]
    both = [
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, **of_muon),
        torch.optim.AdamW(others, lr=0.01, weight_decay=0.1),
    ]
    for step in range(4):
        take_steps(model, ours, range(step, step + 1))
        loss_of(stock, step).backward()
        for own in both:
            own.step()
            own.zero_grad()
    assert all(map(torch.equal, model.parameters(), stock.parameters()))
    other_model = copy.deepcopy(stock)
    saved = copy.deepcopy(ours.state_dict())
    other = GrassOptimizer(other_model, MuonAdamW, {"lr": 0.01, "weight_decay": 0.1, **of_muon}, config=ALL)
    other.load_state_dict(saved)
    take_steps(model, ours, range(4, 6))
    take_steps(other_model, other, range(4, 6))
    assert all(map(torch.equal, model.parameters(), other_model.parameters()))


def test_muon_of_torch_names_the_class_that_takes_the_rest():
    with pytest.raises(ConfigError, match="Muon.*it takes matrices alone; use grass_dist.MuonAdamW"):
        GrassOptimizer(tiny(), torch.optim.Muon, {"lr": 0.01}, config=ALL)


# --- bitsandbytes


@pytest.mark.parametrize("offload", ["none", "interval"])
def test_weights_that_bitsandbytes_keeps_in_32_bits_stay_so(offload):
    """Its manager knows them by attributes that are not documented."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    bitsandbytes.optim.GlobalOptimManager._instance = None
    ended = []
    for ours in (False, True):
        model = tiny(layers=4, width=64, vocab=128)
        manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
        manager.register_module_override(model.layers[1].up, "weight", {"optim_bits": 32})
        kwargs = {"lr": 1e-2, "optim_bits": 8}
        if ours:
            config = GrassConfig(active_layers=4, probe_steps=0, offload={"mode": offload})
            optimizer = GrassOptimizer(model, bitsandbytes.optim.AdamW, kwargs, config=config)
        else:
            optimizer = bitsandbytes.optim.AdamW(model.parameters(), **kwargs)
        take_steps(model, optimizer, range(3))
        kept = {n: optimizer.state[p]["state1"].dtype for n, p in model.named_parameters() if p.numel() > 4096}
        ended.append(([p.detach() for p in model.parameters()], kept))
    (stock, kept_by_stock), (weights, kept) = ended
    assert kept == kept_by_stock and kept["layers.1.up.weight"] == torch.float32
    assert torch.uint8 in kept.values()
    assert all(map(torch.equal, weights, stock))
