"""Writes the model of a checkpoint as an ordinary Hugging Face folder, in one process, one shard at a time."""

from __future__ import annotations

import json
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grass_dist.checkpoint import disk, files
from grass_dist.checkpoint.adapters import ADAPTER, CONFIG, Adapter, Weight, read_weights, take_adapters
from grass_dist.checkpoint.dcp import TensorReader
from grass_dist.checkpoint.engine_folder import engine_checkpoint
from grass_dist.checkpoint.folders import CHECKPOINTS, checkpoints_in, step_of
from grass_dist.checkpoint.loading import Checkpoint, newest_good, open_checkpoint
from grass_dist.checkpoint.pieces import dtype_name
from grass_dist.errors import CheckpointError, GrassError
from grass_dist.ranks import describe_error
from grass_dist.regular_files import give_usual_modes

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack", ".gguf", ".index.json")


@dataclass(frozen=True, slots=True)
class Exported:
    """The result of `export`: the number of files and the bytes of weights."""

    folder: Path
    step: int
    shards: int
    nbytes: int


def parent_of(run: Path) -> Path:
    """The folder that may hold the checkpoints of ``run``: that of a run, or what `grass_dist.save_checkpoint` got."""
    return run if not (run / CHECKPOINTS).is_dir() and checkpoints_in(run) else run / CHECKPOINTS


def folders_of(run: Path) -> list[Path]:
    """The folders of a run's checkpoints, the newest first; for the folder of a checkpoint, that folder alone.

    A folder that `grass_dist.save_checkpoint` was given holds checkpoints as the ``checkpoints`` of a run does.

    The run's folder and ``checkpoints`` may be links, for example to another disk.

    Raises:
        CheckpointError: there is none, or one of them is a link.
    """
    parent = parent_of(run)
    if not parent.is_dir():
        if run.is_dir() and step_of(run) is None and not (run / files.MANIFEST).exists():
            if saved := engine_checkpoint(run):
                raise CheckpointError(
                    f"{saved} has DeepSpeed's files, without the configuration of the model: write its fp32 weights "
                    f"with python -m deepspeed.utils.zero_to_fp32 {saved.parent} OUT --tag {saved.name}, or load it "
                    "into its engine and save it with grass_dist.save_checkpoint."
                )
            raise CheckpointError(f"{run} has no folder {CHECKPOINTS} and is no checkpoint: there is nothing to read.")
        return [run]
    found = checkpoints_in(parent)
    if link := next((path for path in found if path.is_symlink()), None):
        raise CheckpointError(f"{link} is a link, and a run's are not followed; give the checkpoint's own folder.")
    if not found:
        raise CheckpointError(f"{parent} holds no checkpoint.")
    return found


def find_checkpoint(run: Path, step: int | None, tell: Callable[[str], None]) -> Checkpoint:
    """The checkpoint of ``step``, or the newest good one; every file of it has been checked.

    Args:
        run: the folder of a run or of a checkpoint.
        tell: called with a sentence on each newer one that is damaged.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    folders = folders_of(run)
    if step is None and folders != [run]:
        if (good := newest_good(parent_of(run), tell=tell)) is None:
            raise CheckpointError(f"{run}: none of its checkpoints is good.")
        return good
    wanted = [folder for folder in folders if step in (None, step_of(folder))]
    if not wanted:
        there = ", ".join(folder.name for folder in folders)
        raise CheckpointError(f"{run} has no checkpoint of step {step}; there is {there:.200}.")
    return open_checkpoint(wanted[0])


def export(
    run: Path,
    out: Path,
    *,
    step: int | None = None,
    max_shard_bytes: int = 4 * 10**9,
    overwrite: bool = False,
    apart: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Writes the model of a checkpoint into the folder ``out``, which `from_pretrained` loads.

    Adapters are merged into the weights, unless they are kept ``apart``. One shard is in memory at a time; of the
    optimizer states only the checksums are computed. ``out`` appears when it is complete.

    Args:
        run: the folder of a run, whose newest good checkpoint is taken, or of a checkpoint.
        step: the step of the checkpoint, if it is not the newest one.
        max_shard_bytes: the most bytes of a file of weights, unless a single tensor has more.
        overwrite: whether an ``out`` that holds a model is replaced.
        apart: whether adapters are written beside the weights under them, into ``out / "adapter"``, as peft saves them.
        tell: called with a sentence on each newer checkpoint that is damaged, and on code that was copied.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged, or holds no ``model``.
        GrassError: ``out`` cannot be written.
    """
    try:
        out = out.resolve()
        _check_out(out, overwrite)
        with find_checkpoint(run, step, tell) as checkpoint:
            return _export(checkpoint, out, max_shard_bytes, overwrite, apart, tell)
    except GrassError:
        raise
    except Exception as error:  # a full disk, or whatever else: a sentence, as everywhere
        raise GrassError(f"{out} was not written: {describe_error(error).rstrip('.')}.") from error


