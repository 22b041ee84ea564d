"""A small real distillation of a language model: bytes of Python's own library, two teachers, a student of a quarter.

Run: python examples/lm/distil.py --out runs/lm (a quarter of an hour on one core; run again, it goes on where it was)

The text is the .py files of the Python that runs this, without its tests; a tenth of the files is held out. Students of
one seed start from the same weights and see the same batches. OUT/rows.csv has held-out bits a byte as they are
measured, OUT/table.md and OUT/curves.png what came out. cost.py beside it measures one step by three forms of the loss.
"""

import argparse
import csv
import math
import sysconfig
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import fastkd

BYTES, TEST_FOLDERS = 256, {"test", "tests", "idle_test", "site-packages"}
MIX = dict(kd_weight=0.5, ce_weight=0.5, temperature=1.0)
STUDENTS = {  # name: teachers, options of the loss
    "alone": (0, {}),
    "one teacher": (1, MIX),
    "two teachers": (2, MIX | dict(combine="probs")),  # the divergence from the mean of their probabilities
    "two teachers, reverse": (2, MIX | dict(combine="probs", divergence="reverse")),
}
WAYS = ("eager", "whole logits", "linear")  # the same loss; 256 classes fit, so the second is what trains here


class Setting(NamedTuple):
    teachers: tuple[tuple[int, int], ...] = ((128, 4), (192, 2))  # width, layers
    student: tuple[int, int] = (64, 4)
    length: int = 128
    batch: int = 8
    teacher_steps: int = 1000
    steps: int = 300
    seeds: int = 3
    measures: int = 6  # times that a run is measured
    windows: int = 256  # held out
    files: int | None = None


