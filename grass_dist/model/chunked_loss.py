"""The loss of a few tokens' logits at a time, so that those of all tokens are never in memory.

`chunk_loss` puts a `ChunkedHead` in the place of a model's output head, with its very weights. Where the model is
given ``labels``, that head returns their cross entropy instead of logits, and the model's output has it as ``loss``.
The gradients are formed in the forward, chunk by chunk, as the Liger kernels do (arXiv 2410.10989, section 3.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from grass_dist.errors import UnsupportedModel
from grass_dist.model.loss import IGNORED


def chunk_loss(model: Any) -> None:
    """Has ``model`` compute its loss chunk by chunk where it is given ``labels``, in a step of training.

    Memory beside weights and their gradients is then that of the hidden states, not of ``tokens × vocabulary``. Call it
    before the model is wrapped or sharded. It works on the model itself; its parameters and their FQNs stay as they
    are. The output's ``logits`` are None then. A call without labels, or in evaluation without ``num_items_in_batch``,
    is as before.

    Args:
        model: a causal language model of transformers whose head is a plain `torch.nn.Linear`.

    Raises:
        UnsupportedModel: it has no such head, or another loss than the next token's cross entropy.
    """
    head = _checked_head(model)
    chunked = ChunkedHead(head)
    model.set_output_embeddings(chunked)
    if model.get_output_embeddings() is not chunked:
        raise UnsupportedModel(f"{type(model).__name__} does not let its output head be replaced: leave it whole.")
    model.register_forward_pre_hook(chunked.take_labels, with_kwargs=True)
    model.register_forward_hook(chunked.hand_loss, always_call=True)


def _checked_head(model: Any) -> nn.Linear:
    name = type(model).__name__
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if type(head) is not nn.Linear:
        what = "no output head" if head is None else f"a {type(head).__name__} for its output head"
        raise UnsupportedModel(f"{name} has {what}, and the chunked loss needs a torch.nn.Linear: leave it whole.")
    loss = getattr(model, "loss_function", None)
    kind = "an encoder-decoder" if model.config.is_encoder_decoder else getattr(loss, "__name__", None)
    if kind != "ForCausalLMLoss":
        raise UnsupportedModel(
            f"{name} has another loss ({kind}) than the next token's, of which the chunked one is: leave it whole."
        )
    return head


class ChunkedHead(nn.Linear):
    """An output head that returns a loss where labels wait for it, else logits.

    Args:
        head: whose parameters it takes over.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
        self.weight, self.bias = head.weight, head.bias
        self.train(head.training)
        self._waiting: tuple[torch.Tensor, Any] | None = None
        self._given: torch.Tensor | None = None
        self._compared = False

    def take_labels(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keeps the labels from the model, which would ask for all logits. A forward pre-hook of the model."""
        self._waiting = self._given = None
        if model.get_output_embeddings() is not self:  # type: ignore[operator]
            return None  # somebody has put another head in its place, e.g. by resize_token_embeddings
        labels, targets, items = (kwargs.get(name) for name in ("labels", "shift_labels", "num_items_in_batch"))
        if targets is None and labels is not None:
            targets = F.pad(labels, (0, 1), value=IGNORED)[..., 1:]
        if targets is None or not (model.training or items is not None):
            return None
        self._waiting = targets, items
        dropped = ("labels", "shift_labels", "num_items_in_batch")
        return args, {name: value for name, value in kwargs.items() if name not in dropped}

    def hand_loss(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Gives the output the loss. A forward hook of the model, which runs after an exception too."""
        given, self._given, self._waiting = self._given, None, None
        if given is None or output is None:
            return None
        if not self._compared:
            self._check(model, output, given)
            self._compared = True
        output["loss"], output["logits"] = given, None
        return output

    def _check(self, model: nn.Module, output: Any, given: torch.Tensor) -> None:
        """Once: nothing but this head may have a say in the loss."""
        name, found = type(model).__name__, getattr(output, "logits", None)
        if not hasattr(output, "logits"):
            raise UnsupportedModel(
                f"{name} returns a tuple, in which a chunked loss has no place: use return_dict=True."
            )
        if found is not given and not _equal(found, given):
            raise UnsupportedModel(f"{name} changes its logits after the head, which a chunked loss leaves out.")
        if getattr(output, "aux_loss", None) is not None:
            raise UnsupportedModel(
                f"{name} adds a loss of its router, which a chunked loss leaves out: set output_router_logits=False."
            )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """
        Args:
            input: hidden states, shape (…, in_features).

        Returns:
            Logits, shape (…, out_features); or, where labels wait, the loss, fp32, without dimension: the mean over the
            targets, or their sum over ``num_items_in_batch``.
        """
        if self._waiting is None:
            return super().forward(input)
        (targets, items), self._waiting = self._waiting, None
        if targets.shape != input.shape[:-1]:
            raise UnsupportedModel(
                f"labels of shape {tuple(targets.shape)} do not fit hidden states of {tuple(input.shape[:-1])}, "
                "so the loss cannot be chunked: leave it whole."
            )
        if hasattr(self.weight, "device_mesh"):  # a DTensor
            raise UnsupportedModel("the output head is sharded by tensor parallelism: leave its loss whole.")
        targets = targets.to(input.device).flatten()
        summed = summed_in_chunks(input.flatten(0, -2), self.weight, self.bias, targets)
        self._given = given = summed / ((targets != IGNORED).sum() if items is None else items)
        return given


def _equal(found: torch.Tensor | None, given: torch.Tensor) -> bool:
    """By value: ZeRO-3 makes another tensor of what a module returns."""
    return found is not None and found.shape == given.shape and torch.equal(found.detach(), given.detach())


def summed_in_chunks(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor:
    """Cross entropy of ``hidden @ weight.T + bias``, summed over the targets, fp32.

    Args:
        hidden: shape (tokens, width).
        weight: shape (vocabulary, width).
        bias: shape (vocabulary,), or None.
        targets: shape (tokens,); `IGNORED` where nothing is learnt.
    """
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    with torch.autocast(kind, enabled=False):
        return _Summed.apply(hidden, weight, bias, targets)  # type: ignore[no-any-return]


def rows_of(tokens: int, width: int, vocabulary: int) -> int:
    """How many tokens a chunk has: its logits are about as large as all hidden states, in entries."""
    return max(1, min(tokens, -(-tokens * width // vocabulary)))


class _Summed(torch.autograd.Function):
    """The sum of the losses. Logits of a chunk live until its gradients are formed, in the forward."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: Any, targets: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        grads: list[torch.Tensor | None] = [
            torch.empty_like(hidden) if of_hidden else None,
            torch.zeros_like(weight) if of_weight else None,
            torch.zeros_like(bias) if of_bias else None,
        ]
        (tokens, width), vocabulary = hidden.shape, len(weight)
        rows = rows_of(tokens, width, vocabulary)
        for at in range(0, tokens, rows):
            some, goal = hidden[at : at + rows], targets[at : at + rows]
            logits = F.linear(some, weight, bias).float()
            total += F.cross_entropy(logits, goal, ignore_index=IGNORED, reduction="sum")
            if of_hidden or of_weight or of_bias:
                _add_gradients(grads, at, some, weight, _of_logits(logits, goal).to(hidden.dtype))
        ctx.grads = grads
        return total

    @staticmethod
    def backward(ctx: Any, above: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("the gradients of a chunked loss are there for one backward")
        return *(None if grad is None else grad.mul_(above) for grad in grads), None


def _of_logits(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Gradient of the summed loss: probabilities, less one at the target, in the place of fp32 logits."""
    kept = (targets != IGNORED).unsqueeze(1)
    found = torch.softmax(logits, -1, out=logits)
    found.scatter_add_(1, targets.clamp(min=0).unsqueeze(1), -torch.ones_like(found[:, :1]))
    return found.mul_(kept)


def _add_gradients(
    grads: list[torch.Tensor | None], at: int, hidden: torch.Tensor, weight: torch.Tensor, above: torch.Tensor
) -> None:
    of_hidden, of_weight, of_bias = grads
    if of_hidden is not None:
        torch.mm(above, weight, out=of_hidden[at : at + len(hidden)])
    if of_weight is not None:
        of_weight.addmm_(above.T, hidden)
    if of_bias is not None:
        of_bias += above.sum(0)
