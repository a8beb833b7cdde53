"""Training steps captured as CUDA graphs."""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class GraphedStep:
    """A training step that is captured as a CUDA graph once and replayed: one launch instead of hundreds.

    The step must have static shapes, wait for nothing on the host, and draw its random numbers from `generators` alone.
    Its first calls run as they are, because libraries choose kernels then; they count like any other. What it returns,
    dicts of tensors, lies in the same memory at every replay.
    """

    WARMUP = 3  # calls before the capture

    def __init__(self, step: Callable[[], Any], generators: Iterable[torch.Generator]):
        self.step, self.generators = step, list(generators)
        self.device = self.generators[0].device
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls, self.stream = 0, torch.cuda.Stream(self.device)

    def __call__(self) -> Any:
        with torch.cuda.device(self.device):  # which need not be the current one
            self.calls += 1
            if self.calls <= self.WARMUP:
                return self._run_beside()
            if self.graph is None:
                self._capture()
            self.graph.replay()
            return self.output

    def _run_beside(self) -> Any:
        """The step on a stream of its own: a capture needs what autograd keeps to be of another stream."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            output = self.step()
        torch.cuda.current_stream().wait_stream(self.stream)
        return output

    def _capture(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            self.graph.register_generator_state(generator)
        with torch.cuda.graph(self.graph):
            self.output = self.step()
