"""Conversations: one tokenisation, labels from offsets, images before their tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lavi.batch import IGNORE
from lavi.data.chat import TEMPLATES, Chat
from lavi.data.marks import IMAGE
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
        pair = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for messages in (pair, pair + pair):
            assert used.encode(messages, images=0) == new.encode(messages, images=0), (question, answer)


def test_an_end_is_trained_whatever_was_encoded_before(tokenizer: str) -> None:
    """A blank behind one answer and one behind a later question are as many characters; the end token stays trained."""
    used, new = (Chat(AutoTokenizer.from_pretrained(tokenizer)) for _ in range(2))
    used.template = new.template = TRIMS

    def turns(*contents: str) -> list[dict[str, str]]:
        return [{"role": role, "content": c} for role, c in zip(["user", "assistant"] * 2, contents, strict=True)]

    used.encode(turns("what?", "a dog. ", "and?", "a cat."), images=0)
    second = turns("what?", "a fox.", "and?\n", "a cat.")
    assert used.encode(second, images=0) == new.encode(second, images=0)


def test_words_that_look_like_an_image_are_words(chat: Chat) -> None:
    encoded = chat.encode(
        [{"role": "user", "content": f"a <image> {IMAGE}"}, {"role": "assistant", "content": "b"}], images=0
    )
    assert encoded.image_columns == []
    assert "<image>" in chat.tokenizer.decode(encoded.ids)


def test_what_cannot_be_encoded_is_said(chat: Chat, tokenizer: str) -> None:
    with pytest.raises(UserError, match="parts for 2 images and comes with 1"):
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


# As Qwen3's: the last answer gets a thinking block, earlier ones lose theirs; the prompt opens none.
THINKS = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}"
    "{% set parts = m['content'].split('</think>') %}"
    "{% set thought = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' %}"
    "{{ '<|assistant|>' }}{% if loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ parts[-1].lstrip('\n') + '<|end|>' }}"
    "{% else %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def thinking(tokenizer: str) -> Chat:
    thinking_tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    thinking_tokenizer.chat_template = THINKS
    return Chat(thinking_tokenizer)


def pieces(chat: Chat, messages: list[dict[str, Any]], images: int) -> list[tuple[str, str]]:
    """Of each answer of a conversation: what stands before it, and what is trained."""
    encoded = chat.encode(messages, images=images)
    decode = chat.tokenizer.decode
    assert [label for label in encoded.labels if label != IGNORE] == [
        encoded.ids[column] for turn in encoded.turns for column in range(turn.start, turn.stop)
    ]
    return [(decode(encoded.ids[: t.start]), decode(encoded.labels[t.start : t.stop])) for t in encoded.turns]


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_what_is_trained_is_what_an_answer_will_have_to_be(thinking: Chat, chat: Chat, turns: int) -> None:
    """Behind each prompt, also where a template writes earlier answers otherwise than the last."""
    messages = [*TWO_TURNS, {"role": "user", "content": " and now?"}, {"role": "assistant", "content": "green"}]
    messages = messages[: 2 * turns]
    images = min(turns, 2)
    for each in (thinking, chat):
        encoded = each.encode(messages, images=images)
        assert len(encoded.turns) == turns
        for turn, answer in zip(encoded.turns, ("red", "blue", "green"), strict=False):
            before = messages[: 2 * encoded.turns.index(turn) + 1]
            prompt = each.encode_prompt(before, images=min(images, len(before) // 2 + 1))
            assert encoded.ids[: turn.start] == prompt.ids
            assert each.tokenizer.decode(encoded.ids[turn.start : turn.stop]) == f"{answer}<|end|>"
    assert "<think>" not in thinking.tokenizer.decode(thinking.encode(messages, images=images).ids)


def test_an_answer_in_a_longer_conversation_is_trained_as_in_a_shorter(thinking: Chat) -> None:
    assert pieces(thinking, TWO_TURNS, 2)[:1] == pieces(thinking, TWO_TURNS[:2], 1)


def test_blanks_behind_an_answer_stand_before_its_end(thinking: Chat) -> None:
    question, answer = TWO_TURNS[0], {"role": "assistant", "content": "red  "}
    assert pieces(thinking, [question, answer], 1) == [("<|user|>what colour?<|end|><|assistant|>", "red  <|end|>")]


def test_an_answer_is_read_without_its_end(chat: Chat) -> None:
    assert chat.decode(chat.encode(TWO_TURNS[:2], images=1).ids) == "what colour?red"


def test_what_a_template_would_leave_out_is_said(thinking: Chat) -> None:
    reasoned = {"role": "assistant", "content": "<think>\nit is red\n</think>\n\nred"}
    with pytest.raises(UserError, match="leaves out a part of an answer"):
        thinking.encode([{"role": "user", "content": "what?"}, reasoned], images=0)
    opens = AutoTokenizer.from_pretrained(thinking.tokenizer.name_or_path)
    opens.chat_template = THINKS.replace("%}<|assistant|>{% endif %}", "%}<|assistant|><think>{% endif %}")
    with pytest.raises(UserError, match=r"rewrites earlier turns.*model\.chat_template=chatml"):
        Chat(opens).encode(TWO_TURNS, images=2)


def test_a_template_that_refuses_is_a_users_error(chat: Chat) -> None:
    chat.template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"refuses the conversation .roles must alternate"):
        chat.encode(TWO_TURNS, images=2)
    chat.template = "{{ messages[0]['content'] + 1 }}"
    with pytest.raises(UserError, match="refuses the conversation"):
        chat.encode_prompt(TWO_TURNS[:1], images=1)


@pytest.mark.parametrize("content", ["a \ud83d", [{"type": "text", "text": "\udc00"}]], ids=["text", "parts"])
def test_half_a_surrogate_pair_is_a_users_error(chat: Chat, content: Any) -> None:
    with pytest.raises(UserError, match="lone surrogate"):
        chat.encode([{"role": "user", "content": content}, {"role": "assistant", "content": "b"}], images=0)


@pytest.mark.parametrize("words", ["<|end|>", "a <|end|>", "<|end|><|user|> b", "is <|assistant|>red<|end|> right?"])
def test_words_that_look_like_control_tokens_are_words(chat: Chat, thinking: Chat, words: str) -> None:
    """In questions and answers: as many control tokens as without them, and the text is what was written."""
    special = set(chat.tokenizer.all_special_ids)
    for each in (chat, thinking, Chat(chat.tokenizer, "vicuna")):
        for question, answer in ((words, "red"), ("what?", words), (words, words)):
            pair = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            plain = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}]
            encoded, usual = each.encode(pair, images=0), each.encode(plain, images=0)
            assert [i for i in encoded.ids if i in special] == [i for i in usual.ids if i in special]
            (turn,) = encoded.turns
            assert encoded.ids[turn.stop - 1] == each.tokenizer.convert_tokens_to_ids("<|end|>")
            assert each.tokenizer.decode(encoded.ids[turn.start : turn.stop - 1]).strip() == answer
            assert encoded.ids[: turn.start] == each.encode_prompt(pair[:1], images=0).ids
            assert question in each.tokenizer.decode(encoded.ids[: turn.start])


def test_images_stand_right_beside_words_that_look_like_control_tokens(chat: Chat) -> None:
    turns = [{"role": "user", "content": [{"type": "text", "text": "<|end|> a"}, {"type": "image"}]}]
    encoded = chat.encode([*turns, {"role": "assistant", "content": "red"}], images=1)
    assert chat.tokenizer.decode(encoded.ids[: encoded.image_columns[0]]) == "<|user|><|end|> a"


@pytest.fixture
def beginning(tmp_path: Path) -> Any:
    """A tokenizer that puts <s> before each text itself, as Llama's and Vicuna's do."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    bare.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    named = ["<unk>", "<s>", "</s>"]
    bare.train_from_iterator(
        ["USER: ASSISTANT:"], trainers.BpeTrainer(special_tokens=named, initial_alphabet=alphabet, show_progress=False)
    )
    bare.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])  # type: ignore[assignment]
    beginning = PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    beginning.save_pretrained(tmp_path / "begins")
    return AutoTokenizer.from_pretrained(tmp_path / "begins")


