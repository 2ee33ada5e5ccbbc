"""The trainings of the soak, on each kind of backend, and what their bytes must be."""

from __future__ import annotations

from typing import Any

import torch

import grass_dist
from grass_dist.states.moving import MovingStates
from integration_tests.support.model import (
    ADAMW,
    CLIP,
    GLOBAL_BATCH,
    LAYERS,
    decay_groups,
    global_batch,
    model_of,
    wrapped,
)
from integration_tests.support.training import full, local


class TorchTraining:
    """Under FSDP2 or DDP."""

    born_on_host = False

    def __init__(self, rank: int, world_size: int, case: dict[str, Any], offload: dict[str, Any]) -> None:
        self._rank, self._world_size, self._micro_batches = rank, world_size, case["accumulation"]
        self._clips = not case["offload"]["update_in_backward"]
        reduce_dtype = None if case["dtype"] == torch.float32 else torch.float32
        self.model = wrapped(model_of(case["dtype"], case["uneven"]), case["backend"], world_size, reduce_dtype)
        self.optimizer = grass_dist.GrassOptimizer(
            self.model,
            torch.optim.AdamW,
            ADAMW,
            config=grass_dist.GrassConfig(**case["settings"], offload=offload),
            params=decay_groups(self.model),
            gradient_accumulation_steps=self._micro_batches,
        )
        self.grass = self.optimizer.grass
        self.moving: MovingStates = self.grass.states  # unless they stay

    def step(self, number: int) -> float:
        per, total = GLOBAL_BATCH // self._world_size // self._micro_batches, 0.0
        for micro in range(self._micro_batches):
            x = global_batch(number)[(micro * self._world_size + self._rank) * per :][:per]
            loss = self.model(input_ids=x, labels=x).loss / self._micro_batches
            loss.backward()
            total += loss.item()
        if self._clips:
            self.optimizer.clip_grad_norm_(CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def bytes_now(self) -> tuple[int, int]:
        return self.optimizer.state_bytes, self.optimizer.host_state_bytes

    def roles(self) -> int:
        return sum(own.nbytes for own in self.optimizer._role_optimizers)

    def tensors(self) -> dict[str, torch.Tensor]:
        state = self.optimizer.state_dict()["state"]
        return {f"{i}/{k}": local(v) for i, own in state.items() for k, v in own.items() if torch.is_tensor(v)}

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: full(param) for name, param in self.model.named_parameters()}

    def on_host(self, layer: int) -> bool | None:
        """Whether the state of the layer is where the host keeps it."""
        states = [self.optimizer.state[p] for _, p in self.grass.layers[layer].params]
        return lie_in(self.moving.store[layer], [v for own in states for v in own.values() if v.numel() > 1])

    def end(self) -> None:
        pass


class ZeroTraining:
    """Under DeepSpeed."""

    born_on_host = True

    def __init__(self, rank: int, world_size: int, case: dict[str, Any], offload: dict[str, Any]) -> None:
        from integration_tests.support.zero import ds_config, make_engine

        self._place, self._micro_batches = (rank, world_size), case["accumulation"]
        settings = {**case["settings"], "offload": offload}
        config = ds_config(int(case["backend"][-1]), settings, case["accumulation"], case["dtype"])
        self.engine = make_engine(config, case["dtype"], model_of(case["dtype"], case["uneven"]))
        self.grass, self._states = self.engine.grass, self.engine.optimizer.states
        self.moving: MovingStates = self._states.mode

    def step(self, number: int) -> float:
        from integration_tests.support.zero import train_step

        return train_step(self.engine, number, *self._place, self._micro_batches)

    def bytes_now(self) -> tuple[int, int]:
        return self._states.device_bytes, self._states.host_bytes

    def roles(self) -> int:
        units = self._states._units[LAYERS:]
        return sum(unit.nbytes for unit in units)

    def tensors(self) -> dict[str, torch.Tensor]:
        self._states.settle()
        found = {}
        for key, own in self._states.of.items():
            values = {**own.state, "master": own.master}
            found |= {f"{key}/{name}": value for name, value in values.items() if torch.is_tensor(value)}
        return found

    def weights(self) -> dict[str, torch.Tensor]:
        from integration_tests.support.zero import full as gathered

        return {name: gathered(param) for name, param in self.engine.module.named_parameters()}

    def on_host(self, layer: int) -> bool | None:
        return lie_in(self.moving.store[layer], self._states._units[layer].tensors())

    def end(self) -> None:
        self.engine.destroy()


