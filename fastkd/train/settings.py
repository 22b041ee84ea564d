"""What the engine reads of a run's options."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fastkd._core.messages import UserError
from fastkd.train.option_types import option, settle


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
        label_noise: probability with which a training image has the label of another class, the same one in every epoch
        workers: processes that load images; data in memory needs none
        bad_images: a file that cannot be read stops the run (error), or is counted, named and left out (skip)
        keep_images: image files cut to fewer than 96 pixels are decoded once and stay in memory; without workers
    """

    data: str = option("digits", "data")
    data_root: str = option(".data", "free")
    download: bool = option(False, "free")
    train_size: int | None = option(None, "data", least=1)
    validation: float = option(0.0, "data")
    image_size: int | None = option(None, "data", least=1)
    augment: bool = option(True, "data")
    variants: int = option(0, "data", least=0, later=True, needs="augment")
    label_noise: float = option(0.0, "data", least=0, later=True)
    workers: int = option(0, "free", least=0)
    bad_images: Literal["error", "skip"] = option("error", "free")
    keep_images: bool = option(False, "free")


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

    teacher: str = option("resnet14", "stages")
    assistants: list[str] = option(["resnet8", "plain4:width=0.25"], "stages")
    student: str = option("plain3:width=0.125", "stages")
    num_teachers: int | None = option(None, "stages", least=1)
    generations: int = option(3, "stages", least=1)
    branches: int = option(3, "stages", least=1)
    checkpoint: dict[str, str] = option({}, "stages")


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

    epochs: int = option(30, "free", least=1)
    guide_epochs: int = option(0, "stages", least=0)
    own_epochs: int = option(0, "stages", least=0)
    batch_size: int = option(32, "result", least=1)
    optimizer: Literal["sgd", "adamw"] = option("adamw", "result")
    lr: float = option(0.01, "result", least=0)
    momentum: float = option(0.9, "result", least=0)
    nesterov: bool = option(False, "result")
    weight_decay: float = option(1e-4, "result", least=0)
    schedule: Literal["constant", "multistep", "cosine"] = option("constant", "result")
    milestones: list[float] = option([0.5, 0.75], "result")
    gamma: float = option(0.1, "result", least=0)
    warmup_epochs: int = option(0, "result", least=0)


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
        diversity: measure on the test images, each time that they are evaluated, how alike the run's networks are:
            their distance, common errors, homogeneity and collapse, into metrics.csv (fastkd analyze diversity)
        tensorboard: write curves for TensorBoard into OUT/tensorboard; needs its package
        logits_cache: keep the frozen networks' logits of each image and augmentation in CACHE/logits, and read them
            there instead of running the networks again; for methods that take nothing else from frozen networks
        logits_dtype: in which they are kept; float16 takes half the room
        logits_topk: keep so many of the likeliest classes of each row alone, and the probability of all others; 0: all.
            For methods that learn at temperature 1 from the teachers' probabilities alone: part of a run's results
    """

    device: str = option("auto", "free")
    threads: int | None = option(None, "free", least=1)
    eval_every: int = option(1, "free", least=1)
    keep: int = option(0, "free", least=0)
    save_every: int = option(0, "free", least=0)
    non_finite: Literal["stop", "skip"] = option("stop", "free")
    log_every: int = option(50, "free", least=1)
    quiet: bool = option(False, "free")
    cache: str = option("", "free")
    diversity: bool = option(False, "free")
    tensorboard: bool = option(False, "free")
    logits_cache: bool = option(False, "free")
    logits_dtype: Literal["float32", "float16"] = option("float32", "result", later=True, needs="logits_cache")
    logits_topk: int = option(0, "result", least=0, later=True, needs="logits_cache")


@dataclass
class ScaleOptions:
    """Speed and several processes (torchrun --nproc-per-node N -m fastkd train ...).

    Args:
        amp: mixed precision, by torch.autocast; fp16, with a scaled loss, on GPUs only
        accumulate: cut each batch into so many parts, one after another, to save memory; relations are within a part
        channels_last: keep feature maps in channels-last order; default on a CPU, where it is faster
        prepare_teachers: run frozen networks through copies made for inference (batch normalisation folded into the
            convolutions, channels-last order); default on a CPU without --amp, where it is faster
        compile: compile the networks that learn (torch.compile)
        cuda_graph: on a GPU, replay the networks' passes from CUDA graphs, where small networks are bound by their many
            launches; one process, without compile
        deterministic: the same bits from the same seed on a GPU, too; slower
        sync_batch_norm: several processes on GPUs: batch normalisation over the global batch (torch.nn.SyncBatchNorm)
        timeout: seconds after which a process that does not answer ends the run
    """

    amp: Literal["none", "bf16", "fp16"] = option("none", "result")
    accumulate: int = option(1, "result", least=1)
    channels_last: bool | None = option(None, "free")
    prepare_teachers: bool | None = option(None, "free")
    compile: bool = option(False, "free")
    cuda_graph: bool = option(False, "free")
    deterministic: bool = option(False, "free")
    sync_batch_norm: bool = option(False, "result", later=True)
    timeout: float = option(600.0, "free")


def _check_values(config: Settings) -> None:
    wrong = settle(config)
    if wrong:
        raise UserError(wrong)
    if not (0 <= config.validation < 1 or (config.validation > 1 and config.validation % 1 == 0)):
        raise UserError(
            f"--validation must be a fraction from 0 to below 1 or a number of images, got {config.validation!r}"
        )
    if config.label_noise >= 1:
        raise UserError(f"--label-noise must be a probability from 0 to below 1, got {config.label_noise!r}")
    if config.keep_images and config.workers:
        raise UserError(f"--keep-images needs --workers 0, got {config.workers}: workers forget after each epoch")
    if isinstance(config.timeout, bool) or not isinstance(config.timeout, int | float) or not 0 < config.timeout < 1e9:
        raise UserError(f"--timeout must be seconds above 0, got {config.timeout!r}")
    if config.cuda_graph and config.compile:
        raise UserError("--cuda-graph and --compile cannot be used together: leave out one of them")
    if config.logits_topk and not config.logits_cache:
        raise UserError(f"--logits-topk {config.logits_topk} says what --logits-cache keeps: give that, too")
    if config.logits_topk and config.logits_dtype != "float32":
        raise UserError("--logits-topk and --logits-dtype cannot be used together: its form is fixed, leave out one")
    if config.nesterov and config.momentum == 0:
        raise UserError("--nesterov needs --momentum above 0, got 0")
    if not all(math.isfinite(m) and m > 0 for m in config.milestones):
        raise UserError(f"--milestones must be positive epochs or fractions of the epochs, got {config.milestones}")


@dataclass
class Settings(DataOptions, NetworkOptions, OptimizationOptions, LoopOptions, ScaleOptions):
    """What `train` and `compare` have in common."""

    def __post_init__(self) -> None:
        _check_values(self)
        if self.threads is None and self.data == "digits":
            self.threads = 1
        if self.num_teachers is None:
            self.num_teachers = 3 if self.data == "digits" else 5
        # Settled here and kept in config.yaml: a run that is resumed for more epochs keeps the guides it has.
        self.guide_epochs = self.guide_epochs or self.epochs
        self.own_epochs = self.own_epochs or self.epochs
