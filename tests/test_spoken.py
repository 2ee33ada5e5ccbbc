"""What a run says of itself: once, on rank 0, visible without any set-up of logging, and never twice."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

from grass_dist import ConfigError, GrassConfig, GrassOptimizer, Started
from grass_dist.method.spoken import about_layers, about_run
from grass_dist.ranks import Ranks, note, say, tell
from tests.tiny import take_steps, tiny

ADAMW = {"lr": 1e-2}


@pytest.mark.parametrize(
    ("setup", "shown"),
    [
        ("", ["told", "warned"]),
        ("logging.getLogger().setLevel('INFO')", ["told", "warned"]),
        ("logging.basicConfig()", ["told", "WARNING:grass_dist:warned"]),
        ("logging.basicConfig(level='INFO')", ["INFO:grass_dist:told", "INFO:grass_dist:noted", "WARNING:grass_dist:"]),
        ("logging.getLogger('grass_dist').setLevel('WARNING')", ["warned"]),
        ("logging.basicConfig(level='INFO'); logging.getLogger('grass_dist').setLevel('WARNING')", ["WARNING:"]),
        ("logging.disable('INFO')", ["warned"]),
    ],
)
def test_information_is_seen_once_however_logging_is_set_up(setup, shown):
    code = (
        f"import logging; from grass_dist.ranks import Ranks, note, say, tell; {setup}\n"
        "tell(Ranks(), 'told'); note(Ranks(), 'noted'); say(Ranks(), 'warned')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    lines = done.stderr.splitlines()
    assert len(lines) == len(shown) and not done.stdout
    assert all(line.startswith(start) for line, start in zip(lines, shown, strict=True))


def test_only_rank_0_speaks(monkeypatch, caplog, capsys):
    monkeypatch.setattr(Ranks, "rank", 1)
    with caplog.at_level(logging.INFO):
        for speak in (tell, note, say):
            speak(Ranks(), "a sentence")
    assert not caplog.messages and not capsys.readouterr().err


def messages(caplog) -> list[str]:
    return [message for message in caplog.messages if message.startswith("GRASS: ")]


def test_an_optimizer_says_what_trains_and_each_switch(caplog):
    model = tiny()
    model.layers[7].requires_grad_(False)
    config = GrassConfig(
        active_layers=2, probe_steps=2, sampling_interval=2, update_interval=2, always_active=("final_norm",)
    )
    with caplog.at_level(logging.INFO):
        optimizer = GrassOptimizer(model, torch.optim.AdamW, ADAMW, config=config)
        drawn = []
        for step in range(5):
            take_steps(model, optimizer, range(step, step + 1))
            drawn.append(optimizer.grass.active_layers)
    first, probed, switched = messages(caplog)
    assert first == (
        "GRASS: 2 of 8 layers (7 compete) train at a time (layers), drawn by gradient norms; probe until step 2, in "
        "which nothing is updated; always training: final_norm; frozen for good: embeddings, layers.7, lm_head "
        "(together 21 %)."
    )
    assert probed == "GRASS: the probe has ended after step 2; layers {}, {} train from step 3 on (round 0).".format(
        *drawn[1]
    )
    assert switched == "GRASS: layers {}, {} train from step 5 on (round 1).".format(*drawn[3])


def test_the_console_gets_the_start_and_the_end_of_the_probe(capsys):
    ours = logging.getLogger("grass_dist")
    ours.propagate = False  # pytest's handlers are those of the root
    try:
        model = tiny()
        config = GrassConfig(active_layers=8, probe_steps=1, sampling_interval=1, update_interval=1, draw_ahead=0)
        take_steps(model, GrassOptimizer(model, torch.optim.AdamW, ADAMW, config=config), range(4))
    finally:
        ours.propagate = True
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("GRASS: ")]
    assert len(said) == 2 and said[0].endswith("frozen for good: nothing.") and "the probe has ended" in said[1]


def test_other_samplers_and_long_lists():
    fixed = GrassConfig(active_layers=1, sampler="fixed", fixed_layers=(3,))
    names = tuple("abcd")
    told = about_run(fixed, Started(("s",), names, 4, {}, ("a.tower",), 0.002), 0)
    assert told == (
        "GRASS: 1 of 4 layers train at a time (s), always the same; no probe; always training: nothing; "
        "frozen for good: a.tower (0.2 %)."
    )
    own = GrassConfig(active_layers=1, sampler="mine")
    assert "drawn by the sampler 'mine'" in about_run(own, Started(("s",), names, 4, {}, (), 0.0), 3)
    assert about_layers([3], 0, 0, False) == "GRASS: layer 3 trains from step 1 on (round 0)."
    assert "39 and others train" in about_layers(range(60), 0, 0, False)


def test_what_is_left_out_and_what_is_around_the_layers_is_named():
    others = {"others": ("speech.mask", "speech.conv.0.weight", "head.weight")}
    told = about_run(
        GrassConfig(active_layers=1),
        Started(("speech.layers",), ("speech.layers.0",), 1, others, (), 0.0, ("tail",)),
        0,
    )
    assert "layers train at a time (speech.layers)" in told
    assert "others (speech.mask, speech.conv.0, head); frozen for good: nothing; not in this optimizer: tail." in told


def test_layers_without_a_gradient_in_the_probe_are_told(caplog):
    class Skips(type(tiny())):
        """Its last two layers have no part in the loss, as those of a tower whose output is taken before them."""

        def forward(self, ids):
            x = self.embed(ids)
            for number, layer in enumerate(self.layers):
                x = layer(x) if number < 6 else x + 0 * layer(x).sum()
            return self.head(self.norm(x))

    model = Skips()
    config = GrassConfig(active_layers=2, probe_steps=2, sampling_interval=2, update_interval=2)
    optimizer = GrassOptimizer(model, torch.optim.AdamW, ADAMW, config=config)
    take_steps(model, optimizer, range(3))
    assert "2 of 8 layers had no gradient in any step of the probe (layers.6, layers.7)" in caplog.text
    with pytest.raises(ConfigError, match="observer='object': it cannot be called"):
        optimizer.grass.add_observer(object())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": {"effective_layers": 3}}, "gradient norms (as uneven as among 3); "),
        ({"temperature": {"effective_layers": 3}, "exploration": 0.1}, "(as uneven as among 3, 10 % of it even); "),
        ({"sampler": "middle", "exploration": 0.1}, "the middle ones (grass.exploration without effect); "),
        ({"sampler": "uniform", "temperature": 2.0}, "drawn evenly (grass.temperature without effect); "),
        ({"temperature": 0.5}, "drawn by gradient norms; "),
    ],
)
def test_how_even_draws_are_made_is_said_where_it_is_set(settings, said):
    started = Started(("layers",), ("a", "b"), 4, {}, (), 0.0)
    assert said in about_run(GrassConfig(active_layers=1, **settings), started, 2)
