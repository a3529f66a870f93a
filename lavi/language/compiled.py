"""Decode steps as one compiled graph: a cache of a fixed size, ``torch.compile``, and CUDA graphs on a GPU.

    prompt   as ever                                     its keys and values into a cache that has room for the answer
    tokens   one graph for all steps and all prompts     the context of :meth:`VisualContext.behind_prompt` goes in

The loop is transformers' own. The cache stays with the language model and grows by :data:`BLOCK` columns, so that a
longer prompt seldom needs a new graph. Layers that keep what they read in a cache of their own (VISOR, FastV,
PyramidDrop) cannot be compiled.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import CompileConfig, PreTrainedModel, StaticCache

from lavi.errors import UserError, one_line
from lavi.language.context import VisualContext

BLOCK = 256
"""Columns by which the cache grows."""
GRAPHS = 64
"""Of one model, at most: for each number of rows, with and without images and padding, for each size of the cache."""
BACKEND = "inductor"
_numbers = count()
COMPILERS = (os.environ.get("CXX", "g++"), "g++", "clang++")


def check_compiler(setting: str) -> None:
    """That there is what torch compiles with.

    Args:
        setting: what asks for it.

    Raises:
        UserError: no C++ compiler.
    """
    if not any(shutil.which(name) for name in COMPILERS):
        raise UserError(f"{setting} needs a C++ compiler, and there is none: install g++, or leave {setting} out.")


def call_of(model: Any, config: CompileConfig) -> Callable[..., Any]:
    """The compiled forward call of a model, apart from that of any other: also of one of its class.

    torch keeps graphs by the code that they were made of, and what is in a model is not looked at again: so each has
    code of its own, and new code when it is cast or moved.
    """
    check_compiler("language.compile")
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    key = (id(model), model.dtype, model.device, repr(config.to_dict()))
    kept, call = model.__dict__.get("_compiled_apart", (None, None))
    if kept != key:

        def step(*args: Any, **kwargs: Any) -> Any:
            return model(*args, **kwargs)

        apart = FunctionType(
            step.__code__.replace(co_name=f"step_{next(_numbers)}"), globals(), closure=step.__closure__
        )
        call = torch.compile(apart, **config.to_dict())
        model.__dict__["_compiled_apart"] = (key, call)
    return call  # type: ignore[return-value]


class DecodeCompiler:
    """The compiled decode step of a language model, and the cache that it works on."""

    def __init__(self) -> None:
        self.cache: StaticCache | None = None
        self.columns = 0
        self.made_for: tuple[Any, ...] = ()
        """Rows, and what the cache's tensors are bound to."""

    def serves(self, hf: PreTrainedModel) -> bool:
        """Whether a step can be compiled now: not while the model trains, nor while ranks share its weights."""
        return not hf.training and not any(isinstance(parameter, DTensor) for parameter in hf.parameters())

    def settings(self, hf: PreTrainedModel, *, rows: int, columns: int) -> dict[str, Any]:
        """What transformers' ``generate`` is told.

        Args:
            rows: of the decoder.
            columns: of the prompt and its answer.
        """
        return {
            "past_key_values": self.cache_for(hf, rows=rows, columns=columns),
            "cache_implementation": None,
            "compile_config": self.config(hf),
        }

    def cache_for(self, hf: PreTrainedModel, *, rows: int, columns: int) -> StaticCache:
        """An empty cache with room for that; the last one, where it has."""
        autocast = torch.is_autocast_enabled(hf.device.type)
        wanted = (rows, hf.device, hf.dtype, autocast, torch.is_inference_mode_enabled())
        if self.cache is None or self.made_for != wanted or self.columns < columns:
            self.made_for, self.columns = wanted, -(-columns // BLOCK) * BLOCK
            self.cache = StaticCache(config=hf.config, max_cache_len=self.columns)
        self.cache.reset()
        return self.cache

    @staticmethod
    def config(hf: PreTrainedModel) -> CompileConfig:
        """How steps are compiled."""
        options: dict[str, Any] = {}
        if BACKEND == "inductor":
            options["triton.cudagraphs"] = hf.device.type == "cuda"
        # Modules are not looked at before each step whether they have changed: that takes a tenth of a small model's
        # step. What may change about them is looked at by `serves` and `call_of`.
        options["guard_filter_fn"] = torch.compiler.skip_guard_on_all_nn_modules_unsafe
        config = CompileConfig(fullgraph=True, backend=BACKEND, mode=None, options=options)  # type: ignore[arg-type]
        config._compile_all_devices = True  # type: ignore[assignment]
        return config

    def step(self, hf: Any, token: Tensor, mask: Tensor, vision: VisualContext | None) -> Any:
        """One step as ``generate`` takes it, behind a prompt in the cache; the output of the language model.

        Args:
            token: (B, 1), the last one chosen.
            mask: (B, S + 1), of the prompt and of this token.
        """
        inputs = hf.prepare_inputs_for_generation(
            token,
            next_sequence_length=1,
            past_key_values=self.cache,
            attention_mask=mask,
            position_ids=mask.sum(-1, keepdim=True) - 1,
            use_cache=True,
            vision=vision,
        )
        return call_of(hf, self.config(hf))(**inputs, return_dict=True)

    def undo_step(self) -> None:
        """Take the last step back out of the cache."""
        assert self.cache is not None
        layers: list[Any] = self.cache.layers
        for layer in layers:
            layer.cumulative_length.sub_(1)
            if hasattr(layer, "cumulative_length_int"):
                layer.cumulative_length_int -= 1


@contextmanager
def refusals_of_the_compiler(family: str) -> Iterator[None]:
    """What cannot be compiled is said in one sentence.

    Raises:
        UserError: the family's step is no single graph, or there is nothing to build it with.
    """
    try:
        yield
    except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
        raise UserError(
            f"the decode step of {family} cannot be compiled ({one_line(error)}): leave language.compile out."
        ) from error
