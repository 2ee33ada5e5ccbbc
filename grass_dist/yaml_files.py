"""YAML that a user has written: read from plain files, and refused where two readers would read it differently."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

import yaml

from grass_dist.errors import ConfigError
from grass_dist.regular_files import open_regular

LARGEST = 2**17
"""Characters of a configuration file, and bytes of its JSON, at most: to read so much takes some seconds."""

_LONGEST_NUMBER = 40


def read_yaml(path: Path, field: str) -> Any:
    """Returns what the YAML of a file means, with its keys as text.

    Args:
        field: the name of the setting that names the file, for errors.

    Raises:
        ConfigError: it cannot be read, or it is not YAML.
    """
    return parse_yaml(_text_of(path, field), field, str(path), "correct it there")


def parse_yaml(text: str, field: str, value: str, fix: str) -> Any:
    """Returns what YAML means, with its keys as text.

    Args:
        field: the name of the setting that gives the text, for errors, as are ``value`` and ``fix``.

    Raises:
        ConfigError: it is not YAML, or not all readers of YAML would read it alike.
    """
    try:
        return _with_text_keys(yaml.load(text, _Loader))
    except RecursionError:
        raise ConfigError(field, value, "it is nested too deeply", fix) from None
    except _Ambiguous as error:
        raise ConfigError(field, value, str(error), error.fix) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(field, value, f"it is not YAML: {error}", fix) from None
    except (AttributeError, LookupError, OverflowError, TypeError):  # of PyYAML's constructors, after a tag like !!int
        raise ConfigError(field, value, "it is not YAML: a value is not of the type of its tag", fix) from None


def _with_text_keys(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_text_keys(entry) for entry in value]
    return {str(key): _with_text_keys(entry) for key, entry in value.items()} if isinstance(value, dict) else value


def _text_of(path: Path, field: str) -> str:
    def refused(problem: str, fix: str) -> ConfigError:
        return ConfigError(field, str(path), problem, fix)

    try:
        with open_regular(path, follow=True) as file:
            content = file.read(4 * LARGEST + 1)
        text = content.decode("utf-8", errors="replace" if len(content) > 4 * LARGEST else "strict")
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise refused("it is not a file", "give a file that all ranks can read") from None
        raise refused(f"it cannot be read ({error.strerror})", "give an existing file") from None
    except UnicodeDecodeError as error:
        raise refused(f"it is not YAML: {error}", "write it in UTF-8") from None
    if len(text) > LARGEST:
        raise refused(f"it is longer than {LARGEST} characters", "give a file of settings, not of data")
    return text


class _Ambiguous(yaml.YAMLError):
    """Two readers of YAML would read something differently."""

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(problem)
        self.fix = fix


class _Loader(yaml.SafeLoader):
    """YAML whose 1e-5 is a number (YAML 1.2), where PyYAML's 1.1 wants 1.0e-5; without aliases and without traps.

    A few lines of aliases can stand for a structure that fills any memory. Of a name that stands twice PyYAML takes the
    last value without a word, 010 is 8 for YAML 1.1 and 10 for 1.2, and 1:30 is 90 for 1.1 and a text for 1.2.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it uses an alias (*name), which a configuration may not")
        return super().compose_node(parent, index)

    def compose_scalar_node(self, anchor: Any) -> Any:
        node = super().compose_scalar_node(anchor)
        if node.tag in _NUMBERS and len(node.value) > _LONGEST_NUMBER:
            raise yaml.YAMLError(f"it has a number of {len(node.value)} characters")
        if node.tag in _NUMBERS and _OLD_NUMBER.fullmatch(node.value):
            problem = f"line {node.start_mark.line + 1} has the number {node.value}, which not all read alike"
            raise _Ambiguous(problem, "write it as a decimal number, or quote it if it is a text")
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for name, line in ((str(key.value), key.start_mark.line + 1) for key, _ in node.value):
            if name in lines:
                raise _Ambiguous(f"it sets {name} twice, in lines {lines[name]} and {line}", "keep one of them")
            lines[name] = line
        return node


_OLD_NUMBER = re.compile(r"[-+]?0[0-9_]+|[-+]?0b[01_]+|.*:.*")
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
