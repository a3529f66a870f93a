"""Where visual tokens stand, told to the layers that read them beside the sequence and have no other position."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lavi.language.subsequence import take
from lavi.nn.formulas import linear_flops

KERNEL = 7
"""Of the position convolution, in tokens (the paper's)."""


class VisualPositions(nn.Module):
    """A depthwise convolution along the visual tokens (the paper's), and an embedding of their image (chosen here).

    The embedding is as large as its token, times what is learned: beside tokens of any size images can be told apart.

    Args:
        width: D.
        images: images of one conversation told apart; later ones share the last embedding.
    """

    def __init__(self, width: int, images: int) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(width, width, KERNEL, padding=KERNEL // 2, groups=width)
        self.images = nn.Embedding(images, width)
        nn.init.normal_(self.images.weight, std=0.02)

    def forward(self, visual: Tensor, image: Tensor, images: int) -> Tensor:
        """V (B, M, D) with each token told where it stands, and in which image.

        Args:
            image: (B, M) number of its image in the row. Images keep half a kernel apart: text between two of them
                reads the first, which must not have seen the second.
            images: the most that a row has.
        """
        gap = KERNEL // 2
        tokens = visual.to(self.convolution.weight.dtype)
        columns = torch.arange(image.shape[1], device=image.device) + gap * image  # (B, M)
        wide = tokens.new_zeros(tokens.shape[0], tokens.shape[1] + gap * images, tokens.shape[2])
        spaced = wide.scatter(1, columns[..., None].expand_as(tokens), tokens)
        near = take(self.convolution(spaced.transpose(1, 2)).transpose(1, 2), columns)  # (B, M, D)
        number = image.clamp(max=self.images.num_embeddings - 1)
        size = tokens.detach().square().mean(-1, keepdim=True).sqrt()  # (B, M, 1)
        return visual + (near + size * self.images(number)).to(visual.dtype)

    def flops(self, visual: int) -> float:
        """FLOPs of ``visual`` tokens of one image."""
        return linear_flops(visual + KERNEL // 2, KERNEL, self.images.embedding_dim)
