import copy
import io
import math

import numpy as np
import pytest
import torch

import grass_dist
from grass_dist import ConfigError, GrassConfig, GrassError, GrassOptimizer, Refreshed, Sampled, UnsupportedModel
from grass_dist.method.samplers import draw_layers, make_sampler
from grass_dist.states.moving import IntervalStates, StreamedStates
from grass_dist.states.resident import ResidentStates
from tests.tiny import loss_of, take_steps, tiny

ADAMW = {"lr": 1e-2, "weight_decay": 0.1}
QUICK = {"active_layers": 2, "probe_steps": 2, "sampling_interval": 3, "update_interval": 3}
OFFLOADS = [
    *({"prefetch_steps": steps} for steps in (0, 1, 2, 9)),
    *({"mode": mode, "slots": 2} for mode in ("stream", "none", "auto")),
]


def grass(
    model, optimizer_class=torch.optim.AdamW, kwargs=ADAMW, *, params=None, accumulation=1, observers=(), **config
):
    return GrassOptimizer(
        model,
        optimizer_class,
        kwargs,
        config=GrassConfig(**{**QUICK, **config}),
        params=params,
        gradient_accumulation_steps=accumulation,
        observers=observers,
    )


def test_the_phases_of_a_run():
    model, seen = tiny(), []
    optimizer = grass(model, draw_ahead=0, observers=[seen.append])
    view = optimizer.grass
    assert (view.phase, view.step, view.round, view.active_layers) == ("probe", 0, -1, tuple(range(8)))
    assert all(math.isnan(m) for m in view.importances) and view.probabilities == (0.125,) * 8
    before = copy.deepcopy(model.state_dict())
    take_steps(model, optimizer, range(2))
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())
    assert (view.phase, view.step, view.round, len(view.active_layers)) == ("train", 2, 0, 2)
    assert all(m > 0 for m in view.importances) and sum(view.probabilities) == pytest.approx(1.0)
    assert [type(event) for event in seen] == [Refreshed, Sampled]
    take_steps(model, optimizer, range(2, 9))
    assert (view.step, view.round) == (9, 2)
    assert [(type(e), e.step) for e in seen] == [
        (Refreshed, 2), (Sampled, 2), (Refreshed, 5), (Sampled, 5), (Refreshed, 8), (Sampled, 8),
    ]  # fmt: skip
    assert seen[-1].active_layers == view.active_layers and seen[-2].importances == view.importances


# T_p = 2, T_u = 4, T_s = 3: what is told after which step, R a refresh, S a switch with the step of its draw
TOLD = {
    0: ["R2", "S2 of 2", "S5 of 5", "R6", "S8 of 8", "R10", "S11 of 11"],
    1: ["R2", "S2 of 2", "R5", "S5 of 4", "S8 of 7", "R9", "S11 of 10"],
    2: ["R2", "S2 of 2", "R4", "S5 of 3", "R8", "S8 of 6", "S11 of 9", "R12"],
}


@pytest.mark.parametrize("ahead", [0, 1, 2, None])
def test_a_draw_ahead_uses_the_probabilities_of_its_own_time(ahead):
    model, seen, trained = tiny(), [], []
    optimizer = grass(model, update_interval=4, draw_ahead=ahead, observers=[seen.append])
    for step in range(12):
        trained.append(optimizer.grass.active_layers)
        take_steps(model, optimizer, range(step, step + 1))
    told = [f"R{e.step}" if isinstance(e, Refreshed) else f"S{e.step} of {e.drawn_at}" for e in seen]
    assert told == TOLD[2 if ahead is None else ahead]
    refreshes = [e for e in seen if isinstance(e, Refreshed)]
    draws = [e for e in seen if isinstance(e, Sampled)]
    assert [e.round for e in draws] == [0, 1, 2, 3]
    for event in draws:
        then = [e for e in refreshes if e.step <= event.drawn_at][-1]
        assert event.probabilities == then.probabilities
        sampler = make_sampler(optimizer.grass.config, 8)
        by_hand = draw_layers(sampler, np.array(then.importances), optimizer.grass.config, event.round)
        assert event.active_layers == by_hand
    assert len({e.probabilities for e in draws}) == 3 and len({e.active_layers for e in draws}) > 1
    first, second, third, last = (e.active_layers for e in draws)
    assert trained == [tuple(range(8))] * 2 + [first] * 3 + [second] * 3 + [third] * 3 + [last]


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_a_refresh_comes_before_a_draw_of_the_same_step(ahead):
    model, seen = tiny(), []
    optimizer = grass(model, draw_ahead=ahead, observers=[seen.append])
    take_steps(model, optimizer, range(11))
    refreshed = {e.step: e.probabilities for e in seen if isinstance(e, Refreshed)}
    drawn = {e.drawn_at: e.probabilities for e in seen if isinstance(e, Sampled)}
    assert list(drawn) == [2, 5 - ahead, 8 - ahead, 11 - ahead]
    assert drawn == {step: refreshed[step] for step in drawn} and len(set(drawn.values())) == 4


