"""FEED: Feature-level Ensemble for Knowledge Distillation (arXiv 1909.10754, ECAI 2020), parallel and sequential.

Parallel: several frozen teachers, each imitated by the student's last feature map through a transform of its own:

    train(FEED(student, [teacher_1, ..., teacher_n]))

Sequential: a chain of networks of one type, each fresh, each taught by the one before it:

    chain = [train(CE(network()))]
    for _ in range(k):
        chain.append(train(FEED(network(), chain[-1:], mode="sequential")))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as torch_functional
from torch import Tensor, nn

from fastkd import functional
from fastkd._core.checks import check_choice, check_integer, check_number
from fastkd._core.labels import counted, is_soft
from fastkd._core.messages import wrong_type, wrong_value
from fastkd.methods._checks import check_boolean, check_network, check_networks, is_sequence
from fastkd.methods._features import outputs_of
from fastkd.methods._fresh import beside, weights_from
from fastkd.methods._map_channels import map_channels
from fastkd.methods._signature import takes
from fastkd.methods.base import Batch, Method, Phase, Terms, cross_entropy
from fastkd.nn import FeatureTransforms
from fastkd.ops.feature_ensemble import ELEMENTS, NORMS, Elements
from fastkd.ops.shared import Norm

Mode = Literal["parallel", "sequential"]
Channels = tuple[int, Sequence[int]]


class FEED(Method):
    """A student whose last feature map, through a transform per teacher, learns the teachers' last feature maps.

    With x_n [B, c_n, H, W] the last map of teacher n as it is (P), x_S the student's, and NTL_n non-linear transforms,
    which are trained with the student and left out of `deployable()` (P):

        CE + beta * sum_n || x_n / ||x_n||_2 - NTL_n(x_S) / ||NTL_n(x_S)||_2 ||_1

    for each sample, then the mean over the samples. NTL_n takes c_S to c_n channels and keeps the size; where x_n and
    NTL_n(x_S) differ in height or width, the larger one is average-pooled (C). Each default is marked (P) published in
    the paper, (S) from a summary of it, (C) our choice, most of them after the code of Factor Transfer.

    >>> student, *teachers = [fastkd.models.create("plain2", 10, image_size=8) for _ in range(3)]
    >>> method = fastkd.methods.FEED(student, teachers)
    >>> optimizer = torch.optim.SGD(method.parameter_groups(lr=0.1))
    >>> sorted(method.step(optimizer, torch.randn(4, 3, 8, 8), torch.arange(4)))
    ['ce', 'features']

    Args:
        student: the network to train. It gives logits [B, C] and feature maps: a network of `fastkd.models.create`,
            any other through `fastkd.models.with_features`, or one that returns `fastkd.models.Outputs`.
        teachers: networks that give feature maps; frozen in place. Their logits are not used.
        mode: "parallel", or "sequential": the same loss with exactly one teacher, the previous network of the chain
            (P). Its student is a fresh network of the same type.
        beta: weight of the teachers' terms, >= 0; 500 (C). It belongs to `norm`: the norm at each "position" makes a
            term about sqrt(H*W) times larger, so that its beta is that much smaller (8 times on maps of 8 x 8 pixels).
        reduction: of a term's elements: "mean" (C), or "sum", the norm as it is printed. The loss is the same where
            the beta of "sum" is that of "mean" divided by c_n*H*W; 500 is far too much for "sum".
        p: 1 (P), or 2 for squared differences.
        norm: what is divided by its L2 norm: the "sample", over c_n*H*W (C), each "position" or each "channel".
        layers: 3x3 convolutions of a transform; 3 (S).
        negative_slope: of the LeakyReLU after each of them, in [0, 1]; 0.1 (C).
        batch_norm: put a BatchNorm2d before each LeakyReLU; False (C). It sees one chunk at a time.
        seed: of the transforms' initialisation, which is PyTorch's for convolutions (C) and leaves the global
            generator alone.
        channels: (c_S, [c_1, c_2, ...]). None: they are read off one forward pass of every network, here, in eval mode
            and without a graph, for `example`.
        example: inputs as the networks take them, on their device. None: a black image that fits the network's first
            convolution, of the network's `image_size` or of 32x32 pixels. Channels do not depend on the size; give one
            where a network runs for another size only.

    Rows whose target is -100 count in no term. Every term is a mean over samples, so that chunks are exact.

    Errors: ValueError or TypeError in one sentence, before training for all of the above and for a network without
    feature maps; at the first batch where `channels` were given and are not the maps'.
    """

    gives_outputs = True
    student: nn.Module
    teachers: nn.ModuleList
    transforms: FeatureTransforms

    def __init__(
        self,
        student: nn.Module,
        teachers: Sequence[nn.Module],
        *,
        mode: Mode = "parallel",
        beta: float = 500.0,
        reduction: Elements = "mean",
        p: int = 1,
        norm: Norm = "sample",
        layers: int = 3,
        negative_slope: float = 0.1,
        batch_norm: bool = False,
        seed: int = 0,
        channels: Channels | None = None,
        example: Any = None,
    ):
        name = self._name()
        check_network(name, "student", student)
        teachers = check_networks(name, "teachers", teachers)
        check_choice(name, "mode", mode, get_args(Mode))
        if mode == "sequential" and len(teachers) != 1:
            expected = "exactly one network, the previous one of the chain, where mode is 'sequential'"
            raise wrong_value(name, "teachers", expected, len(teachers))
        self._check_options(beta, reduction, p, norm)
        layers = check_integer(name, "layers", layers, 1)
        negative_slope = check_number(name, "negative_slope", negative_slope, "a number in [0, 1]", 0, 1)
        check_boolean(name, "batch_norm", batch_norm)
        seed = check_integer(name, "seed", seed)
        width, widths = self._channels(student, teachers, channels, example)
        normalised = nn.BatchNorm2d if batch_norm else None
        with weights_from(seed):
            transforms = FeatureTransforms(width, widths, norm=normalised, layers=layers, negative_slope=negative_slope)
        learners = {"student": student, "transforms": beside(student, transforms)}
        super().__init__(learners=learners, frozen={"teachers": teachers}, seed=seed)
        self.mode, self.beta, self.reduction, self.p, self.norm = mode, float(beta), reduction, int(p), norm

    def iteration(self, batch: Batch, generator: torch.Generator) -> Iterator[Phase]:
        """One phase: the step of the student and of the transforms."""
        yield Phase([self.learner("student"), self.learner("transforms")], self._terms, batch)

    def deployable(self) -> nn.Module:
        """The student, without the transforms."""
        return self.student

    def _terms(self, inputs: Any, target: Any) -> Terms:
        self._check_target(target)
        teachers = [
            self.teach(teacher, inputs, partial(last_map, method_name=self._name(), argument=f"teachers[{n}]"))
            for n, teacher in enumerate(self.teachers)
        ]  # n x [B, c_n, H_n, W_n]
        outputs = outputs_of(self.learner("student"), inputs, self._name(), "student", "maps")
        assert outputs.maps is not None
        self._check_maps(outputs.maps[-1], teachers)
        students = self.learner("transforms")(outputs.maps[-1])  # n x [B, c_n, H_S, W_S]
        ce = cross_entropy(outputs.logits, target)
        features = self.beta * self._distance(students, teachers, target)
        return ce + features, {"ce": ce.detach(), "features": features.detach()}, outputs.logits

    def _distance(self, students: Sequence[Tensor], teachers: Sequence[Tensor], target: Tensor) -> Tensor:
        """The sum over the teachers, the mean over the rows that count; a scalar."""
        pairs = [of_one_size(*pair) for pair in zip(students, teachers, strict=True)]
        return functional.feature_ensemble(
            [student for student, _ in pairs],
            [teacher for _, teacher in pairs],
            p=self.p,
            norm=self.norm,
            elements=self.reduction,
            mask=counted(target),
        )

    def _channels(
        self, student: nn.Module, teachers: Sequence[nn.Module], channels: Channels | None, example: Any
    ) -> tuple[int, list[int]]:
        name = self._name()
        if channels is None:
            networks = {"student": student} | {f"teachers[{n}]": teacher for n, teacher in enumerate(teachers)}
            width, *widths = [map_channels(network, example, name, key) for key, network in networks.items()]
            return width, widths
        expected = f"(channels of the student's map, [channels of the teachers' {len(teachers)} maps])"
        if not is_sequence(channels) or len(channels) != 2 or not is_sequence(channels[1]):
            raise wrong_type(name, "channels", expected, repr(channels))
        if len(channels[1]) != len(teachers):
            raise wrong_value(name, "channels", expected, repr(channels))
        width = check_integer(name, "channels[0]", channels[0], 1)
        return width, [check_integer(name, f"channels[1][{n}]", c, 1) for n, c in enumerate(channels[1])]

    def _check_options(self, beta: float, reduction: Elements, p: int, norm: Norm) -> None:
        name = self._name()
        check_number(name, "beta", beta, "a number >= 0", 0)
        check_choice(name, "reduction", reduction, ELEMENTS)
        if isinstance(p, bool) or p not in (1, 2):
            raise wrong_value(name, "p", "1 or 2", repr(p))
        check_choice(name, "norm", norm, NORMS)

    def _check_target(self, target: Any) -> None:
        expected = "class indices of shape [B], or probabilities [B, C]"
        if not isinstance(target, Tensor):
            raise wrong_type(self._name(), "target", expected, type(target).__name__)
        if target.dim() != (2 if is_soft(target) else 1):
            raise wrong_value(self._name(), "target", expected, f"shape {list(target.shape)}")

    def _check_maps(self, student: Tensor, teachers: Sequence[Tensor]) -> None:
        """The maps have the channels that the transforms were made for."""
        made_for = (self.transforms.in_channels, list(self.transforms.out_channels))
        found = (student.shape[1], [teacher.shape[1] for teacher in teachers])
        if made_for != found:
            raise wrong_value(self._name(), "channels", f"those of the last feature maps, {found}", made_for)


class FT(FEED):
    """FEED with one teacher, close to Factor Transfer (arXiv 1802.04977).

        CE + beta * || x_T / ||x_T||_2 - NTL(x_S) / ||NTL(x_S)||_2 ||_1

    Factor Transfer compares the student's translated map with a factor that an auto-encoder, trained before on the
    teacher's maps, makes of them; here, as in FEED, it is compared with the teacher's map itself.

    >>> student, teacher = [fastkd.models.create("plain2", 10, image_size=8) for _ in range(2)]
    >>> method = fastkd.methods.FT(student, teacher)
    >>> len(method.teachers), len(method.transforms.out_channels)
    (1, 1)

    Args:
        student: the network to train; gives feature maps, as in FEED.
        teacher: the network to learn from; gives feature maps; frozen in place.
        beta, reduction, p, norm, layers, negative_slope, batch_norm, seed, channels, example: as in FEED.
    """

    @takes(FEED, without=("mode",))
    def __init__(self, student: nn.Module, teacher: nn.Module, **options: Any):
        check_network(self._name(), "teacher", teacher)
        super().__init__(student, [teacher], **options)


def of_one_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Maps [B, c, h, w] and [B, c, H, W]: in height and in width, the larger one average-pooled to the smaller size."""
    size = [min(pair) for pair in zip(student.shape[-2:], teacher.shape[-2:], strict=True)]
    return pooled(student, size), pooled(teacher, size)


def pooled(x: Tensor, size: list[int]) -> Tensor:
    """The map [B, c, H, W] average-pooled to the size [h, w], which is not larger."""
    old = list(x.shape[-2:])
    if old == size:
        return x
    if all(pixels % fewer == 0 for pixels, fewer in zip(old, size, strict=True)):
        # The same numbers as adaptive pooling, whose gradient is not deterministic on a GPU.
        return torch_functional.avg_pool2d(x, [pixels // fewer for pixels, fewer in zip(old, size, strict=True)])
    return torch_functional.adaptive_avg_pool2d(x, (size[0], size[1]))


def last_map(network: nn.Module, inputs: Any, *, method_name: str, argument: str) -> Tensor:
    """The last feature map [B, c, H, W] of what `network` returns for `inputs`."""
    maps = outputs_of(network, inputs, method_name, argument, "maps").maps
    assert maps is not None
    return maps[-1]