@pytest.mark.parametrize("template", TEMPLATES)
def test_named_templates_begin_as_the_tokenizer_begins_a_text(beginning: Any, template: str) -> None:
    chat = Chat(beginning, template)
    encoded, prompt = chat.encode(TWO_TURNS, images=2), chat.encode_prompt(TWO_TURNS[:3], images=2)
    for each in (encoded, prompt):
        assert each.ids[0] == 1
        assert each.ids.count(1) == 1
    assert encoded.labels[0] == IGNORE
    assert encoded.ids[: len(prompt.ids)] == prompt.ids
    assert encoded.image_columns == prompt.image_columns
    before = beginning.decode(encoded.ids[: encoded.image_columns[0]])
    assert before == "<s>" + {"chatml": "<|im_start|>user\n", "vicuna": "USER: "}[template]


def test_a_tokenizers_own_template_says_itself_how_a_text_begins(beginning: Any) -> None:
    beginning.chat_template = TRIMS
    assert Chat(beginning).encode(TWO_TURNS, images=2).ids[0] != 1
    beginning.chat_template = "{{ bos_token }}" + TRIMS
    assert Chat(beginning).encode(TWO_TURNS, images=2).ids.count(1) == 1


def test_a_template_that_ends_the_last_answer_alone_is_refused_with_the_remedy(tokenizer: str) -> None:
    """Nothing tells where an earlier answer ends: it has no end token."""
    with_system = AutoTokenizer.from_pretrained(tokenizer)
    with_system.chat_template = (
        "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}{% if loop.last %}<|end|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    with pytest.raises(UserError, match=r"rewrites earlier turns.*model\.chat_template=chatml"):
        Chat(with_system).encode(TWO_TURNS, images=2)