def test_only_active_layers_and_roles_move():
    model = tiny()
    optimizer = grass(model)
    take_steps(model, optimizer, range(2))
    for start in (2, 5, 8):
        active = optimizer.grass.active_layers
        before = copy.deepcopy(model.state_dict())
        take_steps(model, optimizer, range(start, start + 3))
        moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
        expected = {n for n in before if not n.startswith("layers.") or int(n.split(".")[1]) in active}
        assert moved == expected


def test_importances_are_those_of_the_formula():
    model, reference = tiny(), tiny()
    optimizer = grass(model)
    take_steps(model, optimizer, range(2))
    expected = np.zeros(8)
    for step in range(2):
        reference.zero_grad()
        loss_of(reference, step).backward()
        for i, layer in enumerate(reference.layers):
            entries = torch.cat([p.grad.flatten().double() for p in layer.parameters()])
            expected[i] += entries.square().mean().sqrt().item() / 2
    assert optimizer.grass.importances == pytest.approx(expected.tolist(), rel=1e-7)


def test_a_probe_with_accumulation_measures_the_whole_batch():
    whole, parts = tiny(), tiny()
    one, two = grass(whole), grass(parts, accumulation=2)
    for _ in range(2):
        ((loss_of(whole, 0) + loss_of(whole, 1)) / 2).backward()
        one.step()
        for micro in range(2):
            (loss_of(parts, micro) / 2).backward()
            assert [n for n, p in parts.named_parameters() if p.grad is not None] in ([], ["norm.weight"])  # zeros
        two.step()
    assert two.grass.importances == pytest.approx(one.grass.importances, rel=1e-5)


def test_a_probe_with_fewer_last_micro_batches_measures_them():
    model, reference = tiny(), tiny()
    optimizer, other = grass(model, accumulation=3), grass(reference)
    for step in range(2):
        loss_of(model, step).backward()
        optimizer.step()
        loss_of(reference, step).backward()
        other.step()
    assert optimizer.grass.importances == pytest.approx(other.grass.importances, rel=1e-6)


def test_a_probe_with_more_backwards_than_it_was_told_says_so():
    model = tiny()
    optimizer = grass(model)
    loss_of(model, 0).backward()
    with pytest.raises(GrassError, match="gradient_accumulation_steps=1: .* to GrassOptimizer"):
        loss_of(model, 1).backward()
    assert optimizer.grass.phase == "probe"


def test_importance_is_of_the_gradient_before_any_clipping():
    clipped, free = tiny(), tiny()
    one, two = grass(clipped, probe_steps=0), grass(free, probe_steps=0)
    loss_of(clipped, 0).backward()
    torch.nn.utils.clip_grad_norm_(clipped.parameters(), 1e-6)  # a user's own call, not ours
    loss_of(free, 0).backward()
    for optimizer in (one, two):
        optimizer.grass.schedule = optimizer.grass.schedule.__class__(0, 1, 3)
        optimizer.step()
    active = [m for m in one.grass.importances if not math.isnan(m)]
    assert len(active) == 2 and one.grass.importances == pytest.approx(two.grass.importances, nan_ok=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_never_reaches_probabilities(bad):
    model, seen = tiny(), []
    optimizer = grass(model, probe_steps=0, draw_ahead=0, kwargs={"lr": 0.0}, observers=[seen.append])
    for step in range(3):
        (loss_of(model, step) * (bad if step == 1 else 1.0)).backward()
        optimizer.step()
        for parameter in model.parameters():
            parameter.data.nan_to_num_(0.1)
        optimizer.zero_grad()
    assert optimizer.grass.dropped == 1
    refreshed = next(event for event in seen if isinstance(event, Refreshed))
    assert refreshed.dropped == 1
    assert sum(not math.isnan(m) for m in refreshed.importances) == 2
    assert all(math.isfinite(p) for p in optimizer.grass.probabilities)


def test_schedulers_and_groups_drive_every_layer():
    model = tiny()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.5},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0, "lr": 3e-3},
    ]
    optimizer = grass(model, params=groups, probe_steps=0)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.5, 0.0]
    assert [g["lr"] for g in optimizer.param_groups] == [1e-2, 3e-3]
    assert [len(g["params"]) for g in optimizer.param_groups] == [len(g["params"]) for g in groups]
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.0)  # a rate of zero: nothing may move
    before = copy.deepcopy(model.state_dict())
    take_steps(model, optimizer, range(4))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    scheduler.lr_lambdas = [lambda k: 1.0] * 2
    scheduler.step()
    take_steps(model, optimizer, range(4, 5))
    assert not torch.equal(model.norm.weight, before["norm.weight"])


