"""Small networks, and the papers' formulas typed again in plain PyTorch, for the tests of the methods."""

import copy

import torch
from torch import nn

from fastkd.methods import Method, Phase
from fastkd.methods.base import cross_entropy

CLASSES = 7


def mlp(seed: int, inputs: int = 5, classes: int = CLASSES, hidden: int = 6) -> nn.Module:
    """A float64 network without batch statistics, so that a batch in parts is the batch."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, classes)).double()


def guides_of(count: int = 4) -> list[nn.Module]:
    return [mlp(seed=10 + g) for g in range(count)]


def bn_net(seed: int, classes: int = CLASSES) -> nn.Module:
    """A float32 network with batch statistics and dropout, whose modes therefore matter; images [B, 1, 6, 6]."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(64, classes)
        )


def batch(rows: int = 10, inputs: int = 5, classes: int = CLASSES, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (rows,), generator=generator)


def images(rows: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 1, 6, 6, generator=generator), torch.randint(CLASSES, (rows,), generator=generator)


def plain_ce(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return -torch.log_softmax(z, 1)[torch.arange(len(y)), y].mean()


def plain_kd(z: torch.Tensor, z_target: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 * mean_b sum_c p_T(target) * (log p_T(target) - log p_T(learner))."""
    p = torch.softmax(z_target / temperature, 1)
    gap = torch.log_softmax(z_target / temperature, 1) - torch.log_softmax(z / temperature, 1)
    return temperature**2 * (p * gap).sum(1).mean()


def plain_kldiv_mean(z: torch.Tensor, z_target: torch.Tensor, temperature: float) -> torch.Tensor:
    """nn.KLDivLoss() of old PyTorch: the mean over rows and classes."""
    log_q, p = torch.log_softmax(z / temperature, 1), torch.softmax(z_target / temperature, 1)
    return nn.KLDivLoss(reduction="none")(log_q, p).mean()


def gradients(network: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in network.parameters()]


def plain_gradients(network: nn.Module, loss) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Value and gradients of loss(network), on a copy."""
    network = copy.deepcopy(network)
    value = loss(network)
    return value.detach(), list(torch.autograd.grad(value, list(network.parameters())))


def run(method, inputs, target=None, chunks: int = 1) -> torch.Tensor:
    """One iteration of a one-phase method without a step; gradients are left in the networks. Returns the loss."""
    (phase,) = method.phases(inputs, target, chunks=chunks)
    method.zero_grad(set_to_none=True)
    total = torch.zeros((), dtype=torch.float64)
    for loss in phase.losses:
        loss.backward()
        total += loss.detach()
    return total


def train(method, inputs, target, steps: int, optimizer=None, chunks: int = 1) -> torch.optim.Optimizer:
    """The loop of the documentation, with momentum and weight decay."""
    if optimizer is None:
        optimizer = torch.optim.SGD(method.parameter_groups(0.05), momentum=0.9, weight_decay=0.01)
    for _ in range(steps):
        for phase in method.phases(inputs, target, chunks=chunks):
            optimizer.zero_grad(set_to_none=True)
            for loss in phase.losses:
                loss.backward()
            optimizer.step()
    return optimizer


def same(first: dict, second: dict) -> bool:
    """Whether two state dicts hold the same bits."""
    if first.keys() != second.keys():
        return False
    for key, value in first.items():
        other = second[key]
        if isinstance(value, dict):
            equal = same(value, other)
        else:
            equal = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
        if not equal:
            return False
    return True


def snapshot(module: nn.Module) -> dict:
    return copy.deepcopy(module.state_dict())


class Roles(Method):
    """Three phases in an iteration, each training other networks; the roles change at random."""

    def __init__(self, pivot, students, seed=0):
        super().__init__(learners={"pivot": pivot, "students": students}, seed=seed)
        self.order = []

    def iteration(self, batch, generator):
        promoted = torch.randint(len(self.students), (1,), generator=generator).item()
        rest = [i for i in range(len(self.students)) if i != promoted]
        yield self.phase(batch, ["pivot"])
        yield self.phase(batch, [f"students.{promoted}"])
        yield self.phase(batch, [f"students.{i}" for i in rest])
        self.order.append(promoted)

    def phase(self, batch, names):
        def terms(inputs, target):
            losses = {name: cross_entropy(self.learner(name)(inputs), target) for name in names}
            return sum(losses.values()), {name: loss.detach() for name, loss in losses.items()}

        return Phase([self.learner(name) for name in names], terms, batch)

    def parameter_groups(self, lr):
        return [
            {"params": list(self.students.parameters()), "lr": lr},
            {"params": list(self.pivot.parameters()), "lr": 0.1 * lr},
        ]

    def deployable(self):
        return self.students[0]


class MeanTeacher(Method):
    """Two peers, a view of the image each; a moving average of the weights after the step."""

    def __init__(self, peers):
        super().__init__(learners={"peers": peers})
        self.means = copy.deepcopy(self.peers).requires_grad_(False)  # in train mode with the peers, but not trained

    def iteration(self, batch, generator):
        weight = (self.epoch + 1) / self.epochs
        names = [f"peers.{i}" for i in range(len(self.peers))]

        def terms(views, target):
            losses = [cross_entropy(self.learner(n)(view), target) for n, view in zip(names, views, strict=True)]
            with torch.no_grad():
                for mean, view in zip(self.means, views, strict=True):
                    mean(view)
            return weight * sum(losses), {"ce": weight * sum(losses).detach()}

        phase = Phase([self.learner(n) for n in names], terms, batch)
        yield phase
        if not phase.skipped:
            with torch.no_grad():
                for mean, value in zip(self.means.parameters(), self.peers.parameters(), strict=True):
                    mean.lerp_(value, 0.25)

    def deployable(self):
        return self.means[0]


class Translated(Method):
    """The student learns through a transform that is thrown away."""

    def __init__(self, student, teacher):
        learners = {"student": student, "transform": nn.Linear(7, 7).double()}
        super().__init__(learners=learners, frozen={"teacher": teacher})

    def iteration(self, batch, generator):
        def terms(inputs, target):
            gap = self.learner("transform")(self.learner("student")(inputs)) - self.teach(self.teacher, inputs)
            return gap.abs().mean(), {"transfer": gap.detach().abs().mean()}

        yield Phase([self.learner("student"), self.learner("transform")], terms, batch)

    def deployable(self):
        return self.student


class Twice(Method):
    """Trains its student in two phases of each iteration."""

    def __init__(self, student):
        super().__init__(learners={"student": student})

    def iteration(self, batch, generator):
        for _ in range(2):
            yield Phase([self.student], lambda x, y: (cross_entropy(self.student(x), y), {}), batch)
