"""Checkpoints whose digests are right and whose content is not: those that are refused, and those that load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grass_dist.checkpoint import files
from tests.hostile import (
    UGLY,
    Attack,
    claimed,
    data,
    header,
    join,
    of_deepspeed,
    pickled,
    put_bytes,
    put_manifest,
    put_state,
    put_states,
    renamed,
    reseal,
    sharding,
)

WEIGHT, MOMENT = "embed.weight", "layers.0.up.weight@exp_avg"
UP = ("units", "layers.0", "layers.0.up.weight")
GROUP, NEXT = ("groups", 0), ("engine", "next")


def also(shape: list[int], offset: list[Any], nbytes: int, key: str = WEIGHT) -> Attack:
    """Adds another file with a part of a tensor."""

    def attack(folder: Path) -> None:
        info = json.dumps({key: {"saved_offsets": offset}})
        of_key = {"dtype": "BF16", "shape": shape, "data_offsets": [0, nbytes]}
        found = {"__metadata__": {"DCP_SHARDING_INFO": info}, key: of_key}
        join(folder / files.TENSORS / "another.safetensors", found, bytes(nbytes))
        reseal(folder)

    return attack


def entry(**values: Any) -> Attack:
    """Of the header: what it says of `WEIGHT`."""
    return header(lambda found: found[WEIGHT].update(values))


def offsets(value: Any) -> Attack:
    """Where `WEIGHT` lies."""
    return sharding(lambda info: info[WEIGHT].update(saved_offsets=value))


def moment(value: Any) -> Attack:
    return put_state((*UP, "exp_avg"), value)


def steps(value: Any) -> Attack:
    return put_state((*UP, "step"), value)


def group(name: str, value: Any) -> Attack:
    return put_state((*GROUP, name), value)


def draw(name: str, value: Any) -> Attack:
    return put_state((*NEXT, name), value)


def importances(values: list[Any]) -> Attack:
    return put_state(("engine", "tracker", "importances"), values)


def measured(layers: list[Any]) -> Attack:
    return put_state(("engine", "measured", "layers"), layers)


def active(layers: list[Any]) -> Attack:
    return put_state(("engine", "active_layers"), layers)


def run(*path: str, value: Any) -> Attack:
    return put_state(("run", *path), value)


def scalar(dtype: str, value: Any) -> dict[str, Any]:
    return {"dtype": dtype, "value": value}


F32 = {"dtype": "float32"}
EXECUTED: dict[str, Attack] = {
    "a pickle for the tensors": pickled("*"),
    "a pickle for the state": pickled("state.json"),
    "a pickle for the manifest": put_bytes("checkpoint.json", b"\x80\x04.", sealed=False),
    "a pickle beside the tensors": pickled("tensors/more.safetensors"),
    "a pickle as torch's metadata": pickled("tensors/.metadata"),
    "pickles for DeepSpeed's files": of_deepspeed,
    "DeepSpeed's format without its files": put_manifest(("kind",), "deepspeed"),
}
TENSORS: dict[str, Attack] = {
    "a weight of another dtype": entry(dtype="F16"),
    "a weight of integers": entry(dtype="I16"),
    "a weight of an unknown dtype": entry(dtype="X16"),
    "a weight of no dtype": entry(dtype=None),
    "a moment of another dtype": header(lambda found: found[MOMENT].update(dtype="I32")),
    "measurements of another dtype": header(lambda found: found["@measured"].update(dtype="I64")),
    "random numbers of another dtype": header(lambda found: found["@rng"].update(dtype="I8")),
    "a matrix": entry(shape=[16, 8]),
    "a matrix with a place": header(lambda found: found[WEIGHT].update(shape=[128, 1])),
    "a scalar": entry(shape=[]),
    "a shape below zero": entry(shape=[-128]),
    "a shape of halves": entry(shape=[128.5]),
    "a huge shape": entry(shape=[2**60]),
    "a shape that wraps around": entry(shape=[2**32, 2**32]),
    "a shape beyond 64 bits": entry(shape=[10**30]),
    "petabytes": entry(data_offsets=[0, 2**50]),
    "data that ends before it begins": entry(data_offsets=[256, 0]),
    "data of another tensor": header(lambda found: found[MOMENT].update(data_offsets=found[WEIGHT]["data_offsets"])),
    "data below zero": entry(data_offsets=[-256, 0]),
    "a missing weight": renamed("norm.bias", "norm.other"),
    "a missing moment": renamed(MOMENT, "layers.0.up.weight@other"),
    "missing random numbers": renamed("@rng", "@other"),
    "missing measurements": renamed("@measured", "@other"),
    "a header of a list": header(lambda found: [1]),
    "a header of nothing": header(lambda found: {"__metadata__": {}}),
    "metadata of a number": header(lambda found: found.update(__metadata__=5)),
    "metadata of numbers": header(lambda found: found["__metadata__"].update(DCP_SHARDING_INFO=5)),
    "a header of petabytes": claimed(2**50),
    "a header of 64 bits": claimed(2**64 - 1),
    "a header of none": claimed(0),
    "a header that is cut": claimed(100),
    "a deep header": put_bytes("*", (40_000).to_bytes(8, "little") + b'{"a":' * 8000),
    **{f"a place of {value!r}": offsets(value) for value in (-1, 0, None, "0", [-1], [2**40], [2**63 - 1], [2**70])},
    **{f"a place of {value!r}": offsets(value) for value in ([0.5], [1e300], ["0"], [None], [], [0, 0], [[0]], [True])},
    "no place": sharding(lambda info: info.pop(WEIGHT)),
    "places of nothing": sharding(lambda info: "{}"),
    "places of a list": sharding(lambda info: "[1]"),
    "places of no JSON": sharding(lambda info: "{"),
    "deep places": sharding(lambda info: "[" * 100_000),
    "a weight twice": also([128], [0], 256),
    "a weight that overlaps": also([64], [64], 128),
    "a weight with more behind it": also([128], [128], 256),
    "a weight with a gap": also([128], [200], 256),
    "a weight with nothing in front": also([0], [0], 0),
    "a weight with nothing behind": also([0], [128], 0),
    "a weight with a matrix behind": also([4, 4], [128, 0], 32),
    "random numbers of zeros": data("@rng", lambda found: bytes(len(found))),
    "random numbers of ones": data("@rng", lambda found: b"\xff" * len(found)),
}
MANIFEST: dict[str, Attack] = {
    "another version": put_manifest(("version",), 2),
    "a version of text": put_manifest(("version",), "1"),
    "a format of somebody else": put_manifest(("format",), "torch checkpoint"),
    "another kind": put_manifest(("kind",), "pickle"),
    "no ranks": put_manifest(("world_size",), 0),
    "many ranks": put_manifest(("world_size",), 10**9),
    "more ranks than rows": put_manifest(("world_size",), 2**20),
    "a weight more": put_manifest(("weights", UGLY * 50), {"shape": [1], "dtype": "float32"}),
    "a weight of another shape": put_manifest(("weights", WEIGHT, "shape"), [1] * 10_000),
    "a weight in another dtype": put_manifest(("weights", WEIGHT, "dtype"), UGLY * 50),
    "a weight in an attribute of torch": put_manifest(("weights", WEIGHT, "dtype"), "load"),
    "a size below zero": put_manifest(("files", "state.json", "bytes"), -1),
    "a digest of capitals": put_manifest(("files", "state.json", "sha256"), "A" * 64),
}
STATE: dict[str, Attack] = {
    **{f"active layers {of}": active(of) for of in ([0, 9], [-1, 0], [0, 0], [], [0], [0, 1, 2], [0, 1, 2, 3])},
    **{f"measured layers {of}": measured(of) for of in ([[0, 9]], [[0, 1], [0]], [[0, 1, 2, 3]] * 3, [[0, 2]] * 4)},
    **{f"measured layers {of}": measured(of) for of in ([[0, 2]] * 2, [[0, 0]] * 3, [[]] * 3, [[0, 10**400]] * 3)},
    **{f"importances {of}": importances(of) for of in ([1.0] * 3, [1.0] * 5, [-1.0] * 4, [], ["1"] * 4)},
    "importances without end": importances([float("inf")] * 4),
    **{f"a draw for step {of}": draw("step", of) for of in (-1, 0, 5, 7, 10, 10**18, 10**400)},
    **{f"a draw of round {of}": draw("round", of) for of in (-1, 0, 2, 10**400)},
    **{f"a draw of {of}": draw("active_layers", of) for of in ([0, 9], [0], [0, 0], [0, 1, 2, 3], [])},
    **{f"odds of {of}": draw("probabilities", of) for of in ([], [1.0], [0.5] * 4, [-1.0, 1.0, 1.0, 0.0], [None] * 4)},
    **{f"odds of {of}": draw("probabilities", of) for of in ([float("inf")] * 4, [1e308] * 4, [0.2] * 5)},
    **{f"drawn at {of}": draw("drawn_at", of) for of in (-1, 6, 10**400)},
    **{f"step {of}": put_states(step=of) for of in (-1, 1, 3, 6, 2**60, 10**400)},
    "a step of the probe": put_states(step=1, next=None),
    "skipped steps below zero": put_states(skipped=-1),
    "dropped steps below zero": put_state(("engine", "tracker", "dropped"), -1),
    "an unknown unit": put_state(("units", "layers.9"), {}),
    "an ugly unit": put_state(("units", UGLY * 50), {}),
    "an unknown parameter": put_state(("units", "layers.0", UGLY * 50), {}),
    **{f"a moment of {of!r}": moment(of) for of in (None, [], {}, "x", 5, F32 | {"a": 1}, {"value": 1.0})},
    "a moment of one number": moment(scalar("float32", 1.0)),
    **{
        f"a moment in {of}": moment({"dtype": of}) for of in ("load", "_dynamo", "classes", "int32", "float64", "qint8")
    },
    **{f"{of!r} steps": steps(of) for of in (F32, -1, 10**400, "1", None, [1], 1e308)},
    "steps in a list": steps({"dtype": ["float32"], "value": 1}),
    **{f"{of!r} steps in float32": steps(scalar("float32", of)) for of in (-1, 1e308, 10**400, [1], "1", None, {})},
    **{f"a step in {of}": steps(scalar(of, 1)) for of in ("load", "qint8", "complex64", "float33", "")},
    "a master of numbers": put_state((*UP, "master"), [1.0]),
    "a master of one number": put_state((*UP, "master"), scalar("float32", 1.0)),
    "no second moment": put_state(UP, {"step": scalar("float32", 1.0), "exp_avg": F32}),
    "a state with a mark": put_state((*UP, "a@b"), F32),
    "a state with a long name": put_state((*UP, "x" * 200), F32),
    "a state with an ugly name": put_state((*UP, UGLY), F32),
    "a state without a tensor": put_state((*UP, "max_exp_avg_sq"), F32),
    "no groups": put_state(("groups",), []),
    "two groups": put_state(("groups",), [{}, {}]),
    "parameters in a group": group("params", [0]),
    **{f"a rate of {of!r}": group("lr", of) for of in ("1", None, True, [1.0], {}, 10**400, float("inf"))},
    **{f"betas of {of!r}": group("betas", of) for of in ([0.9], [1, 1], [5, 5], ["a", "b"], None, 0.9, [[0.9], [0.9]])},
    **{f"amsgrad of {of!r}": group("amsgrad", of) for of in (1, None, "true", True)},
    "eps of null": group("eps", None),
    "decay of a list": group("weight_decay", []),
}
RUN: dict[str, Attack] = {
    **{f"run: step {of!r}": run("step", value=of) for of in ("5", True, None, -1, 6, 2**60, 10**400, 5.0, [])},
    **{f"run: {of!r} updates": run("updates", value=of) for of in ("3", -1, 6, None)},
    **{f"run: {of!r} bad steps": run("bad_steps", value=of) for of in ("3", -1, 6, None)},
    **{f"run: configuration {of!r}": run("config", value=of) for of in (None, [], "x", {UGLY: 1}, {"x" * 1000: 1})},
    "run: another seed": run("config", "train", "seed", value=9),
    "run: a seed of text": run("config", "train", "seed", value=UGLY * 100),
    "run: a seed of a long list": run("config", "train", "seed", value=[1] * 10_000),
    "run: a setting of the method more": run("config", "grass", "x", value=[[[[[[[UGLY]]]]]]]),
    "run: other data": run("data", value={"n": 2}),
    "run: data of text": run("data", value="x" * 1000),
}
FORGED = EXECUTED | TENSORS | MANIFEST | STATE | RUN
"""That must be refused."""

HARMLESS: dict[str, Attack] = {
    "a pickle that nobody asks for": pickled("model/pytorch_model.bin"),
    "ugly versions": put_manifest(("versions", UGLY), UGLY * 50),
    "an ugly backend": put_manifest(("backend",), UGLY * 50),
    "another time": put_manifest(("saved",), ""),
    "more tensors": also([4], [0], 8, "another"),
    "more matrices": also([2, 2], [0, 0], 8, "another"),
    "layers in another order": active([2, 0]),
    "no importances": importances([None] * 4),
    "equal importances": importances([0.0] * 4),
    "huge importances": importances([1e308] * 4),
    "an importance that leaves no others": importances([1e308, 0, 0, 0]),
    "no draw": put_states(next=None),
    "a draw of long ago": draw("drawn_at", 0),
    "a step in the far future": put_states(step=2**52, next=None),
    "many skipped steps": put_states(skipped=10**18),
    "no measurements": measured([]),
    "no states": put_state(("units",), {}),
    "a layer without a state": put_state(("units", "layers.0"), {}),
    "a state of another unit's": put_state(("units", "layers.0", WEIGHT), {"step": 1}),
    "a part": put_state((*UP, "part"), [0, 2]),
    "many updates": steps(scalar("float32", 1e15)),
    "an unknown setting": group("x", {UGLY: [None]}),
    "no settings": put_state(GROUP, {}),
    "a rate below zero": group("lr", -1.0),
    "a huge rate": group("lr", 1e30),
    **{f"{name} of {UGLY!r}": group(name, UGLY) for name in ("foreach", "fused", "capturable", "differentiable")},
    "run: another name": run("config", "name", value=UGLY * 50),
    "run: an unknown section": run("config", "x", value={"y": [[[UGLY]]]}),
    "run: another rate": run("config", "train", "learning_rate", value=[1] * 1000),
}
"""That load: what an attacker could as well have trained, or what nothing depends on."""


def chain(depth: int, length: int) -> dict[str, Any]:
    """Objects in one another, by long names."""
    return {} if depth == 0 else {"x" * length: chain(depth - 1, length)}


NAMES = dict.fromkeys(map(str, range(200_000)))
CLAIMS = {
    "wrong layers": put_state(("engine", "measured", "layers"), [None] * 500_000),
    "wrong layers in layers": put_state(("engine", "measured", "layers"), [[None] * 500_000]),
    "wrong importances": put_state(("engine", "tracker", "importances"), ["x"] * 500_000),
    "wrong shapes": put_manifest(("weights", "embed.weight", "shape"), [None] * 500_000),
    "wrong weights": put_manifest(("weights",), NAMES),
    "wrong files": put_manifest(("files",), {str(key): {} for key in range(200_000)}),
    "wrong versions": put_manifest(("versions",), NAMES),
    "wrong units": put_state(("units",), NAMES),
    "wrong states": put_state(("units", "layers.0"), NAMES),
    "unknown keys": put_manifest((), {"format": files.FORMAT, "version": 1} | NAMES),
    "unknown keys of the method": put_state(("engine",), NAMES),
    "wrong groups": put_state(("groups",), [None] * 500_000),
    "many groups": put_state(("groups",), [{}] * 200_000),
    "a deep configuration": put_state(("run", "config"), chain(600, 6000)),
}
"""Small for what they are, if each wrong thing in them took its kilobyte."""
