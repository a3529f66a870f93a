"""A linear head and the cross-entropy in one kernel: Liger's, on a GPU, where it is installed (extra ``kernels``).

    hidden (n, D) -> logits of some tokens (m, vocabulary) -> each overwritten by its own gradient -> gradients (n, D)

Plain code keeps logits, their float32 copy and their gradient; the kernel keeps one buffer of the model's dtype. It is
tried on a small input first, and not used where its losses or gradients are not those of the plain formula.
"""

from __future__ import annotations

import importlib.util
import warnings
from functools import lru_cache
from typing import TypeGuard

import torch
from torch import Tensor, nn

from lavi.nn.norm_kernel import INTERPRETED

IS_INSTALLED = importlib.util.find_spec("liger_kernel") is not None
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 4e-2, torch.float16: 1e-2}
"""Of a loss or gradient, of the largest; matrix products on a GPU may round float32 to 10 bits."""


def is_plain_linear(head: object) -> TypeGuard[nn.Linear]:
    """Whether a head is a linear layer and nothing else: no adapter, no hook, no quantized or sharded weight."""
    if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks:
        return False
    return type(head.weight.data) is Tensor


def runs_kernel(hidden: Tensor) -> bool:
    """Whether the kernel serves this input."""
    if not IS_INSTALLED or not (hidden.is_cuda or INTERPRETED) or hidden.dtype not in TOLERANCE:
        return False
    return _is_equal(hidden.device.type, hidden.dtype)


def fused_scores(head: nn.Linear, hidden: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """log_probability (n,) and is_likeliest (n,) of the tokens ``truth`` (n,) after the states ``hidden`` (n, D)."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    said = liger_fused_linear_cross_entropy(
        hidden,
        head.weight,
        truth,
        head.bias,
        reduction="none",
        accum_dtype=torch.float32,
        return_predicted_tokens=True,
    )
    return -said.loss, said.predicted_tokens == truth


@lru_cache
def _is_equal(device: str, dtype: torch.dtype) -> bool:
    """Whether losses and gradients of the kernel are those of the plain formula here; tried once."""
    try:
        # The first to ask may be a validation, whose tensors have no gradients.
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
            ours, theirs = _losses_and_gradients(device, dtype)
    except Exception as error:  # noqa: BLE001  (whatever another's kernel raises, plain code serves)
        warnings.warn(f"Liger's fused cross-entropy does not run here, plain code is used: {error}", stacklevel=2)
        return False
    pairs = zip(ours, theirs, strict=True)
    if all((a - b).abs().max() <= TOLERANCE[dtype] * b.abs().max() for a, b in pairs):
        return True
    warnings.warn("Liger's fused cross-entropy gives other gradients here: plain code is used.", stacklevel=2)
    return False


def _losses_and_gradients(device: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Of the kernel and of the plain formula, on one small input."""
    generator = torch.Generator().manual_seed(0)
    head = nn.utils.skip_init(nn.Linear, 64, 500, device=device, dtype=dtype)  # no draw that a training would miss
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    hidden = torch.randn(80, 64, generator=generator).to(device, dtype).requires_grad_()  # (n, D)
    truth = torch.randint(500, (80,), generator=generator).to(device)  # (n,)
    weights = torch.randn(80, generator=generator).to(device)  # (n,)
    fused, _ = fused_scores(head, hidden, truth)
    plain = -nn.functional.cross_entropy(head(hidden).float(), truth, reduction="none")
    ours, theirs = (
        [said.detach(), *torch.autograd.grad((weights * said).sum(), [hidden, *head.parameters()])]
        for said in (fused, plain)
    )
    return ours, theirs
