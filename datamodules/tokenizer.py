"""A small byte-level BPE tokenizer with a chat template, trained on a data set's own sentences."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lavi.errors import UserError, reason

PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"

CHAT_TEMPLATE = (
    f"{{% for m in messages %}}{{{{ '{USER}' if m['role'] == 'user' else '{ASSISTANT}' }}}}{{{{ m['content'] }}}}"
    f"{{% if m['role'] == 'assistant' %}}{END}{{% endif %}}{{% endfor %}}"
    f"{{% if add_generation_prompt %}}{ASSISTANT}{{% endif %}}"
)


def train_tokenizer(sentences: Iterable[str], folder: Path, *, vocabulary: int = 512) -> None:
    """Train on ``sentences`` and write an ordinary tokenizer folder; any text can be written with it, byte by byte.

    Raises:
        UserError: the folder cannot be written.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, USER, ASSISTANT, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, additional_special_tokens=[USER, ASSISTANT]
    )
    fast.chat_template = CHAT_TEMPLATE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fast.save_pretrained(folder)
    except Exception as error:  # noqa: BLE001 - tokenizers raises what its Rust side says as a bare Exception
        raise UserError(f"the tokenizer folder {folder} cannot be written ({reason(error)}).") from None
