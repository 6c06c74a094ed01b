# SPDX-License-Identifier: Apache-2.0
"""`messages` rows, checked token by token against conversations written out by hand."""

from __future__ import annotations

import pytest

from lightning_cl.data import DataError, Encoder
from tests.data.tokenizers_of_families import family

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Bye."},
]
# (text, learned) pieces, one conversation a family.
EXPECTED = {
    "chatml": [
        ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
        ("Hello!<|im_end|>", True),
        ("\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n", False),
        ("Bye.<|im_end|>", True),
    ],
    "llama3": [
        ("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>", False),
        ("<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>", False),
        ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
        ("Hello!<|eot_id|>", True),
        ("<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>", False),
        ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
        ("Bye.<|eot_id|>", True),
    ],
    "gemma": [
        ("<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n", False),
        ("Hello!<end_of_turn>", True),
        ("\n<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n", False),
        ("Bye.<end_of_turn>", True),
    ],
}
EXPECTED["chatml_bos"] = [("<s>", False), *EXPECTED["chatml"]]


def by_hand(tokenizer, pieces):
    """Ids and labels of pieces of text, tokenized piece by piece."""
    ids, labels = [], []
    for text, learned in pieces:
        part = tokenizer.encode(text, add_special_tokens=False)
        ids += part
        labels += part if learned else [-100] * len(part)
    return ids, labels


def check(tokenizer, row, pieces):
    encoded = Encoder(tokenizer).encode_train(row)
    ids, labels = by_hand(tokenizer, pieces)
    assert encoded["input_ids"].tolist() == ids
    assert encoded["labels"].tolist() == labels
    assert encoded["attention_mask"].tolist() == [1] * len(ids)
    return ids


@pytest.mark.parametrize("name", EXPECTED)
def test_assistant_turns_alone_are_learned(name):
    tokenizer = family(name)
    ids = check(tokenizer, {"messages": TURNS}, EXPECTED[name])
    assert tokenizer.bos_token_id is None or ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("name", ["chatml", "chatml_bos", "llama3", "gemma"])
def test_tools_and_system_are_kept(name):
    tokenizer = family(name)
    row = {"messages": TURNS[:3], "tools": [{"name": "add"}]}
    encoded = Encoder(tokenizer).encode_train(row)
    text = tokenizer.decode(encoded["input_ids"])
    assert 'Tools: [{"name": "add"}]' in text
    assert "Be brief." in text
    learned = tokenizer.decode(encoded["labels"][encoded["labels"] != -100])
    assert learned.startswith("Hello!")
    assert len(learned) == len("Hello!") + len(tokenizer.decode(encoded["input_ids"][-1:]))


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma"])
def test_prompt_rows_take_the_same_template(name):
    tokenizer = family(name)
    encoder = Encoder(tokenizer)
    prompt = encoder.encode_train({"prompt": "Hi", "answer": "Hello!"})
    messages = encoder.encode_train({"messages": TURNS[1:3]})
    assert prompt["input_ids"].tolist() == messages["input_ids"].tolist()
    assert prompt["labels"].tolist() == messages["labels"].tolist()


@pytest.mark.parametrize("name", ["chatml", "chatml_bos", "llama3", "gemma", "thinking", "no_end"])
def test_training_scoring_and_generation_see_the_same_prompt(name):
    encoder = Encoder(family(name))
    row = {"prompt": "Yes or no?", "answer": "no", "options": ["yes", "no"]}
    train = encoder.encode_train(row)
    scoring = encoder.encode_eval(row, "accuracy")
    generation = encoder.encode_eval(row, "exact_match")
    start = int((train["labels"] != -100).nonzero()[0])
    assert train["input_ids"][:start].tolist() == scoring["input_ids"].tolist() == generation["input_ids"].tolist()
    assert train["input_ids"][start:].tolist() == scoring["option_ids"][1].tolist()
    assert encoder.tokenizer.decode(scoring["option_ids"][0]).startswith("yes")


@pytest.mark.parametrize(
    ("name", "end"),
    [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("gemma", "<end_of_turn>"), ("no_end", "</s>")],
)
def test_the_end_is_learned_and_stops_generation(name, end):
    tokenizer = family(name)
    encoder = Encoder(tokenizer)
    labels = encoder.encode_train({"messages": TURNS[1:3]})["labels"]
    assert labels[-1] == tokenizer.convert_tokens_to_ids(end)
    assert labels[-1] in encoder.stop_token_ids


