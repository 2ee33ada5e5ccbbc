"""The state of one layer: which masters and moments it has, and the memory that they are in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch

from grass_dist.states.fields import Counts, Kept, field, made_in, move_home, placed_count
from grass_dist.states.layout import Layout

MASTER = "master"

Target = TypeVar("Target", bound="TargetState")


class TargetState:
    """Master and moments of one tensor that an optimizer class updates: a parameter, a shard, or a flat partition.

    Args:
        name: of the parameter or group.
        kept: what `foretell` takes.

    Attributes:
        state: what the optimizer class keeps, by key: moments wherever they are, and step counts.
        master: wherever it is; None if there is no state yet, or if the weights themselves are updated.
        param: what the optimizer class updates now; None if it updates nothing of this.
        last_homes: memory that was bound before; a state that is being bound is in the one or the other.
        resident: whether that is on the device.
    """

    def __init__(self, name: str, kept: Kept) -> None:
        self.name = name
        self.state: dict[str, Any] = {}
        self._bound: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.last_homes: dict[str, torch.Tensor] = {}
        self.master: torch.Tensor | None = None
        self.param: torch.Tensor | None = None
        self.resident = True
        self.foretell(kept)

    def foretell(self, kept: Kept) -> None:
        """Says which tensors the state will have: (key, shape, dtype) of each, a master first.

        Host memory rounds nothing of a quantised state: its fp32 tensors are scales.
        """
        self.dtypes = {key: dtype for key, _, dtype in kept}
        quantised = any(not dtype.is_floating_point for dtype in self.dtypes.values())
        self.fields = [field(self.name, *entry, rounds=not quantised) for entry in kept]

    @property
    def homes(self) -> dict[str, torch.Tensor]:
        """Memory that is bound, by key."""
        return {key: view for key, (view, _) in self._bound.items()}

    @property
    def target(self) -> torch.Tensor:
        """What the optimizer class updates, where it updates something of this."""
        assert self.param is not None
        return self.param

    @property
    def device(self) -> torch.device:
        """The device on which it is updated."""
        return self.target.device

    def bind(self, views: Sequence[torch.Tensor], *, resident: bool) -> None:
        """Makes ``views``, one for each of `fields`, the state; before there is one, the memory that it is made in.

        A copy that ends may call this while another thread reads, so what is bound changes as a whole.
        """
        homes = dict(zip(self.dtypes, views, strict=True))
        self.last_homes, self.resident = self.homes, resident
        self._bound = {key: (view, view.detach()) for key, view in homes.items()}
        for key, view in homes.items():
            if key == MASTER and self.master is not None:
                self.master = self.used(view)
                self.show(self.master)
            elif key in self.state:
                self.state[key] = self.used(view)

    def left(self, key: str) -> bool:
        """Whether a caller has given the tensor of a bound entry another memory (``.data = ...``)."""
        view, memory = self._bound.get(key, (None, None))
        return view is not None and memory is not None and view.data_ptr() != memory.data_ptr()

    def come_home(self) -> None:
        """Gives such tensors their memory again, with what it held."""
        for view, memory in self._bound.values():
            if view.data_ptr() != memory.data_ptr():
                view.data = memory

    def used(self, view: torch.Tensor) -> torch.Tensor:
        """The entries of a bound view that the state has."""
        return view

    def show(self, master: torch.Tensor) -> None:
        """Gives the optimizer class the master to update."""
        if (param := self.param) is not None:  # which may change meanwhile: a copy that ends calls this, too
            param.data = master

    def fill(self, state: Mapping[str, Any], counts: Counts) -> None:
        """Takes over copies of what an optimizer class has kept.

        Args:
            counts: tensors of one element that the class keeps, as `counts_for` gives them.
        """
        for key, value in state.items():
            self.state[key] = self.placed(key, value, counts)

    def placed(self, key: str, value: Any, counts: Counts) -> Any:
        """A copy of a loaded entry, where it belongs; the tensor may lack the padding at its end."""
        if key in counts and isinstance(value, (torch.Tensor, int, float)):
            return placed_count(value, key, counts)
        if not torch.is_tensor(value):
            return value
        if (home := self.homes.get(key)) is not None:
            flat = home.view(-1)
            flat[: value.numel()].copy_(value.reshape(-1))
            flat[value.numel() :].zero_()
            return self.used(home)
        return value.to(self.device, copy=True)

    def exact(self, key: str, value: Any) -> Any:
        """A moment in the dtype in which it is updated: host memory may round it (`offload.host_dtype`)."""
        dtype = self.dtypes.get(key)
        return value.to(dtype) if torch.is_tensor(value) and dtype is not None else value

    def tensors(self) -> list[torch.Tensor]:
        """All tensors of the state, the master first."""
        kept = [value for value in self.state.values() if torch.is_tensor(value)]
        return kept if self.master is None else [self.master, *kept]


@contextmanager
def materialize(targets: Sequence[TargetState], state: Mapping[Any, dict[str, Any]]) -> Iterator[None]:
    """While it lasts, an optimizer class makes the states of ``targets`` in the memory that is bound to them.

    Args:
        state: that of the optimizer, by what it updates.
    """
    homes = [(own.target, key, own.used(view)) for own in targets for key, view in own.homes.items() if key != MASTER]
    with made_in(homes, state):
        yield
    move_home(homes, state)


class LayerState(Generic[Target]):
    """The states of all targets of a layer or role, as one thing that moves between host memory and the device.

    Args:
        name: of the layer or role.
        targets: what an optimizer class updates of it; each backend has other ones.
    """

    def __init__(self, name: str, targets: Sequence[Target]) -> None:
        self.name, self.targets = name, list(targets)
        self.lay_out()

    def lay_out(self, host_dtype: torch.dtype | None = None) -> None:
        """Decides where each field lies in the flat buffers; ``host_dtype`` is that of moments in host memory."""
        self.layout = Layout([field for own in self.targets for field in own.fields], host_dtype)

    def bind(self, views: Sequence[torch.Tensor], *, resident: bool) -> None:
        """Makes ``views``, one for each field of the layout, the state; ``resident``: they are on the device."""
        start = 0
        for own in self.targets:
            end = start + len(own.fields)
            own.bind(views[start:end], resident=resident)
            start = end

    def tensors(self) -> list[torch.Tensor]:
        """All tensors of the state on this rank."""
        return [tensor for own in self.targets for tensor in own.tensors()]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())
