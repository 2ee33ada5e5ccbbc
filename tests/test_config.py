import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grass_dist.config import GrassConfig, OffloadConfig, check_num_layers
from grass_dist.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"active_layer": 3}, "active_layer=3: there is no such setting; did you mean 'active_layers'"),
        ({"zzz": 3}, "zzz=3: there is no such setting; the known ones are active_layers, "),
        ({"active_layers": 0}, "active_layers=0: this value cannot be used; it should be greater than or equal to 1"),
        ({"active_layers": 2.5}, "active_layers=2.5: .* valid integer"),
        ({"active_layers": True}, "active_layers=True: .* valid integer"),
        ({"active_layers": "4"}, "active_layers='4': .* valid integer"),
        ({"sampling_interval": 0}, "sampling_interval=0: .* greater than or equal to 1"),
        ({"update_interval": -5}, "update_interval=-5: .* greater than or equal to 1"),
        ({"probe_steps": -1}, "probe_steps=-1: .* greater than or equal to 0"),
        ({"draw_ahead": -1}, "draw_ahead=-1: .* greater than or equal to 0"),
        ({"draw_ahead": True}, "draw_ahead=True: .* valid integer"),
        ({"draw_ahead": 50}, "draw_ahead=50: is not below sampling_interval=50 and update_interval=50; use 0 to 49"),
        (
            {"draw_ahead": 3, "sampling_interval": 3},
            "draw_ahead=3: is not below sampling_interval=3 and update_interval=50; use 0 to 2, or leave it out",
        ),
        ({"draw_ahead": 2, "update_interval": 2}, "draw_ahead=2: is not below .* update_interval=2; use 0 to 1"),
        ({"temperature": 0.0}, "temperature=0.0: it must be above 0"),
        ({"temperature": "low"}, "temperature='low': it must be a number or {effective_layers: n}"),
        ({"temperature": {"effective_layers": 0.5}}, "temperature.effective_layers=0.5: .* greater than or equal to 1"),
        ({"temperature": {"effective_layers": 2, "n": 5}}, "temperature.n=5: there is no such setting"),
        (
            {"temperature": {"effective": 5}},
            "temperature.effective=5: there is no such setting; did you mean 'effective_l",
        ),
        ({"exploration": 1.5}, "exploration=1.5: .* less than or equal to 1"),
        ({"sampler": "middle", "active_parameters": 0.5}, "active_parameters=0.5: sampler='middle' takes blocks"),
        ({"temperature": math.nan}, "temperature=nan: it must be finite"),
        ({"temperature": math.inf}, "temperature=inf: it must be finite"),
        ({"ema_alpha": 0}, "ema_alpha=0.0: .* greater than 0"),
        ({"ema_alpha": 1.5}, "ema_alpha=1.5: .* less than or equal to 1"),
        ({"seed": -1}, "seed=-1: .* greater than or equal to 0"),
        ({"importance_scale": "max"}, "importance_scale='max': .* 'mean' or 'none'"),
        ({"always_active": [4]}, "always_active.0=4: .* string"),
        ({"always_active": ["lm_head", ""]}, "always_active=.* a name is empty"),
        ({"always_active": 4}, "always_active=4: .* tuple"),
        ({"always_active": ["lm_head", "lm_head"]}, "always_active=.* a name is listed twice"),
        ({"sampler": "fixed"}, r"fixed_layers=\(\): sampler='fixed' needs active_layers=4 different layers"),
        (
            {"sampler": "fixed", "active_layers": 2, "fixed_layers": [1, 1]},
            "fixed_layers=.* needs active_layers=2 different layers",
        ),
        ({"fixed_layers": [1]}, "fixed_layers=.* is read by sampler='fixed' only"),
        ({"active_layers": 0, "seed": -1}, r"active_layers=0: .*\(and 1 more such errors\)"),
    ],
)
def test_bad_settings_are_one_sentence(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        GrassConfig(**settings)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 300


@given(st.dictionaries(st.text(max_size=12), st.integers() | st.floats() | st.text(max_size=5) | st.none(), max_size=3))
def test_any_input_is_taken_or_refused_in_one_sentence(settings):
    refused = None
    try:
        GrassConfig(**settings)
    except ConfigError as error:
        refused = str(error)
    assert refused is None or ("\n" not in refused and refused.endswith("."))


@pytest.mark.parametrize(
    ("sampling", "update", "given", "lead"),
    [
        (50, 50, None, 2),
        (3, 50, None, 2),
        (50, 2, None, 1),
        (2, 3, None, 1),
        (1, 50, None, 0),
        (50, 50, 0, 0),
        (5, 9, 4, 4),
    ],
)
def test_layers_are_drawn_two_steps_ahead_if_intervals_allow_it(sampling, update, given, lead):
    assert GrassConfig(sampling_interval=sampling, update_interval=update, draw_ahead=given).lead == lead


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "steam"}, "mode='steam': .* cannot be used; it should be 'interval', 'stream', 'none' or 'auto'"),
        ({"mods": "none"}, "mods='none': there is no such setting; did you mean 'mode'"),
        ({"prefetch": 1}, "prefetch=1: there is no such setting; did you mean 'prefetch_steps'"),
        ({"prefetch_steps": -1}, "prefetch_steps=-1: .* greater than or equal to 0"),
        ({"slots": 1}, "slots=1: .* greater than or equal to 2"),
        ({"host_dtype": "float16"}, "host_dtype='float16': .* it should be 'bfloat16'"),
        (
            {"host_dtype": "bfloat16", "mode": "stream"},
            "host_dtype='bfloat16': rounds .* so that exp_avg_sq stands still; mode='stream'; use mode='interval' or",
        ),
        (
            {"host_dtype": "bfloat16", "mode": "none"},
            "host_dtype='bfloat16': rounds .* still; mode='none'; use mode='interval'",
        ),
        ({"chaos": -1}, "chaos=-1: .* greater than or equal to 0"),
        ({"folder": 3}, "folder=3: .* valid string"),
    ],
)
def test_bad_settings_of_the_offload_are_one_sentence(settings, message):
    for make, at in ((OffloadConfig, ""), (lambda **s: GrassConfig(offload=s), "offload.")):
        with pytest.raises(ConfigError, match=f"^{at}{message}") as caught:
            make(**settings)
        text = str(caught.value)
        assert "\n" not in text and text.endswith(".") and len(text) < 300