def test_tool_calls_are_learned_and_tool_results_are_not():
    tokenizer = family("chatml")
    row = {
        "messages": [
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "tool_calls": [{"name": "add"}]},
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": "It is 4"},
        ]
    }
    pieces = [
        ("<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n", False),
        ('<tool_call>[{"name": "add"}]</tool_call><|im_end|>', True),
        ("\n<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n", False),
        ("It is 4<|im_end|>", True),
    ]
    check(tokenizer, row, pieces)


def test_template_that_rewrites_earlier_turns():
    pieces = [
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
        ("Hello!<|im_end|>", True),
        ("\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("Bye.<|im_end|>", True),
    ]
    check(family("thinking"), {"messages": TURNS[1:]}, pieces)


def test_conversation_that_begins_or_goes_on_with_other_turns():
    tokenizer = family("llama3")
    row = {"messages": [{"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "Hi"}]}
    pieces = [
        ("<|begin_of_text|><|start_header_id|>assistant<|end_header_id|>\n\n", False),
        ("Hello!<|eot_id|>", True),
        ("<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>", False),
    ]
    check(tokenizer, row, pieces)


def test_blanks_that_the_template_trims():
    tokenizer = family("gemma")
    row = {"messages": [{"role": "user", "content": " Hi \n"}, {"role": "assistant", "content": "\n Hello! "}]}
    pieces = [
        ("<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n", False),
        ("Hello!<end_of_turn>", True),
    ]
    check(tokenizer, row, pieces)


def test_same_words_in_several_turns_are_told_apart():
    same = [{"role": role, "content": "no"} for role in ("user", "assistant", "user", "assistant")]
    pieces = [
        ("<|im_start|>user\nno<|im_end|>\n<|im_start|>assistant\n", False),
        ("no<|im_end|>", True),
        ("\n<|im_start|>user\nno<|im_end|>\n<|im_start|>assistant\n", False),
        ("no<|im_end|>", True),
    ]
    check(family("chatml"), {"messages": same}, pieces)


def test_evaluation_of_a_conversation():
    tokenizer = family("chatml")
    row = Encoder(tokenizer).encode_eval({"messages": TURNS}, "rouge_l")
    ids, _ = by_hand(tokenizer, EXPECTED["chatml"][:-1])
    assert row["input_ids"].tolist() == ids
    assert row["reference"] == "Bye."
    assert row["reference_length"] == len("Bye.") + 1


def test_slow_tokenizer_gives_the_same():
    class Slow:
        """A tokenizer without offsets, as Python tokenizers are."""

        is_fast = False

        def __init__(self, fast):
            self._fast = fast

        def __getattr__(self, name):
            return getattr(self._fast, name)

    for name in ("chatml_bos", "llama3", "gemma", "thinking"):
        fast = family(name)
        for row in ({"messages": TURNS[1:]}, {"prompt": "Hi", "answer": "Hello!"}):
            ours, reference = Encoder(Slow(fast)).encode_train(row), Encoder(fast).encode_train(row)
            assert all(ours[key].tolist() == reference[key].tolist() for key in reference)


def test_messages_without_a_template_are_refused():
    bare = family("chatml")
    bare.chat_template = None
    with pytest.raises(DataError, match=r"the tokenizer has no chat template. Set `tokenizer.chat_template`"):
        Encoder(bare).encode_train({"messages": TURNS})
    with pytest.raises(DataError, match=r"cannot be encoded: `template='none'`"):
        Encoder(family("chatml"), template="none").encode_train({"messages": TURNS})


def test_what_a_template_refuses_is_named():
    tokenizer = family("chatml")
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        DataError, match=r"refuses a conversation with the roles \['user', 'assistant'\].*must alternate"
    ):
        Encoder(tokenizer).encode_train({"messages": TURNS[1:3]})


def test_turn_that_cannot_be_found_is_named():
    tokenizer = family("chatml")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}{{ messages | length }}"
    with pytest.raises(DataError, match=r"rewrites turn 1 \('Hello!'\) so that it cannot be found"):
        Encoder(tokenizer).encode_train({"messages": TURNS[1:3]})
