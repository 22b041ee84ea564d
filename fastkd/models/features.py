"""`with_features`: any network made to return `Outputs`."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx, nn

from fastkd._core.extras import require
from fastkd._core.messages import guess
from fastkd.models.base import Network, Outputs
from fastkd.models.watched import Watched

_IN_PLACE_OPERATORS = {operator.iadd, operator.isub, operator.imul, operator.itruediv}


def with_features(model: nn.Module, layer_names: Sequence[str] | None = None) -> nn.Module:
    """A module that runs `model` and returns `Outputs(logits, features, maps)` instead of logits.

    model        any network that returns logits [B, C]
    layer_names  layers (`model.named_modules()`) or nodes of torchvision's feature extraction to watch. A 4-d output
                 [B, c, h, w] becomes a map, maps in the order given; a 2-d output [B, D] becomes the features (the
                 last such, if there are several). Without a 2-d output the features are the last map's mean
                 over its pixels. None: what a network of `create` knows of itself.

    The result shares parameters, buffers and their names with `model`: a state dict of one loads into
    the other, and moving or training one is moving or training the other. Its copy.deepcopy copies both.

    Source: torchvision.models.feature_extraction, which traces with torch.fx. A network that cannot be traced (its
    forward branches on values, as that of many transformers) is run as it is and its modules are watched by hooks: its
    layer_names are names of modules. Raises ValueError for an unknown layer (with the nearest names) and where
    layer_names is needed.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    >>> output = fastkd.models.with_features(model, ["1"])(torch.zeros(2, 4))
    >>> output.logits.shape, output.features.shape
    (torch.Size([2, 3]), torch.Size([2, 5]))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"with_features: model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, WithFeatures):
        model = model.source
    if layer_names is None and not isinstance(model, Network):
        layer_names = getattr(model, "feature_layers", None)
        if layer_names is None:
            raise ValueError(
                f"with_features: layer_names is needed for {type(model).__name__}; choose of its layers "
                f"{', '.join(name for name, _ in model.named_children()) or '(none)'} or their parts"
            )
    if isinstance(layer_names, str):
        raise TypeError(f"with_features: layer_names must be a list of names, got the string {layer_names!r}")
    if layer_names is not None and not layer_names:
        raise ValueError("with_features: layer_names is empty; name one layer or more")
    return WithFeatures(model, layer_names)


class WithFeatures(nn.Module):
    """What `with_features` returns: a second module over the same parameters, with another forward."""

    def __init__(self, model: nn.Module, layer_names: Sequence[str] | None):
        super().__init__()
        self.layer_names = None if layer_names is None else list(layer_names)
        run: Callable[..., Any]
        if self.layer_names is not None:
            run = _with_layers(model, self.layer_names)
        else:
            assert isinstance(model, Network)
            run = model.forward_features
        # In a tuple, so that they are not submodules: their parameters would appear a second time under other names.
        self._private = (model, run)
        _share_state(self, model)
        self.training = model.training

    @property
    def source(self) -> nn.Module:
        """The network that this module was made of."""
        return self._private[0]

    def forward(self, *args: Any, **kwargs: Any) -> Outputs:
        """Logits, features and maps of what the model makes of these arguments."""
        outputs: Outputs = self._private[1](*args, **kwargs)
        return outputs

    def train(self, mode: bool = True) -> "WithFeatures":
        """Sets the mode here and in the model."""
        model, run = self._private
        model.training = mode
        if isinstance(run, nn.Module):
            run.train(mode)  # changes to the graph of this mode
        return super().train(mode)

    def __reduce__(self) -> tuple[Any, ...]:  # copy and pickle: a graph over the copied network, not a copied graph
        return with_features, (self.source, self.layer_names)


def _share_state(module: nn.Module, owner: nn.Module) -> None:
    # The dictionaries themselves, not copies: what either module replaces is replaced in both.
    module._parameters = owner._parameters
    module._buffers = owner._buffers
    module._modules = owner._modules
    module._non_persistent_buffers_set = owner._non_persistent_buffers_set


