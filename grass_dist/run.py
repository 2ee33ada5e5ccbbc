"""``python -m grass_dist.run SCRIPT``: runs a script or a module unchanged, with GRASS switched on.

The script runs in this process. Processes that it starts get GRASS too: an environment variable has the settings, and
PYTHONPATH a folder whose ``sitecustomize.py`` arms each Python. Nothing is installed, and both end with the run.
"""

from __future__ import annotations

import argparse
import builtins
import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from grass_dist.config import GrassConfig
from grass_dist.errors import ConfigError, GrassError
from grass_dist.record import REPORT_VARIABLE
from grass_dist.startup import FOLDER, VARIABLE, arm, leader

CONFIG_VARIABLE = "GRASS_CONFIG"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what the command line names; ends as it ends.

    Raises:
        SystemExit: as Python does after the script: with its own status, or 1 after an error, which is shown. Wrong
            arguments end the process before the script begins, with one sentence.
    """
    own, command = _split(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    given = parser.parse_args(own)
    if not command:
        parser.error("SCRIPT is missing")
    try:
        config = _config_of(given)
        if given.report:
            os.environ[REPORT_VARIABLE] = "1"
        _reach_children(config)
        name, module, code = _module_named(command[0]) if given.module else _script_named(command[0])
    except GrassError as error:
        sys.exit(str(error))
    if leader():
        print(f"GRASS: on for {command[0]} and what it starts, {_described(config)}.", file=sys.stderr, flush=True)
    sys.argv[:] = [name, *given.passed_on, *command[1:]]
    _execute(module, code)


_WITH_VALUE = ("--active-layers", "--config", "--local_rank", "--local-rank")


def _split(arguments: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Our options, and the script with its arguments, of which not even a ``--`` may get lost."""
    at = 0
    while at < len(arguments) and arguments[at].startswith("-"):
        at += 2 if arguments[at] in _WITH_VALUE else 1
    return arguments[:at], arguments[at:]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m grass_dist.run",
        usage="python -m grass_dist.run [--active-layers N | --config FILE] [--report] [-m] SCRIPT ARGS...",
        description="Run a training script, unchanged, with GRASS switched on, also in the processes that it starts. "
        "SCRIPT is a file, or a command that is a Python script, such as trl. "
        "Works under torchrun, accelerate launch -m and deepspeed --module.",
        allow_abbrev=False,
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--active-layers", type=int, metavar="N", help="how many layers train at a time")
    how.add_argument(
        "--config",
        metavar="FILE",
        help="YAML or JSON with the fields of GrassConfig; left out, the environment variable GRASS_CONFIG names the "
        'file, or holds the fields ("{active_layers: 4}"); without both, the block "grass" of the ds_config counts',
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="record the run of each Trainer in its output_dir, for grass-dist report, as GRASS_DIST_REPORT=1 does too",
    )
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT is the name of a module")
    # deepspeed and older launchers put it before all arguments; it is the script's
    parser.add_argument(*_WITH_VALUE[2:], dest="passed_on", action=_PassOn, default=[], help=argparse.SUPPRESS)
    return parser


class _PassOn(argparse.Action):
    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        namespace.passed_on = [*namespace.passed_on, f"{option_string}={values}"]


# --- the settings


def config_from_environment() -> GrassConfig | None:
    """The configuration that the environment variable GRASS_CONFIG names or holds; None where it is not set.

    Raises:
        ConfigError: the file cannot be read, or a setting cannot work.
    """
    if not (text := os.environ.get(CONFIG_VARIABLE, "").strip()):
        return None
    if not text.startswith("{"):
        return _read(Path(text), CONFIG_VARIABLE)
    _need_yaml(CONFIG_VARIABLE, text)
    from grass_dist.yaml_files import parse_yaml

    return _as_config(parse_yaml(text, CONFIG_VARIABLE, text, "correct it there"), CONFIG_VARIABLE, text)


def _config_of(given: argparse.Namespace) -> GrassConfig | None:
    if given.active_layers is not None:
        return GrassConfig(active_layers=given.active_layers)
    if given.config is not None:
        return _read(Path(given.config), "--config")
    return config_from_environment()


def _read(path: Path, field: str) -> GrassConfig:
    _need_yaml(field, str(path))
    from grass_dist.yaml_files import read_yaml

    return _as_config(read_yaml(path, field), field, str(path))


