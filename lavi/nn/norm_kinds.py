"""What a norm computes, found out by feeding it numbers."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from lavi.nn.modulated_norm import AFFINES, NormKind, normalise


def kind_of(norm: nn.Module, width: int) -> NormKind | None:
    """What a norm computes, by feeding it numbers; None if it is no norm of a known kind.

    A copy on the host is probed, so weights may be on meta. Nothing is read by name: families name their eps
    differently, or hide it in ``forward`` (OLMo).
    """
    probe = copy.deepcopy(norm).to_empty(device="cpu").float()
    for name, parameter in probe.named_parameters():
        nn.init.zeros_(parameter) if "bias" in name else nn.init.ones_(parameter)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, width, generator=generator, device="cpu") + 1.0
    with torch.no_grad(), torch.device("cpu"):
        y = probe(x)
        for centred in (True, False):
            xhat = normalise(x, 0.0, centred=centred)
            factor = float((y * xhat).sum() / xhat.square().sum())  # 1, or 2 where the weight means (1 + w)
            if torch.allclose(y, factor * xhat, atol=1e-3):
                eps = _eps_of(probe, xhat / xhat.square().mean(-1, keepdim=True).sqrt(), factor)
                return (_as_layer_norm if centred else _to_the_last_bit)(norm, probe, NormKind(eps, centred))
    return None


def _to_the_last_bit(norm: nn.Module, probe: nn.Module, kind: NormKind) -> NormKind:
    """The kind with the affine formula and the eps that give the norm's own output bit for bit, if there are such.

    Args:
        probe: a copy of the norm on the host, in fp32.
    """
    names = [name for name, _ in (*norm.named_parameters(), *norm.named_buffers())]
    exact = [value for value in vars(norm).values() if isinstance(value, float)]
    if names != ["weight"] or not exact:
        return kind
    eps = min(exact, key=lambda value: abs(value - kind.eps))
    generator = torch.Generator().manual_seed(1)
    x = 3 * torch.randn(16, *probe.weight.shape, generator=generator, device="cpu")  # type: ignore[union-attr, misc]
    with torch.no_grad(), torch.device("cpu"):
        nn.init.normal_(probe.weight, generator=generator)  # type: ignore[arg-type]
        for name, affine in AFFINES.items():
            same = [
                torch.equal(
                    probe.to(of_weight)(x.to(of_x)), affine(normalise(x.to(of_x), eps, centred=False), w, None, of_x)
                )
                for of_weight in (torch.float32, torch.bfloat16)
                for of_x in (torch.float32, torch.bfloat16)
                if isinstance(w := probe.to(of_weight).weight, Tensor)
            ]
            if all(same):
                return NormKind(eps, centred=False, affine=name)
    return kind


def _as_layer_norm(norm: nn.Module, probe: nn.Module, kind: NormKind) -> NormKind:
    """The kind with the formula of torch's layer norm, if that is what a weight and a bias do in it."""
    if {name for name, _ in norm.named_parameters()} not in ({"weight"}, {"weight", "bias"}):
        return kind
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad(), torch.device("cpu"):
        for parameter in probe.parameters():
            nn.init.normal_(parameter, generator=generator)
        weight, bias = probe.weight, getattr(probe, "bias", None)
        assert isinstance(weight, Tensor)
        x = torch.randn(16, len(weight), generator=generator)
        y = AFFINES["layer norm"](normalise(x, kind.eps, centred=True), weight, bias, x.dtype)
        same = torch.allclose(probe(x), y, rtol=1e-4, atol=1e-4)
    return kind._replace(affine="layer norm") if same else kind


def _eps_of(probe: nn.Module, unit: Tensor, factor: float) -> float:
    """From an input of variance v: its output is factor * sqrt(v / (v + eps)) times as long as the unit input."""
    v = 1e-6
    shrunk = float((probe(unit * v**0.5) * unit).sum() / unit.square().sum()) / factor
    return v * (1 / shrunk**2 - 1)
