"""RKD as the papers' codes write it: [N, N, D] differences and, for angles, [N, N, N] cosines of each network."""

import torch
import torch.nn.functional as torch_functional
from torch import Tensor


def _distances(x: Tensor) -> Tensor:
    norms = x.pow(2).sum(1)
    distances = (norms[:, None] + norms[None] - 2 * (x @ x.t())).clamp(min=1e-12).sqrt()
    distances = distances * (1 - torch.eye(x.shape[0], dtype=x.dtype, device=x.device))
    return distances / (distances.sum() / (distances > 0).sum())


def _cosines(x: Tensor) -> Tensor:
    units = torch_functional.normalize(x[None] - x[:, None], p=2, dim=2)
    return torch.bmm(units, units.transpose(1, 2))


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    with torch.no_grad():
        target = _distances(teacher)
    return torch_functional.smooth_l1_loss(_distances(student), target)


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    with torch.no_grad():
        target = _cosines(teacher)
    return torch_functional.smooth_l1_loss(_cosines(student), target)
