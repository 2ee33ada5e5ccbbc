"""What is generated from the fields of the configuration is what the fields say, and describes what is loaded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from docs import generate
from grass_dist.finetune.config_file import dump_config, load_config
from grass_dist.yaml_files import _Loader

CONFIGS = sorted(generate.SCHEMA.parent.glob("*.yaml"))
REMEDY = "run make docs"


def problems(text: str) -> list[str]:
    """What the schema says against a file, as an editor would show it."""
    return [
        error.message for error in Draft202012Validator(generate.make_schema()).iter_errors(yaml.load(text, _Loader))
    ]


def test_the_tables_and_the_schema_are_as_the_fields_say():
    page = generate.PAGE.read_text()
    assert generate.with_tables(page) == page, REMEDY
    assert generate.SCHEMA.read_text() == generate.schema_text(), REMEDY


def test_each_section_has_a_table_and_each_link_a_heading():
    page = generate.PAGE.read_text()
    assert sorted(re.findall(r"<!-- fields of (\w+) -->", page)) == sorted(name for name, _, _ in generate.sections())
    headings = {re.sub(r"[^\w -]", "", line[1:]) for line in re.findall(r"^##+( .*)", page, re.MULTILINE)}
    for _, path, _ in generate.sections():
        assert not path or path.replace(".", "") in headings


@pytest.mark.parametrize("name", [name for name, _, _ in generate.sections()])
def test_each_field_has_sentences(name):
    section = next(section for found, _, section in generate.sections() if found == name)
    for field, about in section["properties"].items():
        assert re.fullmatch(r"[A-Z`0-9a-z].*\.", about.get("description", "")), f"{name}.{field}"


def test_a_table_shows_type_default_limits_and_links():
    end = "\n<!-- end of fields -->\n"
    page = f"<!-- fields of GrassConfig -->\nan earlier table{end}<!-- fields of TrainConfig -->\n{end}"
    grass, train = generate.with_tables(page).split(end)[:2]
    assert "an earlier table" not in grass
    assert "\n| `seed` | int | `0` | ≥ 0, < 2⁶³ | " in grass
    assert "\n| `draw_ahead` | int or null | `null` | ≥ 0 | How many steps before a switch " in grass
    assert "([method](method.md#the-clock))" in grass
    assert "\n| `offload` | [`OffloadConfig`](#grassoffload) | its defaults |" in grass
    assert "\n| `max_steps` | int | required | ≥ 1 | " in train
    assert "\n| `betas` | [float, float] | `[0.9, 0.999]` |" in train


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_an_editor_finds_the_schema_and_no_fault_in_our_files(file: Path):
    text = file.read_text()
    assert text.startswith(f"# yaml-language-server: $schema={generate.SCHEMA.name}\n")
    assert problems(text) == []
    assert problems(dump_config(load_config(file))) == []


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("active_layers", "active_layer", "'active_layer' was unexpected"),
        ("parallel: fsdp2", "parallel: fsdp", "'fsdp' is not valid"),
        ("max_steps: 48", "max_steps: 0", "0 is less than the minimum of 1"),
        ("micro_batch_size: 1", "micro_batch_size: one", "'one' is not of type 'integer'"),
        ("eval_examples: 24", "eval_examples: null", "None is not of type 'integer'"),
    ],
)
def test_an_editor_is_told_of_what_loading_refuses(old, new, found, tmp_path):
    text = (generate.SCHEMA.parent / "demo.yaml").read_text()
    assert old in text and any(found in problem for problem in problems(text.replace(old, new)))
    (tmp_path / "run.yaml").write_text(text.replace(old, new))
    with pytest.raises(Exception, match=re.escape(new.split(":")[0].strip())):
        load_config(tmp_path / "run.yaml")


def test_an_editor_takes_what_loading_takes(tmp_path):
    text = (generate.SCHEMA.parent / "demo.yaml").read_text()
    text = text.replace(
        "parallel: fsdp2", "parallel: {mesh: {replicate: 2}}\ntrain.betas: [0.9, 0.99]\ntrain.checkpoint: null"
    )
    (tmp_path / "run.yaml").write_text(text)
    assert load_config(tmp_path / "run.yaml").train.betas == (0.9, 0.99)
    assert problems(text) == []
