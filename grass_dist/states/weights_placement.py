"""Decides which weights rest in host memory, and takes the memory, on all ranks alike, before anything trains."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence

import torch
from torch import nn

from grass_dist.config import ADAPTERS, GrassConfig
from grass_dist.errors import ConfigError
from grass_dist.events import Traffic
from grass_dist.model.compiled import is_compiled, is_wrapper_of_compile
from grass_dist.model.discovery import Unit
from grass_dist.model.units import shown_names
from grass_dist.ranks import Ranks, say, together
from grass_dist.states.layer_weights import LayerWeights
from grass_dist.states.moving import MovingStates
from grass_dist.states.plan import check_host_memory, gigabytes
from grass_dist.states.resident import ResidentStates
from grass_dist.states.slots import SlotPool
from grass_dist.states.store import LayerStateStore, Use
from grass_dist.states.transfer import TransferEngine
from grass_dist.states.weight_hooks import MOVES, attach
from grass_dist.states.weights import HostWeights

OF_WEIGHTS = Use("a layer's weights", "use grass.offload.weights='resident'")


def resting(
    model: nn.Module, layers: Sequence[str], always: Collection[int] = ()
) -> tuple[list[LayerWeights], list[str]]:
    """The parameters of each layer that may rest in host memory, and the names of those that may not.

    Those stay on the device that a module outside of their layer has as well (tied weights), that are not contiguous,
    and that are of another class than `nn.Parameter` (quantised ones). Adapters, which always train, are not counted.

    Args:
        layers: FQNs of the whole stack.
        always: ids of the parameters that train at every step.
    """
    homes: defaultdict[int, set[str | None]] = defaultdict(set)
    named: dict[int, tuple[str, nn.Parameter]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        homes[id(param)].add(next((layer for layer in layers if name.startswith(f"{layer}.")), None))
        named.setdefault(id(param), (name, param))
    of: defaultdict[str, list[tuple[str, nn.Parameter]]] = defaultdict(list)
    stay = []
    for key, (name, param) in named.items():
        home, *others = homes[key]
        if key in always or (home is None and not others):
            continue
        plain = type(param) is nn.Parameter and type(param.data) is torch.Tensor and param.is_contiguous()
        if home is not None and not others and plain and param.numel():
            of[home].append((name, param))
        elif param.numel():
            stay.append(name)
    return [LayerWeights(layer, of[layer]) for layer in layers], stay


def refuse_compiled(model: nn.Module) -> None:
    """
    Raises:
        ConfigError: a module is compiled, whose graph has the place of its weights in it.
    """
    if any(is_compiled(module) or is_wrapper_of_compile(module) for module in model.modules()):
        raise ConfigError("grass.offload.weights", "host", MOVES, "compile nothing, or use weights='resident'")


def place_weights(
    model: nn.Module,
    stack: Sequence[str],
    competing: Sequence[Unit],
    roles: Sequence[Unit],
    config: GrassConfig,
    ranks: Ranks,
    device: torch.device,
    *,
    undo: Callable[..., object],
) -> HostWeights:
    """Takes the memory, moves the weights of all layers to host memory, and puts the hooks on the model.

    Over the wire: one all-gather of some numbers from each rank.

    Args:
        stack: FQNs of all layers.
        competing: those that compete.
        roles: what trains at every step.
        device: that computes.
        undo: is given what gives the model back as it was, when there is something to give back.

    Raises:
        ConfigError, GrassError: on all ranks: the weights cannot be where the configuration wants them.
    """

    def check() -> tuple[list[LayerWeights], list[str]]:
        refuse_compiled(model)
        return resting(model, stack, {id(p) for unit in roles if unit.name == ADAPTERS for _, p in unit.params})

    layers, stay = together(ranks, check)
    slots = min(config.offload.weight_slots, len(stack))
    longest = max(layer.layout.device_bytes for layer in layers)
    count = slots + config.active_layers
    host = sum(layer.layout.host_bytes for layer in layers)
    on_cpu = device.type == "cpu"
    here = check_host_memory(ranks, "offload.weights", "host", host + (count * longest if on_cpu else 0))
    if stay:
        say(
            ranks,
            f"{len(stay)} parameters of layers stay on the device with grass.offload.weights='host', since other "
            f"modules have them as well, or they are no plain contiguous parameters: {shown_names(stay)}.",
        )

    def build() -> HostWeights:
        store = LayerStateStore([layer.layout.host_bytes for layer in layers], device, use=OF_WEIGHTS)
        transfers = TransferEngine(device, chaos=config.offload.chaos, inline=True)
        pool = SlotPool(count, longest, device, transfers.allocated, of="weights", else_=OF_WEIGHTS.else_)
        numbers = [unit.number for unit in competing if unit.number is not None]
        made = HostWeights(layers, numbers, pool, store, transfers, slots)
        undo(made.close)
        for name in stack:  # buffers do not move, and a model may have come from host memory
            for buffer in model.get_submodule(name).buffers():
                buffer.data = buffer.data.to(device)
        undo(attach(model, made, layers, device))
        return made

    made = together(ranks, build)
    where = "in host memory" if on_cpu else "pinned"
    each = " of each rank" if ranks.world_size > 1 else ""
    say(
        ranks,
        f"weights (host): {gigabytes(count * longest)} on the device{each} ({config.active_layers} active layers and "
        f"{slots} slots of {gigabytes(longest)}), {gigabytes(here)} {where} on this host",
    )
    return made


class StatesAndWeights:
    """`LayerStates` for a controller: optimizer states, and weights that move as well."""

    def __init__(self, states: ResidentStates | MovingStates, weights: HostWeights) -> None:
        self._states, self._weights = states, weights

    def expect(self, layers: Sequence[int], steps: int) -> None:
        self._states.expect(layers, steps)

    def leave(self, active: Sequence[int]) -> None:
        self._states.leave(active)
        self._weights.leave(active)

    def enter(self, active: Sequence[int]) -> None:
        self._weights.enter(active)
        self._states.enter(active)

    def settle(self) -> None:
        """Makes every state readable where it is. Weights always are, between two steps."""
        self._states.settle()

    def harvest(self) -> Traffic:
        """The sum of both, with the bytes of the weights apart."""
        states, weights = self._states.harvest(), self._weights.harvest()
        return Traffic(
            bytes_to_device=states.bytes_to_device,
            bytes_to_host=states.bytes_to_host,
            copies=states.copies + weights.copies,
            seconds=states.seconds + weights.seconds,
            waited=states.waited + weights.waited,
            weight_bytes_to_device=weights.bytes_to_device,
            weight_bytes_to_host=weights.bytes_to_host,
        )
