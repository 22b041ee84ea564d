"""CA-MKD: Confidence-Aware Multi-teacher Knowledge Distillation (Zhang et al., ICASSP 2022, arXiv 2201.00007).

Each teacher's logits weigh, image by image, by how well it knows the label; so do its feature maps, by how well its own
classifier reads the label off what the student makes of them. The logits' part alone is AVER(weights="confidence").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as torch_functional
from torch import Tensor, nn

from fastkd import functional
from fastkd._core.checks import check_integer, check_number, check_temperature
from fastkd._core.labels import mean_over_counted
from fastkd._core.messages import wrong_value
from fastkd.methods._checks import check_boolean, check_network, check_networks
from fastkd.methods._features import outputs_of
from fastkd.methods._fresh import beside, weights_from
from fastkd.methods._map_channels import map_channels
from fastkd.methods.base import Batch, Method, Phase, Terms
from fastkd.methods.baselines import confidence_weights
from fastkd.methods.feed import pooled
from fastkd.models import Outputs


class CAMKD(Method):
    """Teachers of logits and of last feature maps, weighted image by image by their confidence.

        CE + lam * mean_b sum_k w_kb KD_T(z, z_k) / K + feature_weight * mean_b sum_k v_kb MSE(r_k(x_S), x_k) / K
        w_k = (1 - softmax_k(CE(z_k, y))) / (K - 1);  v_k the same of CE(h_k(r_k(x_S)), y)

    x_S, x_k are the last feature maps, r_k a 1x1 convolution with batch normalisation and ReLU of teacher k's own,
    trained with the student and not deployed, h_k teacher k's frozen classifier, which reads logits off such a map. The
    student's map is average-pooled to a smaller x_k and interpolated to a larger one. The gradient goes through v, as
    in the authors' code. Each default is marked (P) published in paper or code, (C) our choice.

    >>> student, *teachers = [fastkd.models.create("plain2", 10, image_size=8) for _ in range(3)]
    >>> method = fastkd.methods.CAMKD(student, teachers)
    >>> optimizer = torch.optim.SGD(method.parameter_groups(lr=0.1))
    >>> sorted(method.step(optimizer, torch.randn(4, 3, 8, 8), torch.arange(4)))
    ['ce', 'features', 'kd']

    Args:
        student: the network to train; gives logits [B, C] and feature maps, as in FEED.
        teachers: K >= 2 networks with the same classes; frozen in place. Networks of `fastkd.models.create` that are
            `fastkd.models.Network`s, or others that give maps and have `forward_head(map) -> (features, logits)`.
        feature_weight: >= 0; 50 (P, code). 0: the logits' part alone, for any networks, and no r_k.
        temperature: T > 0; 4 (P).
        lam: weight of the logits' part, in [0, 1]; 1 (P).
        batch_norm: of r_k; True (P, code). It sees one chunk at a time.
        seed: of the initial weights of r_k, which are PyTorch's.

    Rows whose target is -100 count in no term. Errors: ValueError or TypeError in one sentence, before training.
    """

    student: nn.Module
    teachers: nn.ModuleList

    def __init__(
        self,
        student: nn.Module,
        teachers: Sequence[nn.Module],
        *,
        feature_weight: float = 50.0,
        temperature: float = 4.0,
        lam: float = 1.0,
        batch_norm: bool = True,
        seed: int = 0,
    ):
        name = self._name()
        check_network(name, "student", student)
        teachers = check_networks(name, "teachers", teachers)
        if len(teachers) < 2:
            raise wrong_value(name, "teachers", "at least two networks", "one")
        feature_weight = check_number(name, "feature_weight", feature_weight, "a number >= 0", 0)
        temperature = check_temperature(name, temperature)
        lam = check_number(name, "lam", lam, "a number in [0, 1]", 0, 1)
        check_boolean(name, "batch_norm", batch_norm)
        seed = check_integer(name, "seed", seed)
        learners = {"student": student}
        if feature_weight > 0:
            with weights_from(seed):
                transforms = self._transforms(student, teachers, batch_norm)
            learners["transforms"] = beside(student, transforms)
        super().__init__(learners=learners, frozen={"teachers": teachers}, seed=seed)
        self.feature_weight, self.temperature, self.lam, self.batch_norm = feature_weight, temperature, lam, batch_norm
        self.teaches_logits = feature_weight == 0
        self.gives_outputs = feature_weight > 0

    def iteration(self, batch: Batch, generator: torch.Generator) -> Iterator[Phase]:
        """One phase: the step of the student and of the transforms."""
        yield Phase([self.learner(name) for name in self.learner_names], self._terms, batch)

    def deployable(self) -> nn.Module:
        """The student, without the transforms."""
        return self.student

    def _transforms(self, student: nn.Module, teachers: Sequence[nn.Module], batch_norm: bool) -> nn.Module:
        name, found = self._name(), []
        width = map_channels(student, None, name, "student")
        for k, teacher in enumerate(teachers):
            if not hasattr(teacher, "forward_head"):
                expected = "a network with forward_head, as those of fastkd.models.create have it, or feature_weight=0"
                raise wrong_value(name, f"teachers[{k}]", expected, type(teacher).__name__)
            out = map_channels(teacher, None, name, f"teachers[{k}]")
            layers = [nn.Conv2d(width, out, 1), nn.BatchNorm2d(out) if batch_norm else nn.Identity(), nn.ReLU()]
            found.append(nn.Sequential(*layers))
        return _Each(found)

    def _terms(self, inputs: Any, target: Any) -> Terms:
        if target is None:
            raise wrong_value(self._name(), "target", "class indices [B]", None)
        if self.feature_weight == 0:
            taught = [self.taught_logits(t, inputs, f"teachers[{k}]") for k, t in enumerate(self.teachers)]
            return self._logits_terms(self.learned_logits("student", inputs), taught, target)
        guides = [self._taught(k, teacher, inputs) for k, teacher in enumerate(self.teachers)]
        own = outputs_of(self.learner("student"), inputs, self._name(), "student", "maps")
        assert own.maps is not None
        loss, parts, logits = self._logits_terms(own.logits, [guide.logits for guide in guides], target)
        maps = [guide.maps[-1] for guide in guides if guide.maps is not None]  # K x [B, c_k, H_k, W_k]
        features = self.feature_weight * self._features(own.maps[-1], maps, target)
        return loss + features, parts | {"features": features.detach()}, logits

    def _taught(self, k: int, teacher: nn.Module, inputs: Any) -> Outputs:
        run = partial(outputs_of, method_name=self._name(), argument=f"teachers[{k}]", need="maps")
        outputs: Outputs = self.teach(teacher, inputs, run)
        return outputs

    def _logits_terms(
        self, logits: Tensor, taught: list[Tensor], target: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        kd_weight = self.lam / len(taught)
        loss, terms = functional.multi_teacher_kd(
            logits,
            taught,
            target,
            weights=confidence_weights(functional.group_stats(taught, target).ce).nan_to_num(0.0),
            kd_weight=kd_weight,
            temperature=self.temperature,
            ce_weight=1.0,
            return_terms=True,
        )
        return loss, {"ce": terms.ce, "kd": kd_weight * terms.kd}, logits

    def _features(self, x: Tensor, maps: list[Tensor], target: Tensor) -> Tensor:
        """The maps' part without its weight, from the student's map x [B, c_S, H, W]."""
        made = self.learner("transforms")([resized(x, map_) for map_ in maps])
        read = [teacher.forward_head(each)[1] for teacher, each in zip(self.teachers, made, strict=True)]  # type: ignore[operator]
        ce = torch.stack([torch_functional.cross_entropy(logits, target, reduction="none") for logits in read])
        pairs = zip(made, maps, strict=True)
        rows = torch.stack([(each - map_).square().mean((1, 2, 3)) for each, map_ in pairs])  # [K, B]
        return mean_over_counted((confidence_weights(ce) * rows).mean(0), target)


class _Each(nn.Module):
    """K modules and K inputs -> K outputs."""

    def __init__(self, modules: Sequence[nn.Module]):
        super().__init__()
        self.each = nn.ModuleList(modules)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return [module(x) for module, x in zip(self.each, inputs, strict=True)]


def resized(x: Tensor, like: Tensor) -> Tensor:
    """A map [B, c, h, w] in the size [H, W] of another: average-pooled where it is larger, else interpolated."""
    size = list(like.shape[-2:])
    if x.shape[-2] >= size[0]:
        return pooled(x, size)
    return torch_functional.interpolate(x, size=size, mode="bilinear", align_corners=False)
