"""What one can do to a checkpoint before handing it over: damage it, or forge it so that its digests are right."""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from grass_dist.checkpoint import files

Attack = Callable[[Path], None]
"""Changes a checkpoint's folder."""

MARKER = "executed"
"""File beside the checkpoint that exists if something in it was executed."""

UGLY = "a\nb\x1b[2J\u202e\ud800"


# --- JSON


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def write(file: Path, value: Any) -> None:
    """JSON, with numbers that are too large where there is no other way to write infinity."""
    file.write_text(json.dumps(value).replace("Infinity", "1e999"))


def paths(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Ways to all nodes of a JSON tree but the root."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in entries:
        yield (*at, key)
        yield from paths(value, (*at, key))


def kinds(tree: Any) -> list[tuple[Any, ...]]:
    """Ways to one node of each kind: the first of entries that are alike."""
    found: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for path in paths(tree):
        named = ["*" if isinstance(key, int) or "." in key or "/" in key else key for key in path]
        if path[0] == "units":
            named[1:3] = "*" * len(path[1:3])
        if path[:2] == ("run", "config"):
            named[3:] = "*" * len(path[3:])
        found.setdefault(tuple(named), path)
    return list(found.values())


def put(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of ``tree`` with ``value`` at ``path``."""
    if not path:
        return value
    tree = copy.deepcopy(tree)
    functools.reduce(lambda at, key: at[key], path[:-1], tree)[path[-1]] = value
    return tree


def drop(tree: Any, path: tuple[Any, ...]) -> Any:
    """A copy of ``tree`` without the node at ``path``."""
    tree = copy.deepcopy(tree)
    del functools.reduce(lambda at, key: at[key], path[:-1], tree)[path[-1]]
    return tree


def nested(depth: int) -> list[Any]:
    return [] if depth == 0 else [nested(depth - 1)]


VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 10**9, 10**400, -1.5, 1e308, float("inf"), "", "x" * 10_000, UGLY),
    *([], {}, [None], [UGLY] * 3, nested(100), {"self": 1}, {"a\n": {UGLY: {}}}, {"dtype": "load", "value": []}),
)
"""That stand in the place of every node."""


# --- sealing


def seal(folder: Path, manifest: Any) -> None:
    """Writes a manifest whose own digest is right."""
    if isinstance(manifest, dict):
        body = {key: value for key, value in manifest.items() if key != "digest"}
        manifest = {**body, "digest": files._digest_of(body)}
    write(folder / files.MANIFEST, manifest)


def reseal(folder: Path) -> None:
    """Makes sizes and digests of all files right again."""
    listed = {name: files.digest(folder / name).model_dump() for name in files.files_in(folder)}
    seal(folder, {**read(folder / files.MANIFEST), "files": listed})


def put_manifest(path: tuple[Any, ...], value: Any) -> Attack:
    return lambda folder: seal(folder, put(read(folder / files.MANIFEST), path, value))


def put_state(path: tuple[Any, ...], value: Any) -> Attack:
    def attack(folder: Path) -> None:
        write(folder / files.STATE, put(read(folder / files.STATE), path, value))
        reseal(folder)

    return attack


def put_states(**values: Any) -> Attack:
    """Several entries of ``engine`` at once."""

    def attack(folder: Path) -> None:
        state = read(folder / files.STATE)
        write(folder / files.STATE, {**state, "engine": {**state["engine"], **values}})
        reseal(folder)

    return attack


# --- files


def tensors(folder: Path) -> Path:
    """The only file of tensors."""
    return next((folder / files.TENSORS).glob("*.safetensors"))


def split(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def join(file: Path, header: Any, data: bytes, claim: int | None = None) -> None:
    """``claim``: the length of the header that the file says it has."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes((len(text) if claim is None else claim).to_bytes(8, "little") + text + data)


def header(change: Callable[[dict[str, Any]], Any]) -> Attack:
    """Forges the header of the tensors; ``change`` works on it, and may return another."""

    def attack(folder: Path) -> None:
        found, data = split(tensors(folder))
        join(tensors(folder), change(found) or found, data)
        reseal(folder)

    return attack


def sharding(change: Callable[[dict[str, Any]], Any]) -> Attack:
    """Forges what the header says of the place of each part; ``change`` works on it, and may return another."""

    def within(found: dict[str, Any]) -> None:
        info = json.loads(found["__metadata__"]["DCP_SHARDING_INFO"])
        info = change(info) or info
        found["__metadata__"]["DCP_SHARDING_INFO"] = info if isinstance(info, str) else json.dumps(info)

    return header(within)


def data(key: str, change: Callable[[bytes], bytes]) -> Attack:
    """Forges the bytes of a tensor."""

    def attack(folder: Path) -> None:
        found, content = split(tensors(folder))
        low, high = found[key]["data_offsets"]
        join(tensors(folder), found, content[:low] + change(content[low:high]) + content[high:])
        reseal(folder)

    return attack


def put_bytes(name: str, content: bytes, sealed: bool = True) -> Attack:
    """Replaces or adds a file; "*" is that of the tensors."""

    def attack(folder: Path) -> None:
        file = tensors(folder) if name == "*" else folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        if sealed:
            reseal(folder)

    return attack


def renamed(old: str, new: str) -> Attack:
    """Gives a tensor another name."""

    def within(found: dict[str, Any]) -> None:
        info = json.loads(found["__metadata__"]["DCP_SHARDING_INFO"])
        found[new], info[new] = found.pop(old), info.pop(old)
        found["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(info)

    return header(within)


def claimed(length: int) -> Attack:
    """Has the file of tensors claim a header of so many bytes."""

    def attack(folder: Path) -> None:
        join(tensors(folder), *split(tensors(folder)), claim=length)
        reseal(folder)

    return attack


def of_deepspeed(folder: Path) -> None:
    """Makes it one in DeepSpeed's format, with a layout that fits and pickles in the place of its files."""
    manifest, state = read(folder / files.MANIFEST), read(folder / files.STATE)
    sizes = {name: math.prod(entry["shape"]) for name, entry in manifest["weights"].items()}
    groups = []
    for unit, entries in state["units"].items():
        params = [{"name": name, "numel": sizes[name], "shard": 0} for name in entries]
        groups.append({"unit": unit, "partition": sum(sizes[name] for name in entries), "params": params})
    write(folder / files.STATE, {**state, "deepspeed": {"stage": 1, "groups": groups, "frozen": []}})
    seal(folder, {**manifest, "kind": "deepspeed"})
    at = folder / files.DEEPSPEED / "state"
    at.mkdir(parents=True)
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        torch.save({"module": _Bomb(folder.parent / MARKER)}, at / name)
    reseal(folder)


def pickled(name: str) -> Attack:
    """Puts a pickle there that leaves the marker when it is loaded."""
    return lambda folder: put_bytes(name, pickle.dumps(_Bomb(folder.parent / MARKER)))(folder)


class _Bomb:
    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._marker),)


def replaced(name: str, by: Callable[[Path], object]) -> Attack:
    """Removes a file or folder ("*": that of the tensors) and has ``by`` make something else of that name."""

    def attack(folder: Path) -> None:
        at = tensors(folder) if name == "*" else folder / name
        shutil.rmtree(at) if at.is_dir() else at.unlink()
        by(at)

    return attack


STRANGE: dict[str, Callable[[Path], object]] = {
    "nothing": lambda at: None,
    "an empty file": lambda at: at.touch(),
    "a folder": lambda at: at.mkdir(),
    "a pipe": lambda at: os.mkfifo(at),
    "a link to a file": lambda at: at.symlink_to("/etc/passwd"),
    "a link to a device": lambda at: at.symlink_to("/dev/zero"),
    "a link to itself": lambda at: at.symlink_to(at.name),
    "a link to nothing": lambda at: at.symlink_to("nowhere"),
    "a link to a folder": lambda at: at.symlink_to("/etc"),
    "a link to a pipe": lambda at: (os.mkfifo(at.parent.parent / "pipe"), at.symlink_to(at.parent.parent / "pipe")),
    "a large file": lambda at: (at.touch(), os.truncate(at, 100 * 2**20)),
    "zeros": lambda at: at.write_bytes(bytes(5000)),
    "half a number": lambda at: at.write_text('{"a": 1'),
    "no UTF-8": lambda at: at.write_bytes(b'{"\xff": 1}'),
    "deep lists": lambda at: at.write_text("[" * 200_000),
    "deep objects": lambda at: at.write_text('{"a":' * 900 + "1" + "}" * 900),
    "NaN": lambda at: at.write_text('{"format": NaN}'),
    "a long number": lambda at: at.write_text('{"version": ' + "9" * 5000 + "}"),
    "one key twice": lambda at: at.write_text('{"format": 1, "format": "grass_dist checkpoint"}'),
}
"""What stands in the place of a file."""
