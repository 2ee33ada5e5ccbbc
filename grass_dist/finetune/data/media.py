"""Finds the audio and the images of a row, and reads them when they are needed.

A row holds the path of a file, or what a file holds, or the samples or pixels themselves. Nothing here keeps what it
has read.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from grass_dist.errors import ConfigError, GrassError, shorten

FOLDER = "/folder of the file"
"""Key that rows of files have beside their columns if they name audio or images: the folder of the file."""

_SAMPLE = 65_536
"""Bytes of embedded audio or of an image by which two are told apart, beside their number."""
_FORMS = 'give a path, {"bytes": ..., "path": ...} or, for audio, {"array": ..., "sampling_rate": ...}'
_ORIENTATION = 0x0112
"""Tag of EXIF that says how a camera was held; above 4 it was on its side."""
_EXTRA = {"audio": "speech", "image": "image"}


class Medium(NamedTuple):
    """One recording or image, as a row holds it."""

    part: str
    """ "audio" or "image"."""
    path: str | None = None
    """Path of the file as it is written in the row; of embedded bytes it is only their name."""
    data: bytes | None = None
    """What the file holds, where it is embedded in the row."""
    value: Any = None
    """Samples (and ``rate``) or an image of Pillow, where the row holds them."""
    rate: int | None = None
    """Samples a second of ``value``."""
    folder: str = ""
    """Folder that ``path`` starts from."""

    @property
    def name(self) -> str:
        """Returns the path as it is written, or a digest of what is embedded."""
        if self.data is None and self.value is None:
            path = str(self.path)
            at = Path(self.folder).absolute()
            # `datasets` makes the paths of a folder absolute, and the folder may be moved.
            return str(Path(path).relative_to(at)) if self.folder and Path(path).is_relative_to(at) else path
        data = self.data if self.data is not None else np.ascontiguousarray(self.value).tobytes()
        return f"{len(data)} bytes {hashlib.sha256(data[:_SAMPLE]).hexdigest()[:16]}"

    @property
    def file(self) -> Path | None:
        """Returns the path of the file; None for what is embedded."""
        return None if self.data is not None or self.value is not None else Path(self.folder) / str(self.path)

    @property
    def told(self) -> str:
        """Returns what a sentence calls it."""
        if (file := self.file) is not None:
            return str(file)
        return str(self.path) if self.path else f"the {self.part} in a row ({self.name})"

    @property
    def nbytes(self) -> int:
        """Returns the bytes of the file; 0 if there is none."""
        file = self.file
        return file.stat().st_size if file is not None and file.is_file() else 0

    def opened(self) -> Any:
        """Returns what a library reads it from: a path or the bytes.

        Raises:
            ConfigError: there is no such file.
        """
        if self.data is not None:
            return io.BytesIO(self.data)
        file = self.file
        if file is None or not file.is_file():
            fix = "repair the path (it starts from the folder of the data file), or leave the row out"
            raise self.error(f"there is no file {file}", fix)
        return str(file)

    def broken(self, error: Exception) -> ConfigError:
        """Makes the error that it cannot be read."""
        reason = shorten(" ".join(str(error).split()) or type(error).__name__, 120).rstrip(".")
        return self.error(f"{self.told} cannot be read ({reason})", "repair the file, or leave the row out")

    def error(self, problem: str, fix: str) -> ConfigError:
        """Makes an error about it. ``problem`` names the file, whose path may be too long for the value."""
        return ConfigError(f"data.{self.part}", Path(str(self.path or self.part)).name, problem, fix)


def media_in(value: Any, spec: str, part: str, folder: str = "") -> list[Medium]:
    """Returns the recordings or images of a row's value; none for null.

    Args:
        value: of the column, or JSON text of it.
        spec: the column, for an error.
        part: "audio" or "image".
        folder: folder that paths start from.

    Raises:
        ConfigError: the value is neither; or a row has several recordings.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(ValueError, RecursionError):  # else it is the name of a file
            value = json.loads(value)
    if value is None or value == "":
        return []
    if isinstance(value, list | tuple):
        found = [medium for each in value for medium in media_in(each, spec, part, folder)]
        if part == "audio" and len(found) > 1:
            raise ConfigError(part, spec, f"a row has {len(found)} recordings", "give each a row of its own")
        return found
    if isinstance(value, str):
        return [Medium(part, value.strip(), folder=folder)]
    if isinstance(value, Mapping):
        return [_of_mapping(value, spec, part, folder)]
    if part == "image" and hasattr(value, "convert"):  # an image of Pillow
        return [Medium(part, value=value)]
    raise ConfigError(part, spec, f"column {spec!r} holds a {type(value).__name__}", _FORMS)


