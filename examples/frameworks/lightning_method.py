"""Lightning: any method by manual optimisation, stopped after two epochs and resumed from Lightning's checkpoint.

Run: python examples/frameworks/lightning_method.py (seconds on a CPU; pip install lightning). What is ours: the class
`Training`, which any method of fastkd fits into; here ORC, whose iterations have three phases, a step each. A run
that is resumed ends with the bits of one that never stopped: the checkpoint has the method's counters and random state.
"""

import tempfile
from pathlib import Path

import lightning as L
import torch
from torch import nn

from fastkd.methods import ORC, Method

EPOCHS = 4
torch.manual_seed(0)
images, labels = torch.randn(128, 3, 8, 8), torch.randint(10, (128,))
batches = list(zip(images.split(32), labels.split(32), strict=True))


def network(width: int) -> nn.Module:
    layers = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, 10)
    return nn.Sequential(*layers)


class Training(L.LightningModule):
    def __init__(self, method: Method):
        super().__init__()
        self.method = method
        self.automatic_optimization = False

    def on_train_epoch_start(self):
        self.method.start_epoch(self.current_epoch, EPOCHS, self.trainer.num_training_batches)

    def training_step(self, batch, index):
        self.log_dict(self.method.step(self.optimizers(), *batch, self.manual_backward))

    def configure_optimizers(self):
        return torch.optim.SGD(self.method.parameter_groups(0.05), momentum=0.9)


def method() -> ORC:
    torch.manual_seed(1)
    return ORC(network(12), [network(4), network(6), network(8)])


def fit(epochs: int, folder: Path, resume: Path | None = None) -> tuple[Training, L.Trainer]:
    module = Training(method())
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, default_root_dir=folder, enable_model_summary=False
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None), ckpt_path=resume)
    return module, trainer


with tempfile.TemporaryDirectory() as folder:
    whole, trainer = fit(EPOCHS, Path(folder, "whole"))
    _, stopped = fit(EPOCHS // 2, Path(folder, "stopped"))
    resumed, _ = fit(EPOCHS, Path(folder, "resumed"), Path(stopped.checkpoint_callback.best_model_path))

assert resumed.method.iterations == EPOCHS * len(batches)
for name, value in whole.method.state_dict().items():
    assert torch.equal(value, resumed.method.state_dict()[name]), name
parts = {name: round(value.item(), 3) for name, value in trainer.callback_metrics.items()}
print(f"Lightning: {trainer.global_step} steps, resumed to the same bits, {parts}")