def _with_layers(model: nn.Module, layer_names: list[str]) -> Callable[..., Outputs]:
    """What runs the model and returns `Outputs` of these layers: a traced graph, or the model with hooks."""
    tools = require("torchvision.models.feature_extraction", "with_features")
    modes = {module: module.training for module in model.modules()}
    try:
        nodes = tools.get_graph_node_names(model, suppress_diff_warning=True)  # of train and of eval mode
    except Exception:  # fx.proxy.TraceError, or whatever a forward raises when it is handed proxies
        modules = [name for name, _ in model.named_modules() if name]
        for name in layer_names:
            if name not in modules:
                raise _unknown(model, name, modules, ", which torch.fx cannot trace,") from None
        return Watched(model, layer_names, _collect)
    finally:
        _restore(modes)
    extractor: Callable[..., Outputs] = _extractor(model, layer_names, tools, nodes)
    return extractor


def _restore(modes: dict[nn.Module, bool]) -> None:
    for module, mode in modes.items():  # tracing sets all modules to the root's mode
        module.training = mode


def _extractor(model: nn.Module, layer_names: list[str], tools: Any, nodes: Sequence[list[str]]) -> Any:
    modes = {module: module.training for module in model.modules()}
    try:
        watched = [_resolve(model, layer_names, names) for names in nodes]
        extractor: Any = tools.create_feature_extractor(
            model,
            train_return_nodes={name: name for name in (*watched[0], nodes[0][-1])},
            eval_return_nodes={name: name for name in (*watched[1], nodes[1][-1])},
            suppress_diff_warning=True,
        )
    finally:
        _restore(modes)
    for graph, layers, names in zip((extractor.train_graph, extractor.eval_graph), watched, nodes, strict=True):
        _return_outputs(model, graph, layers, names[-1])
    extractor.graph = extractor.train_graph if model.training else extractor.eval_graph  # compiles it anew
    extractor.training = model.training
    _share_state(extractor, model)
    return extractor


def _resolve(model: nn.Module, layer_names: list[str], nodes: list[str]) -> list[str]:
    """The last node of each named layer."""
    found = []
    for name in layer_names:
        inside = [node for node in nodes if node == name or node.startswith(f"{name}.")]
        if not inside:
            modules = [name for name, _ in model.named_modules() if name]
            raise _unknown(model, name, list(dict.fromkeys(modules + nodes)))
        found.append(inside[-1])
    return found


def _unknown(model: nn.Module, name: str, known: list[str], what: str = "") -> ValueError:
    near = guess(str(name), known, most=3, cutoff=0.5).rstrip() or f"it has {', '.join(known[:12]) or 'none'}, ..."
    return ValueError(f"with_features: {type(model).__name__}{what} runs no layer {name!r}; {near}")


def _return_outputs(model: nn.Module, graph: fx.Graph, layers: list[str], logits: str) -> None:
    """Lets a graph that returns {name: value} return `Outputs`."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    values = dict(output.args[0])
    for name, node in values.items():
        if any(_works_in_place(model, node, user) for user in node.users):
            with graph.inserting_after(node):
                values[name] = graph.call_method("clone", (node,))
    with graph.inserting_before(output):
        output.args = (graph.call_function(_collect, (values[logits], tuple(values[name] for name in layers))),)
    graph.lint()


def _works_in_place(model: nn.Module, node: fx.Node, user: fx.Node) -> bool:
    if not user.args or user.args[0] is not node:
        return False
    if user.op == "call_module":
        return bool(getattr(model.get_submodule(str(user.target)), "inplace", False))
    if user.op == "call_method":
        return str(user.target).endswith("_") and not str(user.target).endswith("__")
    return user.target in _IN_PLACE_OPERATORS or bool(user.kwargs.get("inplace", False))


def _collect(logits: Tensor, values: Sequence[Tensor]) -> Outputs:
    maps = tuple(value for value in values if value.ndim == 4)
    flat = [value for value in values if value.ndim == 2]
    if len(maps) + len(flat) < len(values):
        shapes = ", ".join(str(list(value.shape)) for value in values)
        raise ValueError(
            f"with_features: layers must give [B, c, h, w] or [B, D], got shapes {shapes}; name other layers"
        )
    features = flat[-1] if flat else maps[-1].mean(dim=(2, 3))
    return Outputs(logits, features, maps or None)
