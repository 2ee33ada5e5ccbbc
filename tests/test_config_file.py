"""What two readers of YAML would read differently, and what no file's name can hold, is refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from grass_dist.errors import ConfigError
from grass_dist.finetune.config_file import as_yaml, load_config

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"

TRAPS = {
    "name: a\noverwrite: true\nname: b\n": "it sets name twice, in lines 1 and 3; keep one of them",
    "train:\n  max_steps: 5\n  'max_steps': 6\n": "it sets max_steps twice, in lines 2 and 3; keep one of them",
    "train: {eps: 1, eps: 1}": "it sets eps twice, in lines 1 and 1; keep one of them",
    "train:\n  max_steps: 010\n": "line 2 has the number 010, which not all read alike; write it as a decimal number",
    "train: {seed: -00}": "line 1 has the number -00, which not all read alike",
    "train:\n\n  max_steps: 1:30": "line 3 has the number 1:30, which not all read alike",
    "a: [1, 0b11]": "line 1 has the number 0b11, which not all read alike",
}


@pytest.mark.parametrize("text", TRAPS)
def test_what_yaml_readers_take_differently_is_refused(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "c.yaml")
    assert TRAPS[text] in str(error.value) and error.value.field == "--config"


def test_a_setting_in_a_section_and_with_dots_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text("model:\n  name: x\nmodel.name: y\n")
    with pytest.raises(ConfigError, match=r"^model\.name='y': the file sets it twice, as model\.name and within a sec"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    "text", ["0", "-3", "10", "0.5", "1e-5", "0x10", "1_000", "'010'", "2024-01-02", "a:b", "0o10"]
)
def test_other_values_are_read_as_ever(text):
    with pytest.raises(ConfigError) as error:
        load_config(DEMO, [f"nothing={text}"])
    assert "there is no such setting" in str(error.value)


def test_an_override_obeys_too():
    with pytest.raises(ConfigError, match=r"^train\.max_steps='010': line 1 has the number 010, which not all read"):
        load_config(DEMO, ["train.max_steps=010"])


@pytest.mark.parametrize("name", ["model.name", "data.name", "data.eval", "output_dir", "grass.offload.folder"])
def test_a_name_that_no_file_can_have_is_refused(name):
    with pytest.raises(ConfigError, match=rf"^{name}='a\\x00b': it has a NUL character; leave that character out"):
        load_config(DEMO, [f'{name}="a\\0b"'])
    with pytest.raises(ConfigError, match=rf"^{name}='a\\ud800b': it has half a surrogate pair; "):
        load_config(DEMO, [f'{name}="a\\ud800b"'])


def test_a_time_limit_that_no_clock_holds_is_refused():
    for value in ("100000000000000000000", "1e20", "31536001", "0"):
        with pytest.raises(ConfigError, match=r"^train\.timeout_seconds="):
            load_config(DEMO, [f"train.timeout_seconds={value}"])


def test_values_in_the_words_of_the_file():
    values = {None: "null", True: "true", "x": "x", 3: "3", 0.5: "0.5", "a\nb": "'a b'"}
    assert {value: as_yaml(value) for value in values} == values
    assert as_yaml([1, None]) == "[1, null]"