def test_state_is_made_at_first_activation_with_its_own_step():
    model = tiny()
    optimizer = grass(model, sampler="cyclic", probe_steps=0, active_layers=4, sampling_interval=2)
    take_steps(model, optimizer, range(2))
    upper, lower = model.layers[7].up.weight, model.layers[0].up.weight
    assert upper not in optimizer.state and optimizer.state[lower]["step"] == 2
    kept = optimizer.state[lower]["exp_avg"].clone()
    assert optimizer.grass.active_layers == (4, 5, 6, 7)
    take_steps(model, optimizer, range(2, 4))
    assert torch.equal(optimizer.state[lower]["exp_avg"], kept) and optimizer.state[lower]["step"] == 2
    assert optimizer.state[upper]["step"] == 2 and optimizer.state[model.norm.weight]["step"] == 4
    take_steps(model, optimizer, range(4, 5))
    assert optimizer.state[lower]["step"] == 3 and not torch.equal(optimizer.state[lower]["exp_avg"], kept)


def test_16_bit_weights_have_masters_that_the_update_is_added_to():
    model = tiny(torch.bfloat16)
    optimizer = grass(
        model, sampler="fixed", fixed_layers=(0, 3), probe_steps=0, kwargs={"lr": 1e-5, "weight_decay": 0.0}
    )
    weight = model.layers[3].up.weight
    start = weight.detach().float()
    take_steps(model, optimizer, range(40))
    state = optimizer.state_dict()["state"]
    index = [n for n, _ in model.named_parameters()].index("layers.3.up.weight")
    master = state[index]["master"]
    assert master.dtype == torch.float32 and state[index]["exp_avg"].dtype == torch.float32
    moved = (master - start).abs().max().item()
    assert 1e-4 < moved < 1e-3  # forty updates of about 1e-5, each of which bf16 weights would swallow
    assert torch.equal(weight.detach(), master.bfloat16())
    frozen = [n for n, _ in model.named_parameters()].index("layers.1.up.weight")
    assert frozen not in state


@pytest.mark.parametrize(
    ("optimizer_class", "kwargs"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.Adagrad, {"lr": 0.1}),
        (torch.optim.RMSprop, {"lr": 1e-2}),
        (torch.optim.Adafactor, {"lr": 1e-2}),
        (torch.optim.NAdam, {"lr": 1e-2}),
    ],
)
def test_any_optimizer_with_state_a_parameter_is_an_update_rule(optimizer_class, kwargs):
    model, reference = tiny(), tiny()
    optimizer = grass(model, optimizer_class, kwargs, active_layers=8, probe_steps=0)
    stock = optimizer_class(reference.parameters(), **kwargs)
    take_steps(model, optimizer, range(7))
    take_steps(reference, stock, range(7))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


