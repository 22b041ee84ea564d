"""A stand-in for CUDA graphs on a CPU: what it records it runs again, into memory that every replay overwrites."""

import torch

from fastkd.graphs import Graphed, Graphs


class StandIn:
    """As `fastkd.graphs.recorder.CudaRecorder`. Recording computes nothing: it gives NaN before the first replay.

    `fails` raises while something is recorded, as what a GPU does not allow there.
    """

    def __init__(self, fails: Exception | None = None):
        self.device, self.fails = torch.device("cpu"), fails
        self.pools, self.recordings = 0, []

    def pool(self):
        self.pools += 1
        return self.pools

    def join(self):
        pass

    def warm_up(self, run):
        for _ in range(3):
            run()

    def record(self, run, pool):
        if self.fails is not None:
            raise self.fails
        self.recordings.append(Recorded(run, pool))
        return self.recordings[-1]


class Recorded:
    def __init__(self, run, pool):
        self.run, self.pool, self.replays = run, pool, 0
        live = run()
        with torch.no_grad():
            self.static = [None if r is None else torch.empty_like(r).copy_(_nothing(r)) for r in live]
        self.results = self._bound(live)

    def replay(self):
        self.replays += 1
        live = self.run()
        with torch.no_grad():
            for static, result in zip(self.static, live, strict=True):
                if static is not None:
                    static.copy_(result)
        self.results = self._bound(live)

    def _bound(self, live):
        """The static memory, with the graph of what was computed into it."""
        return [
            _Bound.apply(result, static) if result is not None and result.requires_grad else static
            for result, static in zip(live, self.static, strict=True)
        ]


def _nothing(result):
    return torch.full_like(result, torch.nan if result.is_floating_point() else 0)


class _Bound(torch.autograd.Function):
    @staticmethod
    def forward(ctx, result, static):
        return static.detach()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Notes(list):
    def __call__(self, text):
        self.append(text)


def graphed(method, **options):
    """The method with all its networks from stand-ins for graphs, and the `Graphs`."""
    graphs = Graphs(torch.device("cpu"), Notes(), StandIn(**options))
    graphs.wrap(method)
    return method, graphs


def wrappers(method) -> list[Graphed]:
    learners = [method.learner(name) for name in method.learner_names]
    return [*learners, *(wrapper for pair in method._teaching.values() for wrapper in pair)]


def graphed_network(network, **options) -> tuple[Graphed, Graphs]:
    graphs = Graphs(torch.device("cpu"), Notes(), StandIn(**options))
    return Graphed(network, graphs, "net"), graphs
