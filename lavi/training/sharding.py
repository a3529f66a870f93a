"""Sharding parameters, gradients and optimiser state over ranks (FSDP2)."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor

from lavi.checkpoints.trained_weights import saved_tensors
from lavi.errors import UserError
from lavi.model import VisionLanguageModel


class FSDP2(ModelParallelStrategy):
    """Shards parameters, gradients and optimiser state over all ranks (FSDP2); a checkpoint is one whole file.

    trainer: {strategy: {_target_: lavi.training.sharding.FSDP2}, devices: 8}
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights that a checkpoint keeps, whole, on the first rank; the rest is never gathered."""
        state = {}
        assert self.lightning_module is not None
        for name, tensor in saved_tensors(self.lightning_module).items():
            whole = tensor.detach()
            if isinstance(whole, DTensor):  # buffers are whole on each rank
                whole = whole.full_tensor()
            if self.is_global_zero:
                state[name] = whole.cpu()
        return state


def shard(model: VisionLanguageModel, mesh: Any) -> None:
    """Shard each decoder layer by itself, and the rest together; a second time changes nothing.

    Ranks gather weights and reduce gradients in one order, whatever their batches hold: so the tower, which a batch
    without images does not call, and the fusion, which the layers call on their way, are no groups of their own.

    Raises:
        UserError: trained weights of several dtypes would be sharded together, or weights are quantized.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    if isinstance(model, FSDPModule):
        return
    if model.language.quantization is not None:
        raise UserError(f"weights in {model.language.quantization} cannot be sharded: train without FSDP2.")
    inside_layers = {id(parameter) for layer in model.language.layers for parameter in layer.parameters()}
    dtypes = {str(p.dtype) for p in model.parameters() if p.requires_grad and id(p) not in inside_layers}
    if len(dtypes) > 1:
        raise UserError(
            f"FSDP2 shards all but the decoder layers together, and of that {' and '.join(sorted(dtypes))} train: set "
            "model.language.dtype=float32 (and trainer.precision=bf16-mixed)."
        )
    for layer in model.language.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for method in ("token_scores", "generate", "prefill", "with_backbone_features"):
        register_fsdp_forward_method(model, method)