@pytest.mark.parametrize("steps", [1, 2, 4, 6, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_run_continues_to_the_bit(steps, dtype):
    model = tiny(dtype)
    optimizer = grass(model, update_interval=4)
    take_steps(model, optimizer, range(steps))
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    take_steps(model, optimizer, range(steps, 15))
    other = tiny(dtype)
    other.load_state_dict(weights)
    other_optimizer = grass(other, update_interval=4)
    other_optimizer.load_state_dict(state)
    take_steps(other, other_optimizer, range(steps, 15))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert other_optimizer.grass.importances == optimizer.grass.importances
    assert other_optimizer.state[other.norm.weight]["step"] == 13


AHEAD = {"update_interval": 4, "sampling_interval": 5, "probe_steps": 2}
"""With the default `draw_ahead` of 2, layers are drawn after 2, 5, 10 and 15 steps, and switch after 2, 7, 12 and 17;
refreshes are after 2, 4, 8, 12 and 16."""


def kept(model, optimizer):
    """A checkpoint, by way of a file."""
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    return io.BytesIO(file.getvalue())


def loaded(file, **config):
    model, seen = tiny(), []
    optimizer = grass(model, observers=[seen.append], **{**AHEAD, **config})
    weights, state = torch.load(file, weights_only=True)
    model.load_state_dict(weights)
    return model, optimizer, state, seen


@pytest.mark.parametrize("steps", [5, 6, 7, 10, 11])
def test_a_run_saved_before_its_switch_continues_to_the_bit(steps):
    model, seen = tiny(), []
    optimizer = grass(model, observers=[seen.append], **AHEAD)
    take_steps(model, optimizer, range(steps))
    file, told = kept(model, optimizer), len(seen)
    take_steps(model, optimizer, range(steps, 18))

    other, resumed, state, new = loaded(file)
    waits = None if steps == 7 else {"step": 7, "round": 1, "drawn_at": 5} if steps < 7 else {"step": 12, "round": 2}
    assert waits is None or waits.items() <= state["grass"]["next"].items()
    assert (waits is None) == (state["grass"]["next"] is None)
    resumed.load_state_dict(state)
    take_steps(other, resumed, range(steps, 18))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert new == seen[told:] and [e.drawn_at for e in new if isinstance(e, Sampled)][-2:] == [10, 15]


def test_a_state_without_early_draws_is_drawn_for_at_its_switch():
    model, seen = tiny(), []
    optimizer = grass(model, observers=[seen.append], **AHEAD)
    take_steps(model, optimizer, range(6))
    file = kept(model, optimizer)
    take_steps(model, optimizer, range(6, 18))

    other, resumed, state, new = loaded(file)
    del state["grass"]["next"]
    resumed.load_state_dict(state)
    take_steps(other, resumed, range(6, 18))
    # No refresh is between the draw after step 5 and the switch after step 7, so that the later draw is the same one.
    assert [(e.step, e.drawn_at) for e in new if isinstance(e, Sampled)] == [(7, 7), (12, 10), (17, 15)]
    assert [e.active_layers for e in new if isinstance(e, Sampled)] == [
        e.active_layers for e in seen if isinstance(e, Sampled) and e.step > 6
    ]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("offload", OFFLOADS, ids=str)
def test_layers_and_weights_do_not_depend_on_where_states_are(offload):
    def run(**config):
        model, seen = tiny(torch.bfloat16), []
        optimizer = grass(model, observers=[seen.append], active_layers=4, **AHEAD, **config)
        take_steps(model, optimizer, range(18))
        return seen, list(model.parameters())

    (told, ours), (expected, theirs) = run(offload=offload), run()
    assert told == expected and len({e.active_layers for e in expected if isinstance(e, Sampled)}) > 1
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_probe_can_be_gone_back_to():
    model, other = tiny(), tiny()
    optimizer, reference = grass(model, accumulation=2), grass(other, accumulation=2)
    start = optimizer.state_dict()

    def steps(model, optimizer, count):
        for step in range(count):
            for micro in range(2):
                (loss_of(model, 2 * step + micro) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()

    steps(model, optimizer, 3)
    model.load_state_dict(tiny().state_dict())
    optimizer.load_state_dict(start)
    assert optimizer.grass.phase == "probe" and not optimizer.state
    for optimizer_, model_ in ((optimizer, model), (reference, other)):
        steps(model_, optimizer_, 2)
    assert optimizer.grass.importances == reference.grass.importances


@pytest.mark.parametrize("states", [ResidentStates, IntervalStates, StreamedStates])
def test_states_are_told_what_is_drawn_and_what_is_frozen(states, monkeypatch):
    calls = []

    def listen(name, original):
        def told(self, *args):
            calls.append((name, tuple(args[1])) if name == "update_all" else (name, *args[: 1 + (name != "update")]))
            return original(self, *args)

        monkeypatch.setattr(states, name, told)

    for name in ("expect", "leave", "enter", "update", "update_all", "finish"):
        listen(name, getattr(states, name))
    mode = {ResidentStates: "none", IntervalStates: "interval", StreamedStates: "stream"}[states]
    sizes = {"active_layers": 3, "sampling_interval": 3, "draw_ahead": 2}
    model = tiny()
    optimizer = grass(model, sampler="cyclic", probe_steps=0, offload={"mode": mode, "slots": 2}, **sizes)
    take_steps(model, optimizer, range(4))

    def updates(*layers, where_they_are):
        if where_they_are:
            return [("update_all", layers), ("finish",)]
        return [("update_all", ()), *(("update", layer) for layer in layers), ("finish",)]

    always, between = mode == "none", mode != "stream"
    assert calls == [
        *[("leave", (0, 1, 2)), ("enter", (0, 1, 2))],
        *[*updates(2, 1, 0, where_they_are=always), ("expect", (3, 4, 5), 2)],
        *[*updates(2, 1, 0, where_they_are=between), ("expect", (3, 4, 5), 1)],
        *[*updates(2, 1, 0, where_they_are=always), ("leave", (3, 4, 5)), ("enter", (3, 4, 5))],
        *[*updates(5, 4, 3, where_they_are=always), ("expect", (0, 6, 7), 2)],
    ]


def test_a_sampler_that_raises_ends_the_step_with_its_error():
    def broken(importances, generator):
        raise KeyError("mine")

    grass_dist.register_sampler("test-broken", broken)
    with pytest.raises(KeyError, match="mine"):
        grass(tiny(), sampler="test-broken", probe_steps=0)


def test_always_active_roles():
    def moved(**config):
        model = tiny()
        optimizer = grass(model, probe_steps=0, sampler="fixed", fixed_layers=(4, 6), **config)
        before = copy.deepcopy(model.state_dict())
        loss_of(model, 0).backward()
        optimizer.step()
        return {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}

    roles = moved()
    assert {"embed.weight", "norm.weight", "head.weight"} <= roles
    some = moved(always_active=["lm_head"])
    assert "head.weight" in some and "embed.weight" not in some and "norm.weight" not in some
    none = moved(always_active=[])
    assert {n.split(".")[1] for n in none} == {"4", "6"}


def test_without_embeddings_backward_ends_at_the_lowest_layer():
    model = tiny()
    held = grass(model, probe_steps=0, sampler="fixed", fixed_layers=(4, 6), always_active=[])
    outputs = {}
    for i, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda m, a, out, i=i: outputs.update({i: out.requires_grad}))
    loss_of(model, 0).backward()
    assert outputs == {i: i >= 4 for i in range(8)} and held.grass.active_layers == (4, 6)


def test_uniform_needs_no_probe_and_measures_nothing():
    model, calls = tiny(), []
    optimizer = GrassOptimizer(
        model,
        torch.optim.AdamW,
        ADAMW,
        config=GrassConfig(active_layers=2, sampler="uniform"),
        observers=[calls.append],
    )
    assert optimizer.grass.phase == "train" and isinstance(calls[0], Sampled) and calls[0].step == 0
    take_steps(model, optimizer, range(101))
    assert [type(c) for c in calls] == [Sampled] * 3 and all(math.isnan(m) for m in optimizer.grass.importances)


def test_static_probabilities_are_those_of_the_probe():
    model = tiny()
    optimizer = grass(model, sampler="grass-static")
    take_steps(model, optimizer, range(2))
    p = optimizer.grass.probabilities
    take_steps(model, optimizer, range(2, 12))
    assert optimizer.grass.probabilities == p and len(set(p)) == 8


def test_weight_norm_follows_the_weights():
    model = tiny()
    with torch.no_grad():
        model.layers[2].up.weight.mul_(5)
    optimizer = grass(model, sampler="weight-norm", probe_steps=None)
    entries = torch.cat([p.detach().flatten() for p in model.layers[2].parameters()]).double()
    assert optimizer.grass.importances[2] == pytest.approx(entries.square().mean().sqrt().item(), rel=1e-9)
    assert max(optimizer.grass.probabilities) == optimizer.grass.probabilities[2]
    first = optimizer.grass.importances
    take_steps(model, optimizer, range(4))
    assert optimizer.grass.importances != first


def test_clipping_returns_the_norm_and_binds():
    model, reference = tiny(), tiny()
    optimizer = grass(model, probe_steps=0, active_layers=8)
    loss_of(model, 0).backward()
    loss_of(reference, 0).backward()
    expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
    assert optimizer.clip_grad_norm_(0.1) == expected
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), reference.parameters(), strict=True))


