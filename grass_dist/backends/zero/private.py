"""All that is used of DeepSpeed without being documented, in one table that is checked at start-up."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from grass_dist.errors import GrassError

SUPPORTED = ">=0.16.9,!=0.17.*,!=0.18.*"
"""Tested: 0.16.9 and 0.19.8. Stock ZeRO of 0.17 and 0.18 has faults that the tests find (docs/deepspeed.md)."""

RECOMPUTES_FROZEN = ">=0.19.3"
"""Stage 3 of earlier releases releases a frozen parameter in the recomputation of a layer, before torch has compared
what is recomputed with what was there, which fails."""

ONLY_STAGE_3 = ">=0.17,<0.19.7"
"""Releases with faults at stages 1 and 2, in stock: an overflow that some ranks do not see, gradients of micro-batches
that are lost or divided twice, flat buffers in an autograd graph (docs/deepspeed.md)."""

DROPS_ON_CPU = ">=0.19,<0.19.8"
"""Stages 1 and 2 of these releases sort gradients by the names of types on a GPU before they reduce them: on a CPU none
has such a name, and the ranks' gradients are never added up. No error comes, in stock neither."""


@dataclass(frozen=True, slots=True)
class Names:
    """Names of one ZeRO optimizer class."""

    masters: str
    """Attribute: list of this rank's flat fp32 partition of each parameter group."""
    masters_key: str
    """Key of these partitions in the class's state_dict."""
    optimizer_key: str
    """Key of the base optimizer's state_dict in the class's state_dict."""
    shapes: tuple[str, ...]
    """Attributes that the engine's checkpoint code takes each group's parameters from."""
    attributes: tuple[str, ...]
    methods: tuple[str, ...]


_ATTRIBUTES = (
    *("optimizer", "loss_scaler", "overflow", "dp_process_group", "_grad_acc_hooks"),
    "averaged_gradients",  # a list a group: this rank's parts of its averaged gradient
)
_METHODS = (
    *("step", "state_dict", "load_state_dict", "_update_scale", "destroy"),
    "overlapping_partition_gradients_reduce_epilogue",
)

STAGE_1_AND_2 = Names(
    masters="single_partition_of_fp32_groups",
    masters_key="single_partition_of_fp32_groups",
    optimizer_key="base_optimizer_state",
    shapes=("bit16_groups", "round_robin_bit16_groups"),
    attributes=(*_ATTRIBUTES, "round_robin_gradients", "partition_count"),
    methods=(
        *(*_METHODS, "reduce_gradients", "_round_robin_reorder"),
        "_lazy_init_hp_params_optimizer_state",
    ),
)
STAGE_3 = Names(
    masters="fp32_partitioned_groups_flat",
    masters_key="fp32_flat_groups",
    optimizer_key="optimizer_state_dict",
    shapes=("fp16_groups",),
    attributes=(*_ATTRIBUTES, "_leaf_module_hooks", "parameter_offload"),
    methods=(
        *(*_METHODS, "initialize_ds_offload", "_partition_all_parameters"),
        "offload_states",  # of stages 1 and 2 in later releases than 0.16.9 only
        # What deepspeed.utils.safe_* call, at a parameter's _z3_optimizer
        *("get_full_hp_param", "set_full_hp_param", "get_local_fp32_param", "set_local_hp_param"),
        *("get_fp32_grad_for_param", "set_fp32_grad_for_param", "get_local_fp32_grad_for_param"),
        *("set_local_grad_for_param", "update_fp32_grad_for_param_vectorized", "get_hp_param_device"),
    ),
)

LINKED = ("get_full_hp_param", "set_full_hp_param", "get_full_hp_grad", "set_full_hp_grad")
"""Methods that ZeRO-1 and 2 bind to each parameter that they train, and that `deepspeed.utils.safe_*` call."""
OPTIMIZER = "_z3_optimizer"
"""Attribute of a ZeRO-3 parameter, at which ``safe_*`` ask."""
MAPPING, FRAGMENT = "_hp_mapping", "hp_fragment"
"""Attribute of such a parameter, by which ``safe_*`` know it: None, or an object with a view of the master."""