def _of_mapping(value: Mapping[str, Any], spec: str, part: str, folder: str) -> Medium:
    path = value.get("path")
    if isinstance(data := value.get("bytes"), bytes):
        return Medium(part, path, data)
    if part == "audio" and value.get("array") is not None:
        try:
            samples, rate = np.asarray(value["array"], dtype=np.float32), int(float(value.get("sampling_rate") or 0))
        except (TypeError, ValueError):
            raise ConfigError(part, spec, "an array is not made of numbers", _FORMS) from None
        if rate < 1 or samples.ndim not in (1, 2) or not samples.size:
            problem = f"an array of shape {samples.shape} with sampling_rate={rate} is no recording"
            raise ConfigError(part, spec, problem, _FORMS)
        return Medium(part, path, value=samples, rate=rate)
    if isinstance(path, str) and path:
        return Medium(part, path, folder=folder)
    raise ConfigError(part, spec, f"column {spec!r} holds an object with {', '.join(map(str, value))}", _FORMS)


def check_library(part: str, task: str) -> None:
    """Checks that what reads audio or images is installed.

    Raises:
        GrassError: it is not.
    """
    module = {"audio": "soundfile", "image": "PIL"}[part]
    if find_spec(module) is None:
        raise GrassError(f"task={task} needs {module}: pip install 'grass-dist[{_EXTRA[part]}]'.")


def problem_of(medium: Medium) -> str:
    """Says why a file cannot be read, by its header alone, or nothing."""
    try:
        seconds_of(medium) if medium.part == "audio" else size_of(medium)
    except ConfigError as error:
        return error.problem
    return ""


def seconds_of(audio: Medium) -> float:
    """Returns how long a recording is, by the header of its file.

    Raises:
        ConfigError: there is no such file, or it is no audio.
    """
    if audio.value is not None:
        assert audio.rate is not None
        return audio.value.shape[-1] / audio.rate
    import soundfile

    source = audio.opened()
    try:
        found = soundfile.info(source)
        seconds = found.frames / found.samplerate
    except Exception as error:  # soundfile raises of several kinds
        raise audio.broken(error) from error
    if found.frames < 1:
        raise audio.error(f"{audio.told} has no samples", "leave the row out")
    return seconds


def samples_of(audio: Medium, rate: int) -> np.ndarray:
    """Reads a recording.

    Args:
        rate: samples a second that are wanted; another rate is resampled by soxr.

    Returns:
        float32 array of shape (samples,): the mean of the channels.

    Raises:
        ConfigError: it cannot be read, or has another rate and soxr is not installed.
    """
    if audio.value is not None:
        samples, own = np.asarray(audio.value, dtype=np.float32), audio.rate
        samples = samples if samples.ndim == 1 else samples.mean(axis=0)  # (channels, samples), as datasets has it
    else:
        import soundfile

        source = audio.opened()
        try:
            samples, own = soundfile.read(source, dtype="float32", always_2d=True)
        except Exception as error:
            raise audio.broken(error) from error
        samples = samples.mean(axis=1)
    if own == rate:
        return samples
    try:
        import soxr
    except ModuleNotFoundError:
        problem = f"{audio.told} has {own} samples a second, and the model takes {rate}"
        fix = f"pip install soxr, which resamples it, or write it with {rate} samples a second"
        raise audio.error(problem, fix) from None
    assert own is not None  # an array without a rate was refused as it was looked at
    return soxr.resample(samples, own, rate)


def size_of(image: Medium) -> tuple[int, int]:
    """Returns width and height of an image as `pixels_of` reads it, by the header of its file.

    Raises:
        ConfigError: there is no such file, or it is no image.
    """
    if image.value is not None:
        return image.value.size
    from PIL import Image

    source = image.opened()
    try:
        with Image.open(source) as opened:
            width, height = opened.size
            # Of a PNG, Pillow would read the whole image to find it.
            lies = opened.format != "PNG" and opened.getexif().get(_ORIENTATION, 1) > 4
            return (height, width) if lies else (width, height)
    except Exception as error:  # Pillow raises of several kinds
        raise image.broken(error) from error


def pixels_of(image: Medium) -> Any:
    """Reads an image, and returns it as one of Pillow in RGB; it is turned as the camera says.

    Raises:
        ConfigError: it cannot be read.
    """
    from PIL import Image, ImageOps

    try:
        if image.value is not None:
            return image.value.convert("RGB")
        with Image.open(image.opened()) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except ConfigError:
        raise
    except Exception as error:
        raise image.broken(error) from error