def test_clipping_takes_16_bit_gradients_norm_in_high_precision():
    model = tiny(torch.bfloat16)
    optimizer = grass(model, probe_steps=0, active_layers=8)
    loss_of(model, 0).backward()
    grads = torch.cat([p.grad.double().flatten() for p in model.parameters()])
    assert optimizer.clip_grad_norm_(0.01).item() == pytest.approx(grads.norm().item(), rel=1e-6)
    after = torch.cat([p.grad.double().flatten() for p in model.parameters()])
    assert after.norm().item() == pytest.approx(0.01, rel=1e-2)


def test_clipping_in_the_probe_has_nothing_to_clip():
    model = tiny()
    optimizer = grass(model)
    loss_of(model, 0).backward()
    assert optimizer.clip_grad_norm_(1.0) == 0.0


def test_a_closure_is_called_with_gradients_enabled():
    model = tiny()
    optimizer = grass(model, probe_steps=0)

    def closure():
        loss = loss_of(model, 0)
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == pytest.approx(loss_of(tiny(), 0).item())


def test_layers_follow_seed_and_not_the_global_generators():
    def active(seed, torch_seed):
        model = tiny()
        optimizer = grass(model, seed=seed, sampler="uniform", probe_steps=0, sampling_interval=1)
        torch.manual_seed(torch_seed)
        seen = []
        for step in range(10):
            seen.append(optimizer.grass.active_layers)
            take_steps(model, optimizer, range(step, step + 1))
        return seen

    assert active(1, 0) == active(1, 99) != active(2, 0)