def _need_yaml(field: str, value: str) -> None:
    if importlib.util.find_spec("yaml") is None:
        raise ConfigError(field, value, "PyYAML, which reads it, is not installed", "run pip install pyyaml")


def _as_config(settings: Any, field: str, value: str) -> GrassConfig:
    if not isinstance(settings, Mapping):
        raise ConfigError(field, value, "it holds no settings", 'write fields of GrassConfig, e.g. "active_layers: 4"')
    if set(settings) == {"grass"}:
        raise ConfigError(field, value, "its settings stand below grass:", "write them without that name above them")
    if "self" in settings:  # which Python cannot pass on
        raise ConfigError(f"{field}.self", settings["self"], "there is no such setting", "leave it out")
    try:
        return GrassConfig(**settings)
    except ConfigError as error:
        raise error.under(field) from None


def _described(config: GrassConfig | None) -> str:
    if config is None:
        return 'if a ds_config has a block "grass": no settings were given'
    changed = {"active_layers": config.active_layers, **config.model_dump(exclude_defaults=True)}
    return "with " + ", ".join(f"{name}={value!r}" for name, value in changed.items())


def _reach_children(config: GrassConfig | None) -> None:
    settings = "null" if config is None else config.model_dump_json()
    os.environ[VARIABLE] = settings
    before = os.environ.get("PYTHONPATH", "")
    if FOLDER not in before.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join([FOLDER, before]) if before else FOLDER
    arm(settings)


# --- the script


def _script_named(name: str) -> tuple[str, ModuleType, CodeType]:
    """Makes the module ``__main__`` for a file as ``python FILE`` does, and puts its folder first in `sys.path`.

    Returns:
        The name for `sys.argv`, the module and its code.
    """
    if not os.path.exists(name) and os.sep not in name:
        name = _command_named(name)
    path = Path(name)
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ConfigError("SCRIPT", name, f"it cannot be read ({error.strerror})", _NAME_A_SCRIPT) from None
    file = str(path.absolute())
    module = ModuleType("__main__")
    vars(module).update(__file__=file, __cached__=None, __builtins__=builtins)
    module.__loader__ = SourceFileLoader("__main__", file)
    _put_first(str(path.resolve().parent))
    return name, module, _compiled(source, file)


_NAME_A_SCRIPT = "name a file, a command such as trl, or after -m a module"


def _command_named(name: str) -> str:
    """The Python script that a command of this environment is: first beside this Python, then in PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise ConfigError("SCRIPT", name, "there is no such file and no such command", _NAME_A_SCRIPT)
    with open(found, "rb") as file:
        start = file.read(300)
    if not (start.startswith(b"#!") and b"python" in start):
        raise ConfigError("SCRIPT", name, f"the command {found} is no Python script", _NAME_A_SCRIPT)
    return found


def _compiled(source: bytes, file: str) -> CodeType:
    try:
        return compile(source, file, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:  # ValueError: NUL characters
        _show(error, None)
        sys.exit(1)


def _module_named(name: str) -> tuple[str, ModuleType, CodeType]:
    """The same as ``python -m NAME`` does."""
    _put_first(os.getcwd())
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except (ModuleNotFoundError, ValueError) as error:
        raise ConfigError("-m", name, f"it cannot be found ({error})", _NAME_A_SCRIPT) from None
    code = None if spec is None else getattr(spec.loader, "get_code", lambda _: None)(spec.name)
    if spec is None or code is None:
        raise ConfigError("-m", name, "there is no such module, or it cannot be run", _NAME_A_SCRIPT)
    module = importlib.util.module_from_spec(spec)
    module.__name__ = "__main__"
    return str(spec.origin), module, code


def _put_first(folder: str) -> None:
    """Replaces the folder of what was started, which Python has put first in `sys.path`, by the script's."""
    if not sys.flags.safe_path:
        sys.path[0] = folder


def _execute(module: ModuleType, code: CodeType) -> None:
    """Runs the code as the program of this process, and shows an error as Python would, without our frames."""
    sys.modules["__main__"] = module
    try:
        exec(code, vars(module))
    except Exception as error:
        _show(error, error.__traceback__.tb_next if error.__traceback__ else None)
        sys.exit(1)


def _show(error: Exception, traceback: Any) -> None:
    sys.excepthook(type(error), error.with_traceback(traceback), traceback)


if __name__ == "__main__":
    main()
