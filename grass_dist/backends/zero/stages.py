"""The two classes of a ZeRO optimizer that is constructed again: of stages 1 and 2, and of stage 3."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from grass_dist.backends.zero.groups import Group, weights_on_host, zero_shard
from grass_dist.backends.zero.narrow import NarrowZero
from grass_dist.backends.zero.private import STAGE_1_AND_2, STAGE_3


@functools.cache
def narrow_class(stock: type, stage3: bool) -> type:
    """The class of a `NarrowZero` over DeepSpeed's class ``stock``."""
    return type(f"Grass{stock.__name__}", (_Narrow3 if stage3 else _Narrow12, stock), {})


class _Narrow12(NarrowZero):
    names = STAGE_1_AND_2

    def _lazy_init_hp_params_optimizer_state(self) -> None:
        """DeepSpeed calls it when one group has been updated, and the others may have no moments yet."""

    def _construct(self, groups: Sequence[Group]) -> None:
        super()._construct(groups)
        self.reads.install(groups[0].params[0])

    def update_lp_params(self) -> None:
        """DeepSpeed calls it after it has loaded a universal checkpoint, whose states come later here."""
        if self.universal is None:
            super().update_lp_params()

    def saved_order(self, group: Group) -> list[nn.Parameter]:
        if not self.round_robin_gradients:
            return list(group.params)
        return self._round_robin_reorder(list(group.params), self.partition_count[0])[0]


class _Narrow3(NarrowZero):
    names = STAGE_3
    parameter_offload: Any = None
    _homes: Mapping[nn.Parameter, torch.Tensor] = {}
    """With ``offload_param``: where the shard of each parameter rests, pinned if the user says so."""

    def initialize_ds_offload(self, *args: Any, **kwargs: Any) -> Any:
        """The module's hooks and its fetch order are for the whole run."""
        if self.parameter_offload is not None:
            return self.parameter_offload
        made = super().initialize_ds_offload(*args, **kwargs)
        if weights_on_host(self.arguments):  # DeepSpeed takes the shards of what trains into a flat buffer next
            self._homes = {param: zero_shard(param).data for group in self.every for param in group.params}
        return made

    def _end_rest_step(self) -> None:
        super()._end_rest_step()
        self._partition_all_parameters()  # as a step does: not every module was let go of in the backward

    def _construct(self, groups: Sequence[Group]) -> None:
        if self._built:
            self._partition_all_parameters()
        self.arguments["sub_group_size"] = sys.maxsize  # one flat partition a group
        super()._construct(groups)

    def _let_go(self, keep: set[tuple[str, int]]) -> None:
        super()._let_go(keep)
        for group in self.every if self._homes else self.groups:
            if group.key not in keep:  # or one layer would hold the flat buffer of the whole interval
                for param in group.params:
                    self._leave_buffer(zero_shard(param), self._homes.get(param))

    @staticmethod
    def _leave_buffer(shard: torch.Tensor, home: torch.Tensor | None) -> None:
        """Takes a shard out of the flat buffer of what trained; at home it may be already."""
        if home is None:
            shard.data = shard.data.clone()
        elif shard.data_ptr() != home.data_ptr():
            shard.data = home.copy_(shard.data)

    def _release(self) -> None:
        for hook in (*self._grad_acc_hooks, *self._leaf_module_hooks):
            hook.remove()

    # --- what `deepspeed.utils.safe_*` call

    def get_full_hp_param(self, param: nn.Parameter, optim_state_key: str | None = None) -> torch.Tensor | None:
        return self.reads.full(param, optim_state_key)

    def set_full_hp_param(self, value: torch.Tensor, param: nn.Parameter, optim_state_key: str | None = None) -> None:
        self.reads.set_full(param, value, optim_state_key)

    def get_local_fp32_param(self, param: nn.Parameter, optim_state_key: str | None = None) -> torch.Tensor | None:
        return self.reads.local(param, optim_state_key)

    def set_local_hp_param(self, value: torch.Tensor, param: nn.Parameter, optim_state_key: str | None = None) -> None:
        self.reads.set_local(param, value, optim_state_key)

    def get_hp_param_device(self, param: nn.Parameter, optim_state_key: str | None = None) -> torch.device | None:
        return self.reads.device(param, optim_state_key)

    def get_fp32_grad_for_param(self, param: nn.Parameter) -> torch.Tensor | None:
        return super().get_fp32_grad_for_param(param) if self.reads.trains(param) else None

    def get_local_fp32_grad_for_param(self, param: nn.Parameter) -> torch.Tensor | None:
        return super().get_local_fp32_grad_for_param(param) if self.reads.trains(param) else None

    def set_fp32_grad_for_param(self, value: torch.Tensor, param: nn.Parameter) -> None:
        self.reads.refuse_gradient(param)
        super().set_fp32_grad_for_param(value, param)

    def set_local_grad_for_param(self, value: torch.Tensor, param: nn.Parameter) -> None:
        self.reads.refuse_gradient(param)
        super().set_local_grad_for_param(value, param)

    def update_fp32_grad_for_param_vectorized(self, update_func: Any, param_list: Sequence[nn.Parameter]) -> None:
        trained = [param for param in param_list if self.reads.trains(param)]
        super().update_fp32_grad_for_param_vectorized(update_func, trained)
