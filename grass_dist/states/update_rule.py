"""What an optimizer class does to parameters, judged by steps of its own on small stand-ins before anything trains."""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from grass_dist.errors import ConfigError
from grass_dist.model.groups import hyperparameters, shortly
from grass_dist.ranks import describe_error
from grass_dist.states.exceptions import take_exceptions
from grass_dist.states.refused import check_class, refusal

ELEMENTWISE = frozenset(
    getattr(torch.optim, name)
    for name in ["Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"]
)
"""Update rules of torch that treat each entry by itself, and so give the same on a shard as on the whole."""

HOW = frozenset(("capturable", "differentiable", "foreach", "fused"))
"""Entries of a parameter group that say how an optimizer computes, not what: a run keeps its own."""

LOW = (torch.bfloat16, torch.float16)
"""Dtypes of weights that are updated through an fp32 master."""

_SCALES = (1.0, 1.0, 1.0, 1e-3, 1e3, 1e3)
"""Sizes of the gradients of a trial, step by step: a rule may clip what is large, or begin when it is."""
_LONGEST = 144
"""Entries of a stand-in along a dimension, at most: some rules treat matrices of 128 rows and more differently."""
_LARGEST = 1 << 18
_TWO_BLOCKS, _ROWS = 1 << 15, 128
"""Entries and rows of the stand-ins that are cut into halves: quantised states have blocks of some hundred entries, and
only where there are some thousand."""
_RATES = (1e-4, 10.0)
"""A step size outside of this range is replaced in a trial: its updates may be lost in rounding, or overflow."""


def step_unseen(optimizer: torch.optim.Optimizer) -> None:
    """A step of an optimizer that the user does not know of: hooks on the steps of all optimizers do not see it.

    Those of `torch.optim.optimizer.register_optimizer_step_pre_hook` and ``..._post_hook`` see the user's one
    optimizer, once a step.

    Not documented: the first optimizer of a class puts a wrapper that calls the hooks around the class's ``step``
    (`Optimizer.profile_hook_step`), with the attribute ``hooked`` and, by `functools.wraps`, ``__wrapped__``. Checked
    on torch 2.13; `tests/test_private_interfaces.py` fails when it changes.
    """
    step = type(optimizer).step
    own = getattr(step, "__wrapped__", step) if getattr(step, "hooked", False) else step
    with torch.profiler.record_function(f"Optimizer.step#{type(optimizer).__name__}.step"):
        own(optimizer)


def keeps_subclasses(optimizer_class: type[torch.optim.Optimizer]) -> bool:
    """Whether it is a class of torchao, whose quantised states are subclasses of tensors.

    It compiles its update for each shape, which would make a trial long. It updates blocks of neighbouring entries.
    """
    return optimizer_class.__module__.startswith("torchao.optim.")


@dataclass(frozen=True, slots=True)
class UpdateRule:
    """What has been found out about an optimizer class.

    Attributes:
        elementwise: each entry of a parameter is updated by itself, so that a shard is updated as the whole would be.
        blockwise: runs of neighbouring entries are updated by themselves, as quantised states are. A rank may update
            its shard as a plain tensor then, but where the runs begin depends on the number of ranks.
        kept: keys of a parameter group that the class itself writes in its steps, such as a step count. A class may
            write one after more steps than a trial takes: then it is added.
        initial: the hyperparameters of each of the user's groups before the first step.
    """

    elementwise: bool
    kept: set[str] = field(default_factory=set)
    initial: Sequence[Mapping[str, Any]] = ()
    blockwise: bool = False


def known_rule(optimizer_class: type[torch.optim.Optimizer]) -> UpdateRule:
    """What is known of a class without a trial."""
    return UpdateRule(optimizer_class in ELEMENTWISE)


