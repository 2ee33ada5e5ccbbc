"""What torch's autograd tells of a backward that runs now.

Not documented: ``torch.autograd.Variable._execution_engine.queue_callback``, which DDP and FSDP use as well, and
``torch._C._current_graph_task_id``. Checked on torch 2.13; `tests/test_private_interfaces.py` fails when they
change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_variable: Any = torch.autograd.Variable
_autograd: Any = torch._C


def in_backward() -> bool:
    """Whether this thread runs a backward: in a hook, or in a forward that activation checkpointing runs again."""
    return _autograd._current_graph_task_id() != -1


def at_end_of_backward(call: Callable[[], None]) -> None:
    """Calls ``call`` when the backward that runs now has ended; not if an exception ends it.

    A backward within another one, as reentrant checkpointing has it, ends by itself.
    """
    _variable._execution_engine.queue_callback(call)
