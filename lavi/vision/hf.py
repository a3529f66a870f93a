"""Vision towers of transformers (SigLIP, CLIP, ...): from a hub name, a local folder or a bare configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PretrainedConfig

from lavi.errors import UserError, nearest
from lavi.nn.flops import linear_flops
from lavi.vision.base import VisionBackbone, on_meta


class HFVision(VisionBackbone):
    """A transformers vision tower, cut after the layer whose features are used: later layers are never run.

    Args:
        source: hub name or local folder of a checkpoint (a vision tower, or a two-tower model that holds one).
        config: instead of ``source``, a bare configuration: ``model_type`` and its keys; weights start random.
        layer: whose output to use, as in ``hidden_states``: -1 the last layer's, -2 the one before.

    Raises:
        UserError: neither or both of ``source`` and ``config``; nothing there; no such layer.
    """

    def __init__(self, source: str | None = None, *, config: dict[str, Any] | None = None, layer: int = -1) -> None:
        super().__init__()
        if (source is None) == (config is None):
            raise UserError("a vision tower takes either 'source' (a checkpoint) or 'config' (a bare configuration).")
        settings = _config(source, config)
        if hasattr(settings, "vision_use_head"):
            settings.vision_use_head = False  # SigLIP's pooling head would run, and none of its output be used
        if source is not None and not on_meta():
            self.tower = AutoModel.from_pretrained(source, config=settings)
        else:
            self.tower = AutoModel.from_config(settings)
        self.image_processor = _image_processor(source, settings)
        self.layers = _cut(self.tower, layer, settings.num_hidden_layers)
        self.width = settings.hidden_size
        side = settings.image_size // settings.patch_size
        self.grid = (side, side)
        self._has_class_token = any(name.endswith("class_embedding") for name, _ in self.tower.named_parameters())
        self._pixel_shape = (settings.num_channels, settings.image_size, settings.image_size)

    @property
    def pixel_shape(self) -> tuple[int, int, int]:
        return self._pixel_shape

    def preprocess(self, image: Image.Image) -> Tensor:
        return self.image_processor(image, return_tensors="pt")["pixel_values"][0]

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = self.tower(pixels, output_hidden_states=True).hidden_states[-1]  # (views, [1 +] N, Dv)
        return hidden[:, hidden.shape[1] - self.tokens :]  # a class token, where there is one, stands first

    def flops(self, views: int) -> float:
        settings = self.tower.config
        tokens = self.tokens + int(self._has_class_token)
        width, inner = settings.hidden_size, settings.intermediate_size
        patches = linear_flops(self.tokens, settings.num_channels * settings.patch_size**2, width)
        attention = 4 * linear_flops(tokens, width, width) + 4.0 * tokens * tokens * width
        feed_forward = linear_flops(tokens, width, inner) + linear_flops(tokens, inner, width)
        return views * (patches + self.layers * (attention + feed_forward))

    def save_pretrained(self, folder: Path) -> None:
        """Write the tower and its preprocessing as an ordinary checkpoint folder."""
        self.tower.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)


def _config(source: str | None, config: dict[str, Any] | None) -> PretrainedConfig:
    if source is None:
        assert config is not None
        keys = dict(config)
        settings: PretrainedConfig = AutoConfig.for_model(keys.pop("model_type", "siglip_vision_model"), **keys)
    else:
        try:
            settings = AutoConfig.from_pretrained(source)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"no vision tower at '{source}' (neither a local folder nor a reachable hub name): {reason}"
            ) from None
    return getattr(settings, "vision_config", settings)


def _image_processor(source: str | None, settings: PretrainedConfig) -> Any:
    if source is not None:
        return AutoImageProcessor.from_pretrained(source, backend="pil")
    from transformers import SiglipImageProcessorPil

    side = settings.image_size
    return SiglipImageProcessorPil(size={"height": side, "width": side})


def _cut(tower: nn.Module, layer: int, layers: int) -> int:
    """Drop the encoder layers after ``layer``; how many are left."""
    keep = layer + 1 + (layers if layer < 0 else 0)
    if not 1 <= keep <= layers:
        known = nearest(str(layer), [str(i) for i in range(-layers, 0)])
        raise UserError(f"the vision tower has {layers} layers, none is layer {layer}: {known}")
    stacks = [m for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    if len(stacks) != 1:
        raise UserError(f"cannot tell which modules of {type(tower).__name__} are its {layers} encoder layers.")
    del stacks[0][keep:]
    return keep
