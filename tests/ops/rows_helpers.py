"""What the tests of the operations over rows share: how logits may lie in memory, and one number to differentiate."""

import torch

# Of logits [..., R, C].
LAYOUTS = {
    "stacked": lambda z: z,
    "row stride": lambda z: torch.cat([z, z], -1)[..., : z.shape[-1]],
    "offset": lambda z: torch.cat([z[..., :1], z], -1)[..., 1:],
    "transposed": lambda z: z.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every other class": lambda z: z.repeat_interleave(2, -1)[..., ::2],
    "every other row": lambda z: z.repeat_interleave(2, -2)[..., ::2, :],
}


def beside(tensor, options):
    """Options whose tensors are on the device of `tensor`, as weights of rows must be."""
    return {k: v.to(tensor.device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def weighted_sum(loss):
    """Of all elements, each with another weight: a gradient that went to another row would show."""
    weights = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype, device=loss.device).reshape(loss.shape)
    return (loss * weights).sum()
