"""A network's forward as CUDA graphs: one launch in place of hundreds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from fastgen.errors import first_line

WARM = 3  # calls before a capture: libraries choose kernels and take their workspaces then


class _Captured(NamedTuple):
    graph: Any
    inputs: list[Any]
    output: Any


class Graphed:
    """Called like the forward it captures; one graph for each set of shapes, dtypes and other arguments.

    Inputs are copied into the graph's own tensors, the results out of them, so they may be kept. `spared`: told why
    when a capture fails, and the network runs as it is from then on; without it the error is raised.
    """

    def __init__(self, forward: Callable[..., Any], spared: Callable[[str], None] | None = None) -> None:
        self.forward, self.spared, self.failed = forward, spared, False
        self._graphs: dict[Any, _Captured] = {}

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if not self.failed:
            try:
                return self._replayed(arguments, options)
            except RuntimeError as error:
                if self.spared is None:
                    raise
                self.failed = True
                self.spared(first_line(error))
        return self.forward(*arguments, **options)

    def _replayed(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        leaves, spec = tree_flatten((arguments, options))
        key = signature(leaves, spec)
        if key not in self._graphs:
            self._graphs[key] = self._capture(leaves, spec)
        found = self._graphs[key]
        for own, given in zip(found.inputs, leaves, strict=True):
            if isinstance(own, Tensor):
                own.copy_(given)
        found.graph.replay()
        return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, found.output)

    def _capture(self, leaves: list[Any], spec: TreeSpec) -> _Captured:
        inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        arguments, options = tree_unflatten(inputs, spec)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM):
                self.forward(*arguments, **options)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self.forward(*arguments, **options)
        return _Captured(graph, inputs, output)


def signature(leaves: list[Any], spec: TreeSpec) -> Any:
    """What a graph is good for: two calls of one signature may share it."""
    told = [(tuple(x.shape), x.dtype, x.device) if isinstance(x, Tensor) else x for x in leaves]
    return str(spec), tuple(map(repr, told))