def test_what_cannot_work_is_one_sentence():
    with pytest.raises(ConfigError, match="active_layers=9: the model has 8 layers; use 1 to 8"):
        grass(tiny(), active_layers=9)
    with pytest.raises(ConfigError, match="sampler='gras': there is no such sampler"):
        grass(tiny(), sampler="gras")
    with pytest.raises(ConfigError, match="layers='model.layers': "):
        grass(tiny(), layers="model.layers")
    with pytest.raises(UnsupportedModel, match="layers="):
        grass(torch.nn.Linear(3, 3))
    with pytest.raises(ValueError, match="learning rate"):
        grass(tiny(), kwargs={"lr": -1.0})
    with pytest.raises(ConfigError, match="gradient_accumulation_steps=0"):
        grass(tiny(), accumulation=0)
    with pytest.raises(ConfigError, match=r"params=\[\]: there is no parameter to train"):
        grass(tiny(), params=[])
    with pytest.raises(ConfigError, match=r"params='number 1 of group 0 of shape \(1,\)': the model .* no such"):
        grass(model := tiny(), params=[model.norm.weight, torch.nn.Parameter(torch.zeros(1))])
    model = tiny()
    with pytest.raises(
        ConfigError, match="active_layers=2: 1 of the model's 8 layers compete, and the others are frozen"
    ):
        grass(model, params=list(model.layers[7].parameters()))
    with pytest.raises(UnsupportedModel, match="None of the 8 layers of layers has a parameter to train"):
        grass(tiny().requires_grad_(False))
    with pytest.raises(GrassError, match="cannot take another parameter group"):
        grass(model).add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    held = grass(model)
    with pytest.raises(UnsupportedModel, match="has a GrassOptimizer already"):
        grass(model)
    assert held.grass.step == 0
    with pytest.raises(ValueError, match="freeze the same ones, in the same model"):
        grass(tiny()).load_state_dict(grass(tiny(layers=4)).state_dict())
    halves = [{"params": (every := list((model := tiny()).parameters()))[::2]}, {"params": every[1::2]}]
    with pytest.raises(ValueError, match="build it with the same model and groups"):
        grass(tiny()).load_state_dict(grass(model, params=halves).state_dict())


def test_other_engines_are_refused_by_name():
    class FullyShardedDataParallel(torch.nn.Module):  # by its name: FSDP1 itself needs a GPU
        def __init__(self):
            super().__init__()
            self.module = tiny()

    with pytest.raises(UnsupportedModel, match="FSDP1.*fully_shard"):
        grass(FullyShardedDataParallel())


def test_ddp_inside_another_module_is_refused_by_name():
    class DistributedDataParallel(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = tiny()

    with pytest.raises(UnsupportedModel, match="inside a Sequential; pass the DDP module itself"):
        grass(torch.nn.Sequential(DistributedDataParallel()))


def test_parameters_that_the_groups_leave_out_stay_as_they_are():
    model = tiny()
    left_out = [p for n, p in model.named_parameters() if n.endswith("bias")]
    optimizer = grass(model, params=[p for n, p in model.named_parameters() if not n.endswith("bias")])
    before = [p.detach().clone() for p in left_out]
    for step in range(4):
        loss_of(model, step).backward()
        optimizer.step()
    assert all(p.requires_grad for p in left_out)
    assert all(torch.equal(p, b) for p, b in zip(left_out, before, strict=True))
