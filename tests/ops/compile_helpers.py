"""What the tests under torch.compile share: a backend that keeps what it was given."""

import torch


def recording(graphs: list[str]):
    """The backend "aot_eager", which also appends each graph, and those within it, to `graphs` as text."""

    def backend(graph, example):
        modules = (m for m in graph.modules() if isinstance(m, torch.fx.GraphModule))
        graphs.extend(m.print_readable(print_output=False) for m in modules)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    return backend
