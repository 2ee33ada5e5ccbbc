"""Writes what follows from the code: configs/schema.json, the tables of configuration.md, the options of deepspeed.md.

    python -m docs.generate     # or: make docs

A table of fields stands between ``<!-- fields of CLASS -->`` and ``<!-- end of fields -->``. Every cell is taken from
the JSON schema, which takes names, types, defaults, limits and sentences from the fields of the pydantic classes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from grass_dist.backends.zero.options import rows
from grass_dist.finetune.config import RunConfig

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "configuration.md"
OPTIONS_PAGE = ROOT / "docs" / "deepspeed.md"
SCHEMA = ROOT / "configs" / "schema.json"

_TABLE = re.compile(r"(<!-- fields of (\w+) -->\n).*?(\n<!-- end of fields -->)", re.DOTALL)
_OPTIONS = re.compile(r"(<!-- options -->\n).*?(\n<!-- end of options -->)", re.DOTALL)
_HEAD = "\n| field | type | default | limits | meaning |\n|---|---|---|---|---|\n"
_TYPES = {"integer": "int", "number": "float", "string": "str", "boolean": "bool", "null": "null"}
_LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_DOTTED = r"^\w+(\.\w+)+$"
_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


class _Untitled(GenerateJsonSchema):
    """A schema without a title for each field, which would be its name once more."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def make_schema() -> dict[str, Any]:
    """The JSON schema of the YAML file of a fine-tune.

    As `load_config` does, it allows names with dots at the top level, and a file whose settings of the method are in
    the DeepSpeed JSON.
    """
    schema = RunConfig.model_json_schema(schema_generator=_Untitled)
    schema["required"].remove("grass")
    schema["patternProperties"] = {_DOTTED: {}}
    _shorten_descriptions(schema)
    return schema


def schema_text() -> str:
    """The content of configs/schema.json."""
    return json.dumps(make_schema(), indent=2, ensure_ascii=False) + "\n"


def with_tables(page: str) -> str:
    """The text of configuration.md with every table as the fields say.

    Raises:
        KeyError: a table is of a class that the configuration does not have.
    """
    tables = {name: _table(schema, path) for name, path, schema in sections()}
    return _TABLE.sub(lambda found: found[1] + tables[found[2]] + found[3], page)


def with_options(page: str) -> str:
    """The text of deepspeed.md with the table of the options as the code says; options of one section share a row."""
    shared: dict[tuple[str, str, str], list[str]] = {}
    for row in rows():
        section = row.path.rpartition(".")[0]
        shared.setdefault((section, row.verdict, row.note), []).append(row.path.rpartition(".")[2])
    lines = ["\n| section | options | under GRASS | |\n|---|---|---|---|\n"]
    for (section, verdict, note), keys in shared.items():
        cells = f"`{section}`" if section else "", ", ".join(f"`{key}`" for key in keys), verdict, note
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return _OPTIONS.sub(lambda found: found[1] + "".join(lines) + found[2], page)


def sections() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Class, dotted place in the file ("" for the top level) and schema of each section."""
    schema = RunConfig.model_json_schema(schema_generator=_Untitled)
    classes = schema.pop("$defs")
    _shorten_descriptions(classes)
    _shorten_descriptions(schema)
    found = [("RunConfig", "", schema)]
    for name, path, section in found:  # which grows meanwhile
        yield name, path, section
        for field, about in section["properties"].items():
            found += [(inner, f"{path}.{field}".lstrip("."), classes[inner]) for inner in _sections_in(about)]


def _sections_in(about: dict[str, Any]) -> list[str]:
    return [option["$ref"].rpartition("/")[2] for option in _options(about) if "$ref" in option]


def _options(about: dict[str, Any]) -> list[dict[str, Any]]:
    return about.get("anyOf", [about])


def _shorten_descriptions(schema: Any) -> None:
    """Leaves the first paragraph of every description, in one line."""
    for key, value in schema.items():
        if isinstance(value, dict):
            _shorten_descriptions(value)
        elif key == "description":
            schema[key] = " ".join(value.partition("\n\n")[0].split())


def _table(section: dict[str, Any], path: str) -> str:
    needed = section.get("required", [])
    rows = [_row(name, about, path, name in needed) for name, about in section["properties"].items()]
    return _HEAD + "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)


def _row(name: str, about: dict[str, Any], path: str, needed: bool) -> tuple[str, ...]:
    place = f"{path}.{name}".lstrip(".")
    types = " or ".join(_type(option, place) for option in _options(about))
    limits = ", ".join(limit for option in _options(about) for limit in _limits(option))
    default = "required" if needed else _default(about["default"])
    return f"`{name}`", types, default, limits, _linked(about["description"])


def _type(option: dict[str, Any], place: str) -> str:
    if "$ref" in option:
        return f"[`{_sections_in(option)[0]}`](#{place.replace('.', '')})"
    if "enum" in option or "const" in option:
        return ", ".join(f"`{value}`" for value in option.get("enum", [option.get("const")]))
    if "prefixItems" in option:
        return f"[{', '.join(_type(item, place) for item in option['prefixItems'])}]"
    return f"list of {_type(option['items'], place)}" if option["type"] == "array" else _TYPES[option["type"]]


def _default(value: Any) -> str:
    if isinstance(value, dict):
        return "its defaults"
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value if isinstance(value, str) else json.dumps(value).replace('e-0', 'e-')}`"


def _limits(option: dict[str, Any]) -> Iterator[str]:
    for key, sign in _LIMITS.items():
        if key in option:
            yield f"{sign} {_number(option[key])}"
    if option.get("minLength") == 1:
        yield "not empty"
    if "pattern" in option:
        yield f"`{option['pattern']}`"


def _number(value: float) -> str:
    if isinstance(value, int) and value > 2**32 and value.bit_count() == 1:
        return "2" + str(value.bit_length() - 1).translate(_RAISED)
    return f"{value:,}"


def _linked(sentence: str) -> str:
    """The sentence with the pages of docs/ that it names as links."""
    return re.sub(r"docs/([\w-]+)\.md(#[\w-]+)?", lambda found: f"[{found[1]}]({_address(*found.groups())})", sentence)


def _address(page: str, anchor: str | None) -> str:
    return (anchor or "") if page == PAGE.stem else f"{page}.md{anchor or ''}"


def main() -> None:
    SCHEMA.write_text(schema_text())
    PAGE.write_text(with_tables(PAGE.read_text()))
    OPTIONS_PAGE.write_text(with_options(OPTIONS_PAGE.read_text()))


if __name__ == "__main__":
    main()