def test_settings_of_the_offload():
    assert GrassConfig().offload == OffloadConfig()
    config = GrassConfig(offload={"host_dtype": "bfloat16", "prefetch_steps": 0})  # pyright: ignore[reportArgumentType]
    assert config.offload == OffloadConfig(mode=None, host_dtype="bfloat16", prefetch_steps=0)


def test_lists_and_whole_numbers_are_taken_as_yaml_gives_them():
    config = GrassConfig(always_active=[], temperature=2, sampler="fixed", fixed_layers=[3, 1], active_layers=2)
    assert config.always_active == () and config.temperature == 2.0 and config.fixed_layers == (3, 1)


def test_a_configuration_cannot_be_changed():
    with pytest.raises(Exception, match="frozen"):
        GrassConfig().active_layers = 3  # type: ignore[misc]


def test_what_only_the_model_can_tell():
    check_num_layers(GrassConfig(active_layers=8), 8)
    with pytest.raises(ConfigError, match=r"active_layers=9: the model has 8 layers; use 1 to 8 \(8 trains them all\)"):
        check_num_layers(GrassConfig(active_layers=9), 8)
    with pytest.raises(ConfigError, match=r"fixed_layers=\[8\]: the model has layers 0 to 7"):
        check_num_layers(GrassConfig(active_layers=2, sampler="fixed", fixed_layers=(0, 8)), 8)
