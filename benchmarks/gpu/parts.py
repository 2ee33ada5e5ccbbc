"""The parts in the order in which they run, the most decisive first, and what each one needs."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

WHOLE = 480
"""Seconds that all limits together may take on a GPU."""
CORE = ("torch", "numpy", "pydantic")
LLAMA = (*CORE, "transformers")


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the proof.

    Attributes:
        title: what it shows; a table has it.
        module: the file of `benchmarks.gpu` whose ``show`` runs it.
        seconds: its time limit on a GPU. On the CPU, with ``--tiny``, it may take twice `TINY`.
        needs: libraries that must be installed.
        fakes: libraries that its stand-ins for CUDA need, with ``--tiny``.
    """

    title: str
    module: str
    seconds: int
    needs: tuple[str, ...] = LLAMA
    fakes: tuple[str, ...] = ()

    def missing(self, *, tiny: bool) -> list[str]:
        """Libraries that are not installed here."""
        return [name for name in (*self.needs, *(self.fakes if tiny else ())) if find_spec(name) is None]


TINY = 60
"""Seconds of a part that uses only the CPU, where the machine has nothing else to do."""
PARTS: dict[str, Part] = {
    "facts": Part("versions, pinning, speed of copies", "facts", 25, CORE),
    "slot": Part("a copy into a slot waits for the kernels that use its memory", "slot", 75, LLAMA, ("pytest",)),
    "errors": Part("a failed registration leaves no error behind", "errors", 15, CORE, ("pytest",)),
    "fused": Part("fused and capturable optimizers go on after a load", "fused", 25),
    "tests": Part("the tests marked gpu", "marked", 50, (*CORE, "pytest", "hypothesis")),
    "waits": Part("no synchronisation between two draws", "waits", 40),
    "memory": Part("no wide copy for the norm, no growth over 100 steps", "memory", 30),
    "ranks": Part("two gloo ranks on one GPU train like one process", "ranks", 55),
    "zero": Part("ZeRO-2 and ZeRO-3: switches and equality", "zero", 70, (*LLAMA, "deepspeed")),
    "cost": Part("tokens a second, memory, copies beside the compute", "cost", 75),
    "fork": Part("registered memory survives a fork", "fork", 20, CORE, ("pytest",)),
}
