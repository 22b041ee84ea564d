"""`prepared`: a frozen copy of a network that is ready for inference, by torch's own tools."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._pytree import tree_map_only

from fastkd._core.messages import wrong_type, wrong_value
from fastkd._core.typed import like
from fastkd.models.branched import Branched
from fastkd.models.features import WithFeatures

NORM_OF: dict[type[nn.Module], type[nn.Module]]
NORM_OF = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}
Pair = tuple[Any, Any]  # a convolution and the batch normalisation of what it gives


def prepared(
    network: nn.Module,
    *,
    fold: bool = True,
    channels_last: bool = True,
    compile: bool = False,  # noqa: A002 -- the usual name
    dtype: torch.dtype | None = None,
) -> Prepared:
    """A frozen copy of `network` in eval mode that gives the same outputs, to the precision of its dtype, sooner.

    >>> network = fastkd.models.create("resnet8", 10).eval()
    >>> fast, images = fastkd.models.prepared(network), torch.randn(2, 3, 32, 32)
    >>> fast.folded, torch.allclose(fast(images), network(images), atol=1e-5)
    (9, True)

    Args:
        network: any module; it stays as it is, and what is done to it later does not reach the copy.
        fold: put each batch normalisation that follows a convolution into that one's weights, where torch.fx can trace
            the network and shows that nothing else reads what stands between them. A normalisation with a hook, one
            that keeps no running statistics and one whose convolution runs more than once stay.
        channels_last: keep convolutions' weights, and bring images [B, C, H, W], in channels-last order.
        compile: by torch.compile, at the first call.
        dtype: of weights, floating-point inputs and outputs; None leaves them.

    Returns a module that is called like `network`. It has `forward_features` where that has it, `network` (the copy),
    `folded` (how many normalisations are gone) and `left_out`: sentences on what was asked for and could not be done.

    Errors: TypeError for what is no module, or cannot be copied by copy.deepcopy; ValueError for a dtype that is not
    floating-point.

    Source: torch.fx, torch.nn.utils.fusion.fuse_conv_bn_weights (here in float64).
    """
    if not isinstance(network, nn.Module):
        raise wrong_type("prepared", "network", "an nn.Module", type(network).__name__)
    for name, switch in {"fold": fold, "channels_last": channels_last, "compile": compile}.items():
        if not isinstance(switch, bool):
            raise wrong_type("prepared", name, "True or False", type(switch).__name__)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise wrong_value("prepared", "dtype", "a floating-point torch.dtype, or None", dtype)
    twin = _frozen_copy(network)
    pairs, left_out = _foldable(twin) if fold else ([], ())
    _fold(twin, pairs)
    twin.to(dtype=dtype)
    if channels_last:
        twin.to(memory_format=torch.channels_last)
    kind = PreparedFeatures if hasattr(twin, "forward_features") else Prepared
    return kind(twin, len(pairs), left_out, channels_last=channels_last, compiled=compile, dtype=dtype)


class Prepared(nn.Module):
    """What `prepared` returns."""

    def __init__(
        self,
        network: nn.Module,
        folded: int,
        left_out: tuple[str, ...],
        *,
        channels_last: bool,
        compiled: bool,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        self.network, self.folded, self.left_out = network, folded, left_out
        self.channels_last, self.dtype = channels_last, dtype
        if compiled:
            network.compile()
        self._features = getattr(network, "forward_features", None)
        if compiled and self._features is not None:
            self._features = torch.compile(self._features)
        super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network gives, in eval mode."""
        args, kwargs = tree_map_only(Tensor, self._brought, (args, kwargs))
        return self.network(*args, **kwargs)

    def train(self, mode: bool = True) -> Prepared:
        """Nothing: the copy stays in eval mode."""
        return self

    def extra_repr(self) -> str:
        """What was done."""
        return f"folded={self.folded}, channels_last={self.channels_last}, dtype={self.dtype}"

    def _brought(self, value: Tensor) -> Tensor:
        value = value.to(self.dtype) if self.dtype is not None and value.is_floating_point() else value
        images = self.channels_last and value.dim() == 4
        return value.contiguous(memory_format=torch.channels_last) if images else value

    if TYPE_CHECKING:

        @like(forward)
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            """As `forward`."""


class PreparedFeatures(Prepared):
    """What `prepared` returns of a network that has `forward_features`."""

    def forward_features(self, *args: Any, **kwargs: Any) -> Any:
        """What the network's own gives, in eval mode."""
        args, kwargs = tree_map_only(Tensor, self._brought, (args, kwargs))
        assert self._features is not None
        return self._features(*args, **kwargs)


