"""What the examples of this folder share: language models and data of no use but their size, without a download."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, PROMPT, LENGTH = 96, 4, 12


def model(width: int, seed: int, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    """In float64, so that two ways to the same weights can be compared to the last digits."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, initializer_range=0.3, use_cache=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


def frozen(width: int, seed: int, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    return model(width, seed, vocabulary).eval().requires_grad_(False)


def samples(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Token ids, and labels that leave out the prompt and, sample by sample, a longer piece of the end."""
    generator, found = torch.Generator().manual_seed(seed), []
    for k in range(count):
        ids = torch.randint(3, VOCABULARY, (LENGTH,), generator=generator).tolist()
        end = LENGTH - k % 5
        found.append({"input_ids": ids, "labels": [-100] * PROMPT + ids[PROMPT:end] + [-100] * (LENGTH - end)})
    return found


def stack(batch: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([torch.as_tensor(sample[name]) for sample in batch]) for name in batch[0]}


def same(ours: torch.nn.Module, other: torch.nn.Module, digits: float = 1e-10) -> float:
    """The largest relative difference between two models' weights, which must be below `digits`."""
    pairs = zip(ours.parameters(), other.parameters(), strict=True)
    apart = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
    assert apart < digits, f"weights are {apart:.1e} apart"
    return apart