def lie_in(memory: torch.Tensor, tensors: list[torch.Tensor]) -> bool | None:
    """Whether ``tensors`` are in ``memory``, all or none of them; None if there are none yet."""
    start = memory.data_ptr()
    inside = {start <= t.data_ptr() < start + memory.nbytes for t in tensors}
    assert len(inside) < 2, "a state is in two places"
    return inside.pop() if inside else None


class Account:
    """What the bytes of a training must be, from nothing but the layers that train and those that are drawn."""

    def __init__(self, training: TorchTraining | ZeroTraining, case: dict[str, Any]) -> None:
        self._training, self._last_first = training, not training.born_on_host
        offload, settings = case["offload"], case["settings"]
        gamma, self._lead = settings["active_layers"], settings["draw_ahead"]
        self._streams = offload["mode"] == "stream" and offload["slots"] < gamma
        self._prefetch = offload["prefetch_steps"] if offload["mode"] == "interval" else 0
        self._slots = offload["slots"] if self._streams else gamma
        self._sizes = [place.state.layout.host_bytes for place in training.moving._places]
        self._slot = max(place.state.layout.device_bytes for place in training.moving._places)
        self._born: set[int] = set()
        self._there: set[int] = set()
        self._in = self._out = self.switches = 0
        if training.grass.phase == "train":
            self._switch(set(training.grass.active_layers))

    def _sum(self, layers: set[int]) -> int:
        return sum(self._sizes[layer] for layer in layers)

    def _switch(self, active: set[int]) -> None:
        self.switches += 1
        if self._training.born_on_host:
            self._there -= active - self._born  # one that came before its birth comes again
            self._born |= active
        if not self._streams:
            self._out += self._sum((self._there - active) & self._born)
            self._there &= active
            self._arrive(active - self._there)

    def _arrive(self, layers: set[int]) -> None:
        self._in += self._sum(layers & self._born)
        self._there |= layers

    def after_step(self, active: tuple[int, ...], *, settled: bool) -> list[str]:
        """``active`` trained in the step; nothing did if it was of the probe. What is wrong now."""
        grass = self._training.grass
        self._born |= set(active)
        if self._streams:
            self._out += self._sum(set(active))
        if grass.schedule.switch_due(grass.step):
            self._switch(set(grass.active_layers))
        elif known := grass.state_dict()["next"]:
            new = set(known["active_layers"]) - set(grass.active_layers)
            if new and grass.schedule.steps_to_switch(grass.step) <= self._prefetch:
                self._arrive({max(new) if self._last_first else min(new)} - self._there)
        return [f"{what} after step {grass.step}" for what in self._wrong(settled)]

    def _wrong(self, settled: bool) -> list[str]:
        training = self._training
        traffic, (device, host) = training.grass.traffic, training.bytes_now()
        came, went, born = traffic.bytes_to_device, traffic.bytes_to_host, self._sum(self._born)
        landing = min(self._prefetch, self._lead) > 0
        waste = self._slots * max(self._sizes) * self.switches if self._streams and not self._lead else 0
        checks = {
            "device bytes": device - training.roles() <= (self._slots + landing) * self._slot,
            # a state is made in a slot, or in host memory under ZeRO, and then it is either here or there
            "sum of both ways": went - came == (host - born if training.born_on_host else host),
            "bytes to the host": self._out <= went <= self._out + waste,
            "host bytes": born - self._slots * max(self._sizes) <= host <= born,
        }
        if not self._streams:
            checks["bytes to the device"] = came == self._in
            checks["host bytes"] = host == born - self._sum(self._there & self._born)
        if settled:
            where = {layer: training.on_host(layer) for layer in self._born}
            resting, unmade = ({layer for layer in where if where[layer] is kind} for kind in (True, None))
            checks["memory that states lie in"] = self._sum(resting) <= host <= self._sum(resting | unmade)
        return [f"{name} ({device=}, {host=}, {came=}, {went=})" for name, holds in checks.items() if not holds]
