"""What the engine reads of a run's options."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from fastkd._core.messages import UserError
from fastkd.train.option_types import settle


@dataclass
class DataOptions:
    """Data.

    Args:
        data: digits | cifar10 | cifar100 | tiny-imagenet | imagefolder:DIR | fake
        data_root: folder of the downloaded data sets
        download: fetch CIFAR where it is missing
        train_size: keep this many training images, of each class its share; default all (compare: 200 of digits)
        validation: training images set apart for validation: a fraction below 1, or their number (2 or more)
        image_size: resize images to this many pixels; default the data's own size
        augment: augment the training images (shift, mirror, crop)
        variants: augmentations of each image through which the epochs cycle; 0: each epoch has its own
        workers: processes that load images; data in memory needs none
        bad_images: a file that cannot be read stops the run (error), or is counted, named and left out (skip)
        keep_images: image files cut to fewer than 96 pixels are decoded once and stay in memory; without workers
    """

    data: str = "digits"
    data_root: str = ".data"
    download: bool = False
    train_size: int | None = None
    validation: float = 0.0
    image_size: int | None = None
    augment: bool = True
    variants: int = 0
    workers: int = 0
    bad_images: Literal["error", "skip"] = "error"
    keep_images: bool = False


@dataclass
class NetworkOptions:
    """Networks. A network is NAME or NAME:option=value:..., for example plain4:width=0.5:norm=group.

    Args:
        teacher: the largest network
        assistants: networks between teacher and student, by decreasing size: A,B,... ([] for none)
        student: the network that is wanted
        num_teachers: feed-parallel: how many teachers of the student's architecture; default 5 (digits: 3)
        generations: ban, feed-sequential: networks of the chain, the student among them
        branches: dkel, pcl: peers on one stem
        checkpoint: checkpoint.NAME=FILE takes the weights of teacher, assistant1, ... from FILE, trains none
    """

    teacher: str = "resnet14"
    assistants: list[str] = field(default_factory=lambda: ["resnet8", "plain4:width=0.25"])
    student: str = "plain3:width=0.125"
    num_teachers: int | None = None
    generations: int = 3
    branches: int = 3
    checkpoint: dict[str, str] = field(default_factory=dict)


@dataclass
class OptimizationOptions:
    """Optimisation, the same for every network of a run.

    Args:
        epochs: passes over the training images
        guide_epochs: passes for teacher and assistants where they are trained first; 0 means as many as epochs
        own_epochs: the same for networks of the student's architecture (self1, FEED's teachers, generations)
        batch_size: images a step
        optimizer: sgd (momentum) or adamw
        lr: learning rate
        momentum: of sgd
        nesterov: Nesterov's form of the momentum
        weight_decay: of all parameters
        schedule: of the learning rate, epoch by epoch
        milestones: for multistep, where the rate is multiplied by gamma: epochs, or fractions of epochs below 1
        gamma: factor of multistep
        warmup_epochs: linear rise of the rate over the first epochs
    """

    epochs: int = 30
    guide_epochs: int = 0
    own_epochs: int = 0
    batch_size: int = 32
    optimizer: Literal["sgd", "adamw"] = "adamw"
    lr: float = 0.01
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    schedule: Literal["constant", "multistep", "cosine"] = "constant"
    milestones: list[float] = field(default_factory=lambda: [0.5, 0.75])
    gamma: float = 0.1
    warmup_epochs: int = 0


@dataclass
class LoopOptions:
    """Run.

    Args:
        device: cpu | cuda | cuda:N | auto (a GPU where there is one)
        threads: of the CPU; default what PyTorch takes (digits: 1, more threads do not help networks so small)
        eval_every: evaluate after every so many epochs, and always after the last one
        keep: how many of the last checkpoints are kept; 0 keeps all
        save_every: save the state after every so many steps, too, for long epochs; 0 only after each epoch
        non_finite: a loss that is NaN or infinite stops the run (stop), or its step is counted and left out (skip),
            up to 9 in a row; on a GPU skip waits for each step
        log_every: steps between two looks at the loss on a GPU (on a CPU each step is looked at)
        quiet: print results only
        cache: folder of the networks that are trained before the student, to be shared between runs; default OUT/cache
        tensorboard: write curves for TensorBoard into OUT/tensorboard; needs its package
        logits_cache: keep the frozen networks' logits of each image and augmentation in CACHE/logits, and read them
            there instead of running the networks again; for methods that take nothing else from frozen networks
        logits_dtype: in which they are kept; float16 takes half the room
    """

    device: str = "auto"
    threads: int | None = None
    eval_every: int = 1
    keep: int = 0
    save_every: int = 0
    non_finite: Literal["stop", "skip"] = "stop"
    log_every: int = 50
    quiet: bool = False
    cache: str = ""
    tensorboard: bool = False
    logits_cache: bool = False
    logits_dtype: Literal["float32", "float16"] = "float32"


@dataclass
class ScaleOptions:
    """Speed and several processes (torchrun --nproc-per-node N -m fastkd train ...).

    Args:
        amp: mixed precision, by torch.autocast; fp16, with a scaled loss, on GPUs only
        accumulate: cut each batch into so many parts, one after another, to save memory; relations are within a part
        channels_last: keep feature maps in channels-last order
        compile: compile the networks that learn (torch.compile)
        cuda_graph: on a GPU, replay the networks' passes from CUDA graphs, where small networks are bound by their many
            launches; one process, without compile
        deterministic: the same bits from the same seed on a GPU, too; slower
        sync_batch_norm: several processes on GPUs: batch normalisation over the global batch (torch.nn.SyncBatchNorm)
        timeout: seconds after which a process that does not answer ends the run
    """

    amp: Literal["none", "bf16", "fp16"] = "none"
    accumulate: int = 1
    channels_last: bool = False
    compile: bool = False
    cuda_graph: bool = False
    deterministic: bool = False
    sync_batch_norm: bool = False
    timeout: float = 600.0


_LEAST = {"epochs": 1, "guide_epochs": 0, "own_epochs": 0, "batch_size": 1, "warmup_epochs": 0, "eval_every": 1}
_LEAST |= {"num_teachers": 1, "generations": 1, "branches": 1, "keep": 0, "save_every": 0}
_LEAST |= {"log_every": 1, "workers": 0, "train_size": 1, "image_size": 1, "seed": 0, "threads": 1}
_LEAST |= {"accumulate": 1, "variants": 0}
_OPTIONAL = ("train_size", "image_size", "threads", "num_teachers", "seed")  # a comparison has no seed of its own
_FINITE = ("lr", "momentum", "weight_decay", "gamma")  # >= 0


def _check_values(config: object) -> None:
    wrong = settle(config)
    if wrong:
        raise UserError(wrong)
    for name, least in _LEAST.items():
        value = getattr(config, name, None)
        if value is None and name in _OPTIONAL:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"--{_flag(name)} must be an integer of at least {least}, got {value!r}")
    for name in _FINITE:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value >= 0):
            raise UserError(f"--{_flag(name)} must be a finite number >= 0, got {value!r}")
    if not (0 <= config.validation < 1 or config.validation > 1 and config.validation % 1 == 0):
        raise UserError(
            f"--validation must be a fraction from 0 to below 1 or a number of images, got {config.validation!r}"
        )
    if config.keep_images and config.workers:
        raise UserError(f"--keep-images needs --workers 0, got {config.workers}: workers forget after each epoch")
    if isinstance(config.timeout, bool) or not isinstance(config.timeout, int | float) or not 0 < config.timeout < 1e9:
        raise UserError(f"--timeout must be seconds above 0, got {config.timeout!r}")
    if config.cuda_graph and config.compile:
        raise UserError("--cuda-graph and --compile cannot be used together: leave out one of them")
    if config.nesterov and config.momentum == 0:
        raise UserError("--nesterov needs --momentum above 0, got 0")
    if not all(math.isfinite(m) and m > 0 for m in config.milestones):
        raise UserError(f"--milestones must be positive epochs or fractions of the epochs, got {config.milestones}")


def _flag(name: str) -> str:
    return name.replace("_", "-")


@dataclass
class Settings(DataOptions, NetworkOptions, OptimizationOptions, LoopOptions, ScaleOptions):
    """What `train` and `compare` have in common."""

    def __post_init__(self):
        _check_values(self)
        if self.threads is None and self.data == "digits":
            self.threads = 1
        if self.num_teachers is None:
            self.num_teachers = 3 if self.data == "digits" else 5
        # Settled here and kept in config.yaml: a run that is resumed for more epochs keeps the guides it has.
        self.guide_epochs = self.guide_epochs or self.epochs
        self.own_epochs = self.own_epochs or self.epochs
