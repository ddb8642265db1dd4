"""`torch.compile` for passes of fixed shapes, in one place.

A compiled pass holds the weights as they are when it first runs: on a CPU they are packed into the
graph (inductor's freezing), which is most of the gain for products of one to eight rows.  Weights
that are swapped for others compile anew; weights changed in place do not, so a model in training
decodes uncompiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
# Graphs kept for one function, over all pipelines of the process: capacities x views x draft
# lengths x batch sizes x samplings.  Without graph breaks one more is an error, amid a run.
GRAPHS = 1024


def compile_shapes(function: Callable[P, R]) -> Callable[P, R]:
    """Return `function` compiled anew for each shape it meets, without graph breaks.

    Asking for it sets compiler options of the whole process (passes under grad are not frozen).
    """
    import torch

    torch._dynamo.config.recompile_limit = GRAPHS
    torch._dynamo.config.accumulated_recompile_limit = 16 * GRAPHS
    torch._inductor.config.freezing = not torch.cuda.is_available()
    return torch.compile(function, dynamic=False, fullgraph=True)
