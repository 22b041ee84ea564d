"""`branched`: several peers on one stem, the networks of ONE, PCL and DKEL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from fastkd._core.typed import like
from fastkd.models.base import Network, Outputs
from fastkd.models.registry import create


class Branched(nn.Module):
    """m networks of one architecture on one stem; each has a last stage and a classifier of its own.

    networks  m >= 2 `Network`s of one architecture, each with weights of its own. They are changed in place: the
              stem layers of the first one take the place of the others'.

    `peers` are these networks. Each stays an ordinary network, image -> logits, whose state dict loads into one
    that `create` made. Stem and all branches are this module's parameters, each once; its state dict repeats the stem
    for every peer (the same storages, so that a file holds it once).

    Raises TypeError for what is no `Network`; ValueError for fewer than two, for other shapes, and for a
    network given twice.

    >>> student = fastkd.models.Branched([fastkd.models.create("resnet8", 10) for _ in range(2)])
    >>> [output.logits.shape for output in student(torch.zeros(2, 3, 32, 32))]
    [torch.Size([2, 10]), torch.Size([2, 10])]
    """

    def __init__(self, networks: Sequence[Network]):
        super().__init__()
        networks = list(networks)
        _check(networks)
        first = networks[0]
        for other in networks[1:]:
            for name in first.stem_layers():
                other.set_submodule(name, first.get_submodule(name))
        self.peers = nn.ModuleList(networks)
        self._recipe: tuple[str, int, int, dict[str, Any]] | None = None

    def forward(self, views: Tensor | Sequence[Tensor]) -> tuple[Outputs, ...]:
        """m `Outputs`, one per peer.

        views  m tensors [B, C, H, W], one per peer: the stem runs m times, batch statistics are those of one view.
               Or one tensor, the same for every peer: the stem runs once.

        Raises ValueError for another number of views.
        """
        peers = cast("Sequence[Network]", self.peers)
        stem = peers[0].forward_stem
        if isinstance(views, Tensor):
            maps = [stem(views)] * len(self.peers)
        elif len(views) == len(self.peers):
            maps = [stem(view) for view in views]
        else:
            raise ValueError(
                f"Branched: views must be one tensor or {len(self.peers)} of them, one per peer, got {len(views)}"
            )
        return tuple([peer.forward_branch(m) for peer, m in zip(peers, maps, strict=True)])

    if TYPE_CHECKING:

        @like(forward)
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            """As `forward`."""

    def peer(self, i: int) -> Network:
        """Peer i as an ordinary network: image [B, C, H, W] -> logits. It shares its weights with this module."""
        return cast("Sequence[Network]", self.peers)[i]

    def fresh(self) -> Branched:
        """Another one of this architecture with random weights, on the CPU in the default dtype.

        The weights come from PyTorch's global generator. Raises ValueError where this one was not made by `branched`.
        """
        if self._recipe is None:
            raise ValueError("Branched: fresh() needs a network made by branched(name, ...), got one made of networks")
        name, num_classes, branches, options = self._recipe
        return branched(name, num_classes, branches, **options)


def branched(name: str, num_classes: int, branches: int = 3, **options: Any) -> Branched:
    """`branches` networks `create(name, num_classes, **options)` on one stem: all stages but the last are shared.

    name      a network with a stem: plain<n>, resnet<n>, resnet8x4, resnet32x4, wrn<d>_<k>, vgg<n>, densenet40_12,
              densenet121; of resnet18, 34 and 50 the last of four stages is the branch, of DenseNets the last block
    branches  m >= 2, the number of peers; 3 in PCL and DKEL
    options   of `create`: image_size, channels, norm, width, ...

    Every branch has initial weights of its own, from PyTorch's global generator. Raises ValueError for a network that
    cannot be cut (MobileNetV2, ShuffleNetV2), and whatever `create` raises.

    >>> student = fastkd.models.branched("resnet8", 10, branches=2)
    >>> student.peer(0).conv1 is student.peer(1).conv1, student.peer(0).fc is student.peer(1).fc
    (True, False)
    """
    if isinstance(branches, bool) or not isinstance(branches, int) or branches < 2:
        raise ValueError(f"branched: branches must be an integer of at least 2, got {branches!r}")
    first = create(name, num_classes, **options)
    if not isinstance(first, Network):
        known = "plain, resnet, wrn, vgg, densenet"
        raise ValueError(f"branched: name must be a network with a stem and branches ({known}), got {name!r}")
    others = [create(name, num_classes, **options) for _ in range(branches - 1)]
    result = Branched([first, *(network for network in others if isinstance(network, Network))])
    result._recipe = (name, num_classes, branches, dict(options))
    return result


def _check(networks: list[Network]) -> None:
    for i, network in enumerate(networks):
        if not isinstance(network, Network):
            raise TypeError(
                f"Branched: networks[{i}] must be a fastkd.models.Network (it has forward_stem and forward_branch), "
                f"got {type(network).__name__}"
            )
    if len(networks) < 2:
        raise ValueError(f"Branched: networks must be at least two, got {len(networks)}")
    owner: dict[int, int] = {}  # id of a parameter -> its network
    for i, network in enumerate(networks):
        if _shapes(network) != _shapes(networks[0]):
            raise ValueError(f"Branched: networks[{i}] must have the shapes of networks[0], got other ones")
        for parameter in network.parameters():
            if owner.setdefault(id(parameter), i) != i:
                got = f"one that shares parameters with networks[{owner[id(parameter)]}]"
                raise ValueError(f"Branched: networks[{i}] must be a network of its own, got {got}")


def _shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}
