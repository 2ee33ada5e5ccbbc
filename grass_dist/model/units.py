"""What trains and what must be equal on all ranks: what every front door works out before it builds its engine."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from grass_dist.config import GrassConfig, check_competing
from grass_dist.errors import UnsupportedModel
from grass_dist.model.discovery import LayerMap, Unit
from grass_dist.model.sharding import Sharding
