"""FSDP2 under Accelerate and Trainer on CPUs, where Accelerate itself leaves it off.

Accelerate takes the FSDP plugin on devices alone: on CPUs it makes DDP of the same arguments. So these put the plugin
and the type into its state after it was made, as it does itself on a GPU. All that follows is the libraries' own code.
"""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from transformers import Trainer


def put_fsdp2_in(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def fsdp2_plugin(**more: Any) -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        **more,
    )


class Fsdp2Trainer(Trainer):
    """A Trainer whose arguments have ``fsdp=True``, on CPUs."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        put_fsdp2_in(self.accelerator, FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args))
        self.is_fsdp_enabled = True


def forget_fsdp2(accelerator: Accelerator) -> None:
    """Lets the next accelerator of this process be of another type."""
    accelerator.state._reset_state(reset_partial_state=True)