def _export(
    checkpoint: Checkpoint,
    out: Path,
    max_shard_bytes: int,
    overwrite: bool,
    apart: bool,
    tell: Callable[[str], None],
) -> Exported:
    if checkpoint.folder.resolve().is_relative_to(out):
        raise GrassError(f"{out} holds the checkpoint {checkpoint.folder}; choose another folder.")
    reader = checkpoint.tensors()
    weights, adapter = take_adapters(checkpoint, model_weights(checkpoint, reader), apart=apart)
    shards = split(weights, max_shard_bytes)
    _check_space(out, checkpoint, [*shards, *([adapter.weights] if adapter else [])])
    _write(checkpoint, reader, shards, adapter, out, overwrite)
    if code := [name for name in _model_files(checkpoint) if name.endswith(".py")]:
        tell(
            f"{out} has code that came with the checkpoint ({', '.join(code):.200}): it was copied and not run. "
            "It runs where the model is loaded with trust_remote_code=True, so read it before."
        )
    return Exported(out, checkpoint.step, len(shards), sum(map(_nbytes, shards)))


def checked_numel(where: Path, key: str, entry: files.TensorEntry) -> int:
    """The number of entries of a weight.

    Raises:
        CheckpointError: no tensor has such a shape.
    """
    if len(entry.shape) > 16 or any(not 0 <= n < 2**31 for n in entry.shape):
        raise CheckpointError(f"{where / files.MANIFEST} gives {key!r:.80} a shape that no tensor has.")
    return files.numel(entry)


def model_weights(checkpoint: Checkpoint, reader: TensorReader) -> list[Weight]:
    """The model's tensors, in the model's order.

    Raises:
        CheckpointError: the checkpoint does not hold them as its manifest says.
    """
    where, weights = checkpoint.folder, []
    for key, entry in checkpoint.manifest.weights.items():
        numel, dtype = checked_numel(where, key, entry), getattr(torch, entry.dtype, None)
        if not isinstance(dtype, torch.dtype) or key == "__metadata__":
            raise CheckpointError(f"{where / files.MANIFEST} lists {key!r:.80} in {entry.dtype!r:.40}: no such weight.")
        if numel and reader.tensors.get(key) != (numel, dtype):  # a tensor without entries is in no file
            raise CheckpointError(f"{where} does not hold {key!r:.80} as its {files.MANIFEST} says.")
        weights.append(Weight(key, tuple(entry.shape), dtype, numel))
    if not weights or _nbytes(weights) > files.total_bytes(checkpoint.manifest):
        raise CheckpointError(f"{where} lists no weights, or more than its files can hold.")
    return weights


def split(weights: Sequence[Weight], max_bytes: int) -> list[list[Weight]]:
    """Groups the weights into files as `save_pretrained` does: in order, and a tensor above ``max_bytes`` by itself."""
    shards, current, filled = [], [], 0
    for weight in weights:
        if weight.nbytes > max_bytes:
            shards.append([weight])
            continue
        if current and filled + weight.nbytes > max_bytes:
            shards.append(current)
            current, filled = [], 0
        current.append(weight)
        filled += weight.nbytes
    return [*shards, current] if current else shards


def _nbytes(weights: Sequence[Weight]) -> int:
    return sum(weight.nbytes for weight in weights)