def _frozen_copy(network: nn.Module) -> nn.Module:
    try:
        twin = copy.deepcopy(network)
    except Exception as error:  # whatever a module's own __deepcopy__ raises
        expected = "a network that copy.deepcopy copies"
        raise wrong_type("prepared", "network", expected, f"{type(network).__name__} ({error})") from error
    return twin.requires_grad_(False).eval()


def _foldable(network: nn.Module) -> tuple[list[Pair], tuple[str, ...]]:
    """The pairs that can be folded, or why none can."""
    if not any(isinstance(module, tuple(NORM_OF.values())) for module in network.modules()):
        return [], ()
    try:
        graphs = list(_graphs(network))
    except Exception as error:  # fx.proxy.TraceError, or whatever a forward raises when it is handed proxies
        why = " ".join(str(error).split())[:200] or type(error).__name__
        return [], (f"batch normalisation is not folded: torch.fx cannot trace {type(network).__name__} ({why})",)
    return _agreed([_paired(root, graph) for root, graph in graphs]), ()


def _graphs(network: nn.Module) -> Iterator[tuple[nn.Module, fx.Graph]]:
    """All ways in which the network is run: its call and its `forward_features`."""
    if isinstance(network, WithFeatures):
        source, run = network._private
        if isinstance(run, fx.GraphModule):
            yield source, run.graph  # of eval mode, in which the network is
            for node in run.graph.nodes:  # torchvision's tracer leaves its own blocks whole
                if node.op == "call_module" and any(source.get_submodule(str(node.target)).children()):
                    yield from _graphs(source.get_submodule(str(node.target)))
            return
        if not hasattr(source, "forward_features"):
            raise TypeError("its layers are watched by hooks")
        network = source
    if isinstance(network, Branched):
        for peer in network.peers:
            yield from _graphs(peer)
        return
    for name in ("forward", "forward_features"):
        if hasattr(type(network), name):
            tracer = fx.Tracer()
            tracer.traced_func_name = name
            yield network, tracer.trace(network)


def _paired(root: nn.Module, graph: fx.Graph) -> tuple[list[Pair], set[int]]:
    """Convolutions and their normalisations in one graph, and the ids of all modules that have another part in it."""
    calls: dict[int, int] = {}
    nodes = [node for node in graph.nodes if node.op == "call_module"]
    for node in nodes:
        module = root.get_submodule(str(node.target))
        calls[id(module)] = calls.get(id(module), 0) + 1
    pairs = []
    for node in nodes:
        source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if isinstance(source, fx.Node) and source.op == "call_module" and list(source.users) == [node]:
            pair = root.get_submodule(str(source.target)), root.get_submodule(str(node.target))
            if _fits(*pair) and all(calls[id(module)] == 1 for module in pair):
                pairs.append(pair)
    read = {id(root.get_submodule(str(n.target).rpartition(".")[0])) for n in graph.nodes if n.op == "get_attr"}
    return pairs, (set(calls) - {id(module) for pair in pairs for module in pair}) | read


def _fits(conv: nn.Module, norm: nn.Module) -> bool:
    if NORM_OF.get(type(conv)) is not type(norm) or getattr(norm, "running_var", None) is None:
        return False
    return not any(m._forward_hooks or m._forward_pre_hooks for m in (conv, norm))  # that see what folding changes


def _agreed(found: list[tuple[list[Pair], set[int]]]) -> list[Pair]:
    """The pairs of all graphs that no graph contradicts."""
    pairs = {(id(conv), id(norm)): (conv, norm) for each, _ in found for conv, norm in each}
    other = {number for _, numbers in found for number in numbers}
    members = [id(module) for pair in pairs.values() for module in pair]
    return [pair for key, pair in pairs.items() if all(n not in other and members.count(n) == 1 for n in key)]


def _fold(network: nn.Module, pairs: Iterable[Pair]) -> None:
    """In place: the convolution takes the normalisation's part, in whose place the identity stands."""
    gone = set()
    for conv, norm in pairs:
        dtype, bias = conv.weight.dtype, None if conv.bias is None else conv.bias.double()
        mean, var = norm.running_mean.double(), norm.running_var.double()
        scale, shift = (None if value is None else value.double() for value in (norm.weight, norm.bias))
        fused = fuse_conv_bn_weights(conv.weight.double(), bias, mean, var, norm.eps, scale, shift)
        conv.weight, conv.bias = (nn.Parameter(value.to(dtype), requires_grad=False) for value in fused)
        gone.add(norm)
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if module in gone:
            network.set_submodule(name, nn.Identity())