CARRIED = (
    "loss_scaler",
    "dynamic_loss_scale",
    "custom_loss_scaler",
    "external_loss_scale",
    "overflow",
    "_global_grad_norm",
    "_backward_hook_state",  # holds what the engine registered
    "_grad_acc_post_hooks",  # the same in 0.18.4
    "_is_gradient_accumulation_boundary",
)
"""Attributes that are kept when the optimizer is constructed again: the loss scale, and what the engine has put in or
will read."""

ENGINE_BOUNDARY = "_is_gradient_accumulation_boundary"
"""Attribute of the engine: whether the caller says that the micro-batch ends a step; None where the engine counts."""

ENGINE_HOOKS = ("module_forward_pre_hook", "module_forward_post_hook")
"""Attributes of the engine: handles of its hooks on the model, which its `destroy` leaves on."""

ENGINE_EXPORTS = ("module_state_dict", "_zero3_consolidated_16bit_state_dict")
"""Methods of the engine that return the model's weights, without frozen ones if the caller says so."""

ENGINE_WRITER, ENGINE_SCRIPT = "checkpoint_engine", "_copy_recovery_script"
"""Members of the engine: the object whose `save` writes a file, and the method that puts a script beside the files."""

STATES_KEY = "optimizer_state_dict"
"""Key of the ZeRO state in a rank's file of a checkpoint."""

PARAMETER = ("ds_id", "ds_numel", "ds_shape", "ds_tensor")
"""Attributes of a ZeRO-3 parameter: its flat shard, and the size of the whole."""


SECONDARY = "ds_secondary_tensor"
"""Attribute of a ZeRO-3 parameter: with ``zero_hpz_partition_size``, a copy of the weights that a few ranks gather
from; None where it is to be made again of the next gather."""


def stock_classes() -> tuple[type, type]:
    """DeepSpeed's ZeRO optimizers: that of stages 1 and 2, and that of stage 3."""
    import deepspeed.runtime.engine as engine
    import deepspeed.runtime.zero.stage3 as stage3

    return engine.DeepSpeedZeroOptimizer, stage3.DeepSpeedZeroOptimizer_Stage3


@contextmanager
def zero_optimizers_from(make: Callable[[type, dict[str, Any]], Any]) -> Iterator[None]:
    """While it lasts, an engine that DeepSpeed constructs takes its ZeRO optimizer from ``make``.

    There is no public hook. The engine calls a stock class by its name in a module, so these names are exchanged.
    ``make`` is called with the stock class and the arguments that the engine has for it, by name.
    """
    import deepspeed.runtime.engine as engine
    import deepspeed.runtime.zero.stage3 as stage3

    with suppress(ImportError):  # older releases lack it; the engine imports it, and it derives a class from stage 3's
        import deepspeed.runtime.superoffload.superoffload_stage3  # noqa: F401

    def called(stock: type, *args: Any, **kwargs: Any) -> Any:
        return make(stock, inspect.signature(stock).bind(*args, **kwargs).arguments)

    stock12, stock3 = stock_classes()
    engine.DeepSpeedZeroOptimizer = partial(called, stock12)  # type: ignore[misc]
    stage3.DeepSpeedZeroOptimizer_Stage3 = partial(called, stock3)  # type: ignore[misc]
    try:
        yield
    finally:
        engine.DeepSpeedZeroOptimizer, stage3.DeepSpeedZeroOptimizer_Stage3 = stock12, stock3


def comm_dtype_of(param: Any) -> Any:
    """The dtype in which `torch_autocast` has DeepSpeed reduce a parameter's gradient; None where it says nothing.

    Releases before 0.17 have no such module. Checked on 0.16.9 and 0.19.8.
    """
    try:
        from deepspeed.runtime.torch_autocast import get_comm_dtype, has_comm_dtype
    except ImportError:
        return None
    return get_comm_dtype(param) if has_comm_dtype(param) else None