def _write(
    checkpoint: Checkpoint,
    reader: TensorReader,
    shards: Sequence[Sequence[Weight]],
    adapter: Adapter | None,
    out: Path,
    overwrite: bool,
) -> None:
    """Writes into a hidden folder and renames it to ``out``. If that fails, nothing is left."""
    made = [parent for parent in out.parents if not parent.exists()]
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.exporting")
    try:
        temporary.mkdir(parents=True)
        _write_model(checkpoint, [weight for shard in shards for weight in shard], temporary)
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            _write_shard(reader, shard, temporary / name)
            weight_map |= {weight.key: name for weight in shard}
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(map(_nbytes, shards))}, "weight_map": weight_map}
            _write_json(temporary / "model.safetensors.index.json", index)
        if adapter is not None:
            (temporary / ADAPTER).mkdir()
            _write_json(temporary / ADAPTER / CONFIG, adapter.config)
            _write_shard(reader, adapter.weights, temporary / ADAPTER / "adapter_model.safetensors")
            disk.sync(temporary / ADAPTER)
        give_usual_modes(temporary)
        disk.sync(temporary)
        disk.put_in_place(temporary, out, temporary.with_suffix(".replaced") if overwrite else None)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            for parent in made:
                parent.rmdir()
        raise


def _write_shard(reader: TensorReader, shard: Sequence[Weight], file: Path) -> None:
    from safetensors.torch import save_file

    tensors = {weight.key: tensor for weight, tensor in zip(shard, read_weights(reader, shard), strict=True)}
    save_file(tensors, file, metadata={"format": "pt"})
    disk.sync(file)


def _write_model(checkpoint: Checkpoint, weights: Sequence[Weight], folder: Path) -> None:
    """Writes the files of a Hugging Face folder besides the weights."""
    if not isinstance(config := files.read_json(checkpoint.folder / files.MODEL / "config.json"), dict):
        raise CheckpointError(f"{checkpoint.folder / files.MODEL / 'config.json'} is no configuration of a model.")
    config = {k: v for k, v in config.items() if k != "torch_dtype"} | {"use_cache": True}
    sizes: Counter[torch.dtype] = Counter()
    for weight in weights:
        sizes[weight.dtype] += weight.numel * weight.dtype.is_floating_point
    config["dtype"] = dtype_name(sizes.most_common(1)[0][0])
    _write_json(folder / "config.json", config)
    for name in _model_files(checkpoint):
        target = folder / name.removeprefix(f"{files.MODEL}/")
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(checkpoint.folder / name, target)
        if files.digest(target) != checkpoint.manifest.files[name]:
            raise CheckpointError(f"{checkpoint.folder / name} has changed while it was read.")
        disk.sync(target)


def _model_files(checkpoint: Checkpoint) -> list[str]:
    """Files of the tokenizer and such, that are copied: no weights, of which there are others, and no adapter.

    Raises:
        CheckpointError: there is no ``config.json``.
    """
    where, inside = checkpoint.folder, f"{files.MODEL}/"
    if f"{inside}config.json" not in checkpoint.manifest.files:
        raise CheckpointError(
            f"{where} has no {inside}config.json, since no fine-tune of the program saved it: load it into its model, "
            "and call the model's save_pretrained."
        )
    left_out = (f"{inside}config.json", f"{inside}{CONFIG}", *_WEIGHTS)
    return [n for n in checkpoint.manifest.files if n.startswith(inside) and not n.lower().endswith(left_out)]


def _check_out(out: Path, overwrite: bool) -> None:
    if inside := next((path for path in (out, *out.parents) if (path / files.MANIFEST).exists()), None):
        raise GrassError(f"{out} lies in the checkpoint {inside}, which must stay as it is; choose another folder.")
    if out.exists() and not out.is_dir():
        raise GrassError(f"{out} is a file; choose another name.")
    holds = out.exists() and any(out.iterdir())
    if holds and not overwrite:
        raise GrassError(f"{out} exists and is not empty; choose another folder or give --overwrite.")
    if holds and not ((out / "config.json").exists() and any(out.glob("*.safetensors"))):
        raise GrassError(f"{out} holds no model, and --overwrite replaces nothing else; choose another folder.")


def _check_space(out: Path, checkpoint: Checkpoint, shards: Sequence[Sequence[Weight]]) -> None:
    weights = sum(_nbytes(shard) + 512 * len(shard) for shard in shards)  # a tensor's name and shape take bytes too
    needed = weights + files.total_bytes(checkpoint.manifest, _model_files(checkpoint)) + 2**20
    if (free := shutil.disk_usage(next(above for above in out.parents if above.exists())).free) < needed:
        raise GrassError(
            f"{out} takes {needed / 1e9:.3g} GB and its disk has {free / 1e9:.3g} GB free; make room or choose another."
        )


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    disk.sync(file)
