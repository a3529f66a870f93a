"""Conversations: one tokenisation, labels from offsets, images in their places."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from lavi.batch import IGNORE
from lavi.chat import IMAGE, TEMPLATES, Chat
from lavi.errors import UserError

TWO_TURNS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what colour?"}]},
    {"role": "assistant", "content": "red", "family": "colour", "level": "easy"},
    {
        "role": "user",
        "content": [{"type": "text", "text": "and "}, {"type": "image"}, {"type": "text", "text": "this?"}],
    },
    {"role": "assistant", "content": "blue", "family": "colour", "level": "easy"},
]


@pytest.fixture
def chat(tokenizer: str) -> Chat:
    return Chat(AutoTokenizer.from_pretrained(tokenizer))


def test_the_conversation_as_trained(chat: Chat) -> None:
    encoded = chat.encode(TWO_TURNS, images=2)
    text = "<|user|>what colour?<|assistant|>red<|end|><|user|>and this?<|assistant|>blue<|end|>"
    assert chat.tokenizer.decode(encoded.ids) == text
    trained = [i for i, label in enumerate(encoded.labels) if label != IGNORE]
    assert chat.tokenizer.decode([encoded.ids[i] for i in trained]) == "red<|end|>blue<|end|>"
    assert all(encoded.labels[i] == encoded.ids[i] for i in trained)
    assert [chat.tokenizer.decode(encoded.ids[t.start : t.stop]) for t in encoded.turns] == [
        "red<|end|>",
        "blue<|end|>",
    ]
    assert [(t.family, t.level) for t in encoded.turns] == [("colour", "easy")] * 2


def test_images_stand_where_the_conversation_puts_them(chat: Chat) -> None:
    encoded = chat.encode(TWO_TURNS, images=2)
    before = [chat.tokenizer.decode(encoded.ids[:column]) for column in encoded.image_columns]
    assert before == ["<|user|>", "<|user|>what colour?<|assistant|>red<|end|><|user|>and "]


def test_the_prompt_is_the_beginning_of_what_was_trained(chat: Chat) -> None:
    whole, prompt = chat.encode(TWO_TURNS, images=2), chat.encode_prompt(TWO_TURNS[:3], images=2)
    assert whole.ids[: len(prompt.ids)] == prompt.ids
    assert whole.image_columns == prompt.image_columns


def test_images_without_places_stand_before_the_question(chat: Chat) -> None:
    encoded = chat.encode([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], images=2)
    assert encoded.image_columns == [1, 1]


@pytest.mark.parametrize("template", TEMPLATES)
def test_named_templates_train_answer_and_end(tokenizer: str, template: str) -> None:
    chat = Chat(AutoTokenizer.from_pretrained(tokenizer), template)
    encoded = chat.encode(TWO_TURNS, images=2)
    trained = chat.tokenizer.decode([i for i in encoded.labels if i != IGNORE])
    end = {"chatml": "<|im_end|>", "vicuna": "<|end|>"}[template]
    assert trained.replace(" ", "") == f"red{end}blue{end}"


TRIMS = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + (m['content'] | trim) }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_answers_are_found_whatever_was_encoded_before(tokenizer: str) -> None:
    """What stands around the words is measured once: a template that changes the words must not be taken in by it."""
    used = Chat(AutoTokenizer.from_pretrained(tokenizer))
    used.template = TRIMS
    for question, answer in [("what?", "red"), (" what? ", "red"), ("what?", " red "), ("", "blue"), ("a  ", "  b")]:
        new = Chat(AutoTokenizer.from_pretrained(tokenizer))
        new.template = TRIMS
        asked = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for messages in (asked, asked + asked):
            assert used.encode(messages, images=0) == new.encode(messages, images=0), (question, answer)


def test_words_that_look_like_an_image_are_words(chat: Chat) -> None:
    encoded = chat.encode(
        [{"role": "user", "content": f"a <image> {IMAGE}"}, {"role": "assistant", "content": "b"}], images=0
    )
    assert encoded.image_columns == []
    assert "<image>" in chat.tokenizer.decode(encoded.ids)


def test_what_cannot_be_encoded_is_said(chat: Chat, tokenizer: str) -> None:
    with pytest.raises(UserError, match="places for 2 images and comes with 1"):
        chat.encode(TWO_TURNS, images=1)
    with pytest.raises(UserError, match="did you mean 'vicuna'"):
        Chat(chat.tokenizer, "vicunna")
    bare = AutoTokenizer.from_pretrained(tokenizer)
    bare.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        Chat(bare)
    chat.template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %} {% endif %}"
    with pytest.raises(UserError, match="rewrites earlier turns"):
        chat.encode(TWO_TURNS, images=2)
    spaced = "{% for m in messages %}{% if m['role'] == 'assistant' %}is {% endif %}{{ m['content'] }}{% endfor %}"
    chat.template = spaced + "{% if add_generation_prompt %}is {% endif %}"
    with pytest.raises(UserError, match="ends in the middle of one"):
        chat.encode(TWO_TURNS, images=2)
    chat.template = "{% for m in messages %}{{ messages | length }}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="rewrites earlier turns"):
        chat.encode(TWO_TURNS, images=2)