def rounds_by_place(groups: Sequence[Mapping[str, Any]], device: torch.device) -> bool:
    """Whether an update rounds an entry in a way that depends on its place in the tensor.

    The fused kernels of the CPU do: they compute the last entries, which do not fill a vector of the processor, with
    other instructions. Seen on torch 2.13 for Adam, AdamW, and SGD with momentum.
    """
    return device.type == "cpu" and any(group.get("fused") for group in groups)


def class_and_arguments(
    given: Any, optimizer_kwargs: Mapping[str, Any] | None
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The optimizer class and its arguments, from a class, its name in `torch.optim`, or a `functools.partial` of it.

    Raises:
        ConfigError: it is something else, or the arguments are no mapping.
    """
    if optimizer_kwargs is not None and not isinstance(optimizer_kwargs, Mapping):
        problem = "it is no mapping of arguments"
        raise ConfigError("optimizer_kwargs", shortly(optimizer_kwargs), problem, 'write {"lr": 1e-5}, for example')
    kwargs = dict(optimizer_kwargs or {})
    found: Any = given
    while isinstance(found, functools.partial):
        if found.args:
            problem = "a partial with arguments that have no name would take the first of them for the parameters"
            raise ConfigError("optimizer_class", repr(given)[:80], problem, "pass them by name")
        found, kwargs = found.func, {**found.keywords, **kwargs}
    if isinstance(found, str):
        names = [name for name, kind in vars(torch.optim).items() if _is_optimizer(kind)]
        if found not in names:
            near = [name for name in names if name.lower() == found.lower()]
            near += difflib.get_close_matches(found, names, n=1, cutoff=0.5)
            fix = f"did you mean {near[0]!r}" if near else "pass a class, or the name of one of torch's, like 'AdamW'"
            raise ConfigError("optimizer_class", found, "torch.optim has no optimizer of that name", fix)
        found = getattr(torch.optim, found)
    if not _is_optimizer(found):
        problem = "it is no class of optimizers"
        fix = "pass a class such as torch.optim.AdamW, a functools.partial of one, or its name in torch.optim"
        raise ConfigError("optimizer_class", shortly(given), problem, fix)
    return found, kwargs


def _is_optimizer(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer


def judge_class(
    optimizer_class: type[torch.optim.Optimizer], kwargs: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
) -> UpdateRule:
    """Finds out whether a class may update shards, and what it keeps in its parameter groups.

    A class of which that is not known takes a few steps on stand-ins in host memory, whose shapes are those of the
    largest parameters, or cut from them. Nothing is drawn from torch's generators.

    Args:
        groups: the user's, with all hyperparameters.

    Raises:
        ConfigError: the update of a parameter depends on other parameters, so that an optimizer for each layer would be
            another optimizer than one for all; or the class cannot take a step by itself.
    """
    if optimizer_class in ELEMENTWISE:
        return known_rule(optimizer_class)
    check_class(optimizer_class)
    if keeps_subclasses(optimizer_class):
        return UpdateRule(False, set(), [_copied(hyperparameters(group)) for group in groups], blockwise=True)
    _refuse_closure(optimizer_class)
    elementwise, blockwise, kept = True, True, set[str]()
    tried: list[tuple[dict[str, Any], list[Any]]] = []
    for group in groups:
        own, likes = hyperparameters(group), _largest(group["params"])
        if likes and not any(same(own, other) and shapes == likes for other, shapes in tried):
            tried.append((own, likes))
            trial = _first_that_steps(optimizer_class, kwargs, own, likes, group["params"][0].device)
            _refuse_mixing(optimizer_class, trial)
            itself = trial.is_elementwise()
            elementwise = elementwise and itself
            blockwise = blockwise and (itself or _is_blockwise(optimizer_class, kwargs, own))
            kept |= trial.kept()
    refuse_own_rate(optimizer_class, kept)
    initial = [_copied(hyperparameters(group)) for group in groups]
    return UpdateRule(elementwise, kept, initial, blockwise and not elementwise)


def _is_blockwise(
    optimizer_class: type[torch.optim.Optimizer], kwargs: Mapping[str, Any], group: Mapping[str, Any]
) -> bool:
    """Whether the halves of large stand-ins become what the whole becomes, though odd pieces do not."""
    likes = [((_TWO_BLOCKS,), torch.float32), ((2 * _ROWS, _TWO_BLOCKS // (2 * _ROWS)), torch.float32)]
    try:
        return _Trial(optimizer_class, kwargs, group, likes, torch.device("cpu"), sparse=False).is_blockwise()
    except Exception:  # whatever a class raises that takes matrices alone, for example
        return False


def refuse_own_rate(optimizer_class: type[torch.optim.Optimizer], kept: Collection[str]) -> None:
    """
    Raises:
        ConfigError: the class writes its step size, which is the user's and the schedulers' to write.
    """
    if "lr" in kept:
        raise refusal(optimizer_class, "it writes its step size 'lr' itself, which schedulers write too")


def set_training(optimizer: torch.optim.Optimizer, *, training: bool) -> None:
    """Calls ``train()`` or ``eval()`` of an optimizer whose class has them, as those without a schedule do."""
    change = getattr(optimizer, "train" if training else "eval", None)
    if callable(change):
        change()


def has_modes(optimizer_class: type[torch.optim.Optimizer]) -> bool:
    """Whether a class keeps other weights for training than for evaluation."""
    return all(callable(getattr(optimizer_class, name, None)) for name in ("train", "eval"))


def _refuse_closure(optimizer_class: type[torch.optim.Optimizer]) -> None:
    asked = list(inspect.signature(optimizer_class.step).parameters.values())[1:]
    if any(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in asked):
        raise refusal(
            optimizer_class,
            "its step() needs a closure that computes the loss again, and layers are updated one after the other",
        )


def _refuse_mixing(optimizer_class: type[torch.optim.Optimizer], trial: _Trial) -> None:
    if trial.mixes():
        raise refusal(
            optimizer_class,
            "its update of a parameter depends on the other parameters of the optimizer, and here each layer has an "
            "optimizer of its own",
        )


def _largest(params: Sequence[torch.Tensor]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of a stand-in for the largest parameter of each number of dimensions and each dtype."""
    found: dict[tuple[int, torch.dtype], tuple[int, ...]] = {}
    for param in params:
        if not param.requires_grad:
            continue
        key = param.ndim, torch.float32 if param.dtype in LOW else param.dtype
        found[key] = max(found.get(key, (0,) * param.ndim), tuple(param.shape), key=math.prod)
    return [(_cut(shape), dtype) for (_, dtype), shape in found.items()]


def _cut(shape: tuple[int, ...]) -> tuple[int, ...]:
    longest = _LONGEST
    while math.prod(min(size, longest) for size in shape) > _LARGEST:
        longest //= 2
    return tuple(min(size, longest) for size in shape)


def _first_that_steps(
    optimizer_class: type[torch.optim.Optimizer],
    kwargs: Mapping[str, Any],
    group: Mapping[str, Any],
    likes: Sequence[tuple[tuple[int, ...], torch.dtype]],
    device: torch.device,
) -> _Trial:
    """A trial that the class can take: in host memory, on the parameters' device if it has kernels for that alone, or
    with sparse gradients if it takes no other (`torch.optim.SparseAdam`).

    Raises:
        ConfigError: the class can take a step with neither.
    """
    host = torch.device("cpu")
    problems = []
    for where, sparse in dict.fromkeys([(host, False), (device, False), (host, True)]):
        trial = _Trial(optimizer_class, kwargs, group, likes, where, sparse=sparse)
        try:
            trial.alone()
        except Exception as error:  # whatever a class raises
            problems.append(error)
        else:
            return trial
    raise refusal(
        optimizer_class, f"it cannot take a step on stand-ins of the parameters ({describe_error(problems[0])})"
    ) from problems[0]


@dataclass(frozen=True)
class _Outcome:
    """What steps have left."""

    values: list[torch.Tensor]  # of each parameter, after each step: (steps, *shape)
    states: list[dict[str, Any]]  # of each parameter, in the end
    groups: list[dict[str, Any]]  # hyperparameters after each step
    random: bool  # whether numbers were drawn from torch's generator


class _Trial:
    """Steps of an optimizer class on stand-ins, all with the same hyperparameters.

    Values and gradients are uneven, and the gradients of two steps are alike, as they are in training: some rules do
    nothing special before gradients agree.
    """

    def __init__(
        self,
        optimizer_class: type[torch.optim.Optimizer],
        kwargs: Mapping[str, Any],
        group: Mapping[str, Any],
        likes: Sequence[tuple[tuple[int, ...], torch.dtype]],
        device: torch.device,
        *,
        sparse: bool,
    ) -> None:
        on_host = device.type == "cpu"
        plain = {key: False for key in HOW if key in group and on_host}
        self._class, self._sparse = optimizer_class, sparse
        self._kwargs = {**kwargs, **{key: False for key in plain if key in kwargs}}
        self._group = {**group, **plain}
        rate = group.get("lr")
        if isinstance(rate, float | int | torch.Tensor) and not _RATES[0] <= float(rate) <= _RATES[1]:
            self._group["lr"] = torch.full_like(rate, 0.01) if torch.is_tensor(rate) else 0.01
        generator = torch.Generator(device="cpu").manual_seed(0)
        # Two of each shape: a rule may treat parameters of different shapes apart.
        twice = [like for like in likes for _ in range(2)]
        self._values = [(self._uneven(generator, *like) * 0.3).to(device) for like in twice]
        self._gradients = []
        for like in twice:
            first = self._uneven(generator, *like)
            later = [(first + 0.5 * self._uneven(generator, *like)) * scale for scale in _SCALES]
            self._gradients.append([gradient.to(device) for gradient in later])
        self._alone: list[_Outcome] | None = None

    @staticmethod
    def _uneven(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") for _ in range(2)]
        return (drawn[0] * drawn[1].exp()).to(dtype)

    def alone(self) -> list[_Outcome]:
        """Each stand-in with an optimizer of its own."""
        if self._alone is None:
            self._alone = [self._steps([v], [g]) for v, g in zip(self._values, self._gradients, strict=True)]
        return self._alone

    def mixes(self) -> bool:
        """Whether an optimizer over all stand-ins leaves anything else than one for each of them.

        A rule that draws random numbers draws others for each stand-in, so that its group alone tells.
        """
        together, alone = self._steps(self._values, self._gradients), self.alone()
        if not all(same(together.groups, own.groups) for own in alone):
            return True
        if together.random:
            return False
        return not (
            same(together.values, [own.values[0] for own in alone])
            and same(together.states, [own.states[0] for own in alone])
        )

    def kept(self) -> set[str]:
        """Keys of the group that steps have changed or added."""
        steps = self.alone()[0].groups
        return {k for after in steps for k, v in after.items() if k not in self._group or not same(v, self._group[k])}

    def is_elementwise(self) -> bool:
        """Whether pieces of a stand-in with an optimizer each become, to the bit, what the whole has become."""
        if self._sparse:
            return False
        for value, gradients, whole in zip(self._values, self._gradients, self.alone(), strict=True):
            for cut in _cuts(value):
                try:
                    pieces = [
                        self._steps([piece], [list(own)])
                        for piece, *own in zip(cut(value), *map(cut, gradients), strict=True)
                    ]
                except Exception:  # it does not take such a shape
                    return False
                if not _joined(pieces, whole):
                    return False
        return True

    def is_blockwise(self) -> bool:
        """Whether the halves of a stand-in with an optimizer each become, to the bit, what the whole has become."""
        for value, gradients, whole in zip(self._values, self._gradients, self.alone(), strict=True):
            if whole.random:
                return False
            halves = zip(value.chunk(2), *(own.chunk(2) for own in gradients), strict=True)
            made = [self._steps([half], [list(own)]) for half, *own in halves]
            if not same(torch.cat([half.values[0] for half in made], dim=1), whole.values[0]):
                return False
        return True

    @torch.no_grad()
    def _steps(self, values: Sequence[torch.Tensor], gradients: Sequence[Sequence[torch.Tensor]]) -> _Outcome:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # rules that draw noise draw the same in each trial
            before = torch.get_rng_state()
            params = [nn.Parameter(value.clone()) for value in values]
            optimizer = self._class([{**_copied(self._group), "params": params}], **_copied(self._kwargs))
            take_exceptions(optimizer, [])
            set_training(optimizer, training=True)
            seen, groups = [], []
            for step in range(len(_SCALES)):
                for param, own in zip(params, gradients, strict=True):
                    param.grad = own[step].to_sparse(min(1, param.ndim)) if self._sparse else own[step].clone()
                step_unseen(optimizer)
                seen.append([param.detach().clone() for param in params])
                groups.append(_copied(hyperparameters(optimizer.param_groups[0])))
            values = [torch.stack(own) for own in zip(*seen, strict=True)]
            states = [dict(optimizer.state.get(param, {})) for param in params]
            return _Outcome(values, states, groups, random=not torch.equal(before, torch.get_rng_state()))


Cut = Callable[[torch.Tensor], Sequence[torch.Tensor]]


def _cuts(value: torch.Tensor) -> Iterator[Cut]:
    """The ways in which shards are cut: by rows, flat at an odd position, and into all and nothing."""
    if value.ndim == 0:
        return
    rows, flat = 1 + value.shape[0] // 3, 1 + value.numel() // 6 * 2
    if rows < value.shape[0]:
        yield lambda tensor: [tensor[:rows], tensor[rows:]]
    if flat < value.numel():
        yield lambda tensor: [tensor.reshape(-1)[:flat], tensor.reshape(-1)[flat:]]
    yield lambda tensor: [tensor, tensor[:0]]


def _joined(pieces: Sequence[_Outcome], whole: _Outcome) -> bool:
    """Whether the pieces of a parameter, one after the other, are the whole one, and so are their states."""
    (value,), (state,) = whole.values, whole.states
    if whole.random:
        return False
    if not same(torch.cat([piece.values[0].flatten(1) for piece in pieces], dim=1), value.flatten(1)):
        return False
    pieces = [piece for piece in pieces if piece.values[0].numel()]  # nothing needs no state
    if not all(piece.states[0].keys() == state.keys() and same(piece.groups, whole.groups) for piece in pieces):
        return False
    for key, entry in state.items():
        parts = [piece.states[0][key] for piece in pieces]
        if torch.is_tensor(entry) and entry.numel() > 1:
            if entry.shape != value[0].shape or not all(
                torch.is_tensor(part) and part.shape == piece.values[0][0].shape
                for part, piece in zip(parts, pieces, strict=True)
            ):
                return False
            if not same(torch.cat([part.reshape(-1) for part in parts]), entry.reshape(-1)):
                return False
        elif not all(same(part, entry) for part in parts):
            return False
    return True


def same(a: Any, b: Any) -> bool:
    """Says whether two values are equal to the bit, tensors and containers of them too; NaN equals NaN."""
    if a is b:
        return True
    if torch.is_tensor(a) and torch.is_tensor(b):
        if a.shape != b.shape or a.dtype != b.dtype or a.layout != b.layout:
            return False
        if a.layout != torch.strided:
            return same(a.to_dense(), b.to_dense())
        return bool(torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))
    if torch.is_tensor(a) or torch.is_tensor(b):
        return False
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    try:
        return bool(a == b or (a != a and b != b))
    except Exception:  # of values that cannot be compared
        return False


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of arguments, as far as they can be copied: a step must not change the user's."""
    copied = {}
    for key, value in values.items():
        try:
            copied[key] = copy.deepcopy(value)
        except Exception:
            copied[key] = value
    return copied