TINY = Setting(((16, 1), (24, 1)), (8, 1), 32, 4, 6, 6, 2, 2, 8, 40)


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.heads = max(1, width // 32)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):  # [B, T, W]
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [B, heads, T, W / heads]
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.down(self.up(self.norms[1](x)).relu())


class Network(nn.Module):
    """Returns hidden states [B, T, W]; `head` is what turns them into logits."""

    def __init__(self, width: int, layers: int, length: int, classes: int = BYTES):
        super().__init__()
        self.embed, self.place = nn.Embedding(classes, width), nn.Parameter(torch.zeros(length, width))
        self.body = nn.Sequential(*(Block(width) for _ in range(layers)), nn.LayerNorm(width))
        self.head = nn.Linear(width, classes, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, ids):  # [B, T]
        return self.body(self.embed(ids) + self.place[: ids.shape[1]])


def text(files: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(train, held out), uint8, split by file."""
    root = Path(sysconfig.get_paths()["stdlib"])
    tops = (top for top in root.iterdir() if top.name not in TEST_FOLDERS)  # not to walk through site-packages
    names = sorted(p.relative_to(root) for top in tops for p in ([top] if top.is_file() else top.rglob("*")))
    names = [n for n in names if n.suffix == ".py" and not TEST_FOLDERS & set(n.parts)][:files]
    halves = [], []
    for name in names:
        halves[zlib.crc32(name.as_posix().encode()) % 10 == 0].append((root / name).read_bytes())
    return tuple(torch.frombuffer(bytearray(b"".join(half)), dtype=torch.uint8) for half in halves)


def windows(data, count: int, length: int, generator) -> torch.Tensor:
    """[count, length + 1]: the inputs are all but the last byte, the labels all but the first."""
    starts = torch.randint(len(data) - length - 1, (count,), generator=generator)
    return data[starts[:, None] + torch.arange(length + 1)].long()


def loss_of(way: str, student: Network, hidden, teachers, target, options: dict):
    """hidden [B, T, W]; teachers: networks' (hidden, head's weight); target [B, T]."""
    weight = student.head.weight
    if not teachers:
        return F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), target.flatten())
    if way == "linear":
        return fastkd.functional.linear_multi_teacher_kd(hidden, weight, teachers, target, **options)
    logits, of_teachers = F.linear(hidden, weight), [F.linear(h, w) for h, w in teachers]
    if way == "whole logits":
        return fastkd.functional.multi_teacher_kd(logits, of_teachers, target, **options)
    log_q = logits.flatten(0, 1).log_softmax(-1)
    log_p = torch.stack([z.flatten(0, 1).log_softmax(-1) for z in of_teachers]).logsumexp(0) - math.log(len(teachers))
    pair = (log_p, log_q) if options.get("divergence") == "reverse" else (log_q, log_p)
    kd = F.kl_div(*pair, reduction="batchmean", log_target=True)
    return options["kd_weight"] * kd + options["ce_weight"] * F.nll_loss(log_q, target.flatten())


@torch.no_grad()
def bits(network: Network, held_out) -> float:
    """Bits a byte of windows [N, T + 1], each from its first byte on: the context of a window's beginning is short."""
    total = 0.0
    for part in held_out.split(32):
        logits = network.head(network(part[:, :-1]))
        total += float(F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
    return total / held_out[:, 1:].numel() / math.log(2)


def rate(step: int, steps: int) -> float:
    warm = max(1, steps // 20)
    return min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * max(0, step - warm) / (steps - warm)) + 0.01)


def train(named: dict, guides: list, seed: int, steps: int, data, held_out, setting: Setting, bar, write) -> None:
    """All networks of `named` (name: network, number of guides, options) on the same batches."""
    bar.set_description(f"seed {seed}")
    optimizers = {n: torch.optim.AdamW(net.parameters(), 3e-3, (0.9, 0.98)) for n, (net, _, _) in named.items()}
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        batch = windows(data, setting.batch, setting.length, generator)
        inputs, target = batch[:, :-1], batch[:, 1:]
        with torch.no_grad():
            taught = [(guide(inputs), guide.head.weight) for guide in guides]
        for name, (network, count, options) in named.items():
            optimizers[name].param_groups[0]["lr"] = 3e-3 * rate(step, steps)
            loss_of("whole logits", network, network(inputs), taught[:count], target, options).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizers[name].step()
            optimizers[name].zero_grad()
        bar.update(target.numel())
        if (step + 1) * setting.measures // steps > step * setting.measures // steps:
            for name, (network, _, _) in named.items():
                write(seed, name, (step + 1) * target.numel(), bits(network, held_out))


class Rows:
    """rows.csv: written as results come; of a seed that was stopped half-way, they are made again."""

    def __init__(self, path: Path, tokens: int):
        rows = list(csv.reader(path.open()))[1:] if path.exists() else []
        self.path, self.rows = path, [(int(s), n, int(t), float(b)) for s, n, t, b in rows]
        self.done = {s for s, n, t, _ in self.rows if n == list(STUDENTS)[-1] and t == tokens}
        self.rows = [r for r in self.rows if r[0] in self.done or r[1].startswith("teacher")]
        self.write()

    def __call__(self, *row):
        self.rows.append(row)
        self.write()

    def write(self):
        with self.path.open("w", newline="") as file:
            csv.writer(file).writerows([("seed", "network", "bytes", "bits a byte"), *self.rows])


def teachers_of(out: Path, setting: Setting, data, held_out, bar, write: Rows) -> list[Network]:
    guides = []
    for k, (width, layers) in enumerate(setting.teachers):
        torch.manual_seed(100 + k)
        name, path = f"teacher {k + 1}", out / f"teacher-{k + 1}.pt"
        network = Network(width, layers, setting.length)
        if path.exists():
            network.load_state_dict(torch.load(path, weights_only=True))
        else:
            write.rows = [r for r in write.rows if r[1] != name]
            train({name: (network, 0, {})}, [], 100 + k, setting.teacher_steps, data, held_out, setting, bar, write)
            torch.save(network.state_dict(), path)
        guides.append(network.requires_grad_(False))
    return guides


def table(rows: list) -> str:
    lines = ["| network | held-out bits a byte | less than alone |", "| --- | --- | --- |"]
    last = {(s, n): b for s, n, _, b in rows}
    alone = torch.tensor([b for (_, n), b in last.items() if n == "alone"])
    for name in dict.fromkeys(n for _, n, _, _ in rows):
        found = torch.tensor([b for (_, n), b in last.items() if n == name])
        shown = f"{found[0]:.3f} |"  # there is one of each teacher
        if not name.startswith("teacher"):
            less = alone - found
            shown = f"{found.mean():.3f} ± {found.std():.3f} | {less.mean():.3f} ± {less.std():.3f}"
        lines.append(f"| {name} | {shown} |")
    return "\n".join(lines) + "\n"


def plot(path: Path, rows: list) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for name in STUDENTS:
        tokens = sorted({t for _, n, t, _ in rows if n == name})
        values = torch.tensor([[b for _, n, t, b in rows if n == name and t == at] for at in tokens])
        axes.plot(tokens, values.mean(1), marker=".", label=name)
        axes.fill_between(tokens, values.amin(1), values.amax(1), alpha=0.2)
    for name in (n for n in dict.fromkeys(r[1] for r in rows) if n.startswith("teacher")):
        axes.axhline(next(b for _, n, _, b in reversed(rows) if n == name), ls=":", color="grey")
    axes.set(xlabel="bytes read by the student", ylabel="held-out bits a byte", title="dotted: the teachers")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/lm"))
    parser.add_argument("--tiny", action="store_true", help="a run of seconds, to see that it works")
    given = parser.parse_args(arguments)
    setting, out = TINY if given.tiny else Setting(), given.out
    out.mkdir(parents=True, exist_ok=True)
    data, held_out = text(setting.files)
    held_out = windows(held_out, setting.windows, setting.length, torch.Generator().manual_seed(0))
    tokens = setting.steps * setting.batch * setting.length
    write = Rows(out / "rows.csv", tokens)
    new = sum(not (out / f"teacher-{k + 1}.pt").exists() for k in range(len(setting.teachers)))
    seeds = [s for s in range(setting.seeds) if s not in write.done]
    total = (new * setting.teacher_steps + len(seeds) * setting.steps) * setting.batch * setting.length
    bar = tqdm(total=total, unit="bytes", unit_scale=True, mininterval=2)
    guides = teachers_of(out, setting, data, held_out, bar, write)
    for seed in seeds:
        named = {}
        for name, (count, options) in STUDENTS.items():
            torch.manual_seed(seed)  # the same weights for each
            named[name] = (Network(*setting.student, setting.length), count, options)
        train(named, guides, seed, setting.steps, data, held_out, setting, bar, write)
    bar.close()
    plot(out / "curves.png", write.rows)
    lines = table(write.rows)
    (out / "table.md").write_text(lines)
    print("\n" + lines)
    return lines


if __name__ == "__main__":
    main()