def refused_states() -> type[Exception]:
    """The class of the error by which an engine refuses states that another number of ranks has saved.

    Checked on 0.16.9 and 0.19.8.
    """
    from deepspeed.runtime.zero.utils import ZeRORuntimeException

    return ZeRORuntimeException


def deepspeed_version() -> str:
    from importlib.metadata import version

    return version("deepspeed")


def check_classes(stage12: type, stage3: type, version: str) -> None:
    """Refuses, before anything is built, a release that failed the tests or whose classes lack a name of the tables.

    Raises:
        GrassError: names the release and what it lacks.
    """
    from packaging.specifiers import SpecifierSet  # DeepSpeed depends on it

    if not any(SpecifierSet(fine).contains(version, prereleases=True) for fine in (SUPPORTED, ONLY_STAGE_3)):
        raise GrassError(f"DeepSpeed {version} is not supported; {_advice()}")
    for cls, names in ((stage12, STAGE_1_AND_2), (stage3, STAGE_3)):
        if missing := [name for name in names.methods if not hasattr(cls, name)]:
            raise _unknown(version, cls, missing)


def check_reduction(stage: int, version: str, *, on_cpu: bool) -> None:
    """Refuses a release that is wrong at this stage, or does not reduce gradients on this device.

    Raises:
        GrassError: names the release and the ways out.
    """
    from packaging.specifiers import SpecifierSet

    if stage < 3 and SpecifierSet(ONLY_STAGE_3).contains(version, prereleases=True):
        raise GrassError(
            f"DeepSpeed {version} is not supported at ZeRO stage {stage}, where the releases before 0.19.7 that were "
            "tested lose gradients of micro-batches or scale them twice: install DeepSpeed 0.19.8 or later, or set "
            '"stage": 3.'
        )
    if on_cpu and stage < 3 and SpecifierSet(DROPS_ON_CPU).contains(version, prereleases=True):
        raise GrassError(
            f"DeepSpeed {version} does not add up the ranks' gradients on a CPU at ZeRO stage {stage}, so each rank "
            'would train a model of its own: install DeepSpeed 0.19.8 or later, or set "stage": 3.'
        )


def check_instance(zero: Any, names: Names, groups: int) -> None:
    """Checks an object for its attributes of the tables, and that it has one flat partition a group.

    Raises:
        GrassError: names the release and what it lacks.
    """
    wanted = (*names.attributes, names.masters, *names.shapes)
    if missing := [name for name in wanted if not hasattr(zero, name)]:
        raise _unknown(deepspeed_version(), type(zero), missing)
    if len(getattr(zero, names.masters)) != groups:
        raise _unknown(deepspeed_version(), type(zero), [f"{names.masters} with one partition a parameter group"])


def check_linked(param: Any) -> None:
    """Checks a parameter that ZeRO-1 or 2 trains for the attributes that DeepSpeed gives it.

    Raises:
        GrassError: names the release and what it lacks.
    """
    mapping = getattr(param, MAPPING, None)
    missing = [name for name in (*LINKED, MAPPING) if not hasattr(param, name)]
    if missing or not (mapping is None or hasattr(mapping, FRAGMENT)):
        raise _unknown(deepspeed_version(), type(param), missing or [f"{MAPPING}.{FRAGMENT}"])


def check_state(state: dict[str, Any], names: Names) -> None:
    """Checks a state_dict for the keys of the tables.

    Raises:
        GrassError: names the release and what it lacks.
    """
    if missing := [key for key in (names.masters_key, names.optimizer_key) if key not in state]:
        raise GrassError(f"The ZeRO state of DeepSpeed {deepspeed_version()} has no {', '.join(missing)}; {_advice()}")


def _unknown(version: str, cls: type, missing: list[str]) -> GrassError:
    return GrassError(f"DeepSpeed {version}: {cls.__name__} has no {', '.join(missing)}; {_advice()}")


def _advice() -> str:
    return f"grass_dist works with DeepSpeed {SUPPORTED}: install one of those."
