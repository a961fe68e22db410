"""What is sent of a text while it comes adds up to what it is in the end."""

from __future__ import annotations

import random

import language_bases
import pytest

from afina.serving.asking import _spelled
from afina.serving.text import TextStream

TOKENIZERS = {"llama": language_bases.llama_like, "gpt2": language_bases.gpt2_like}


def decoder(tokenizer):
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("stripped", [False, True])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_add_up_for_any_tokens(name, stripped):
    tokenizer, chance = TOKENIZERS[name](), random.Random(0)
    spelled = _spelled(tokenizer)
    assert len(spelled) == (256 + len(tokenizer.all_special_ids) if name == "llama" else 0)
    for _ in range(300):
        tokens = [chance.randrange(len(tokenizer)) for _ in range(chance.randrange(1, 31))]
        stream = TextStream(decoder(tokenizer), spelled=spelled, stripped=stripped)
        pieces = [stream.grow(tokens[: i + 1], last=i + 1 == len(tokens)) for i in range(len(tokens))]
        whole = decoder(tokenizer)(tokens)
        assert "".join(pieces) == stream.sent == (whole.strip() if stripped else whole)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_letters_of_several_bytes_come_whole(name):
    tokenizer = TOKENIZERS[name]()
    text = "és 👩‍👩‍👧 日本"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = TextStream(decoder(tokenizer), spelled=_spelled(tokenizer))
    pieces = [stream.grow(tokens[: i + 1], last=i + 1 == len(tokens)) for i in range(len(tokens))]
    assert "".join(pieces).strip() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_stop_sequence_is_never_sent_not_even_its_beginning():
    decode = lambda ids: "".join(map(chr, ids))
    for text, stops, right in [
        ("abc END def", ["END"], "abc "), ("abcEN", ["END"], "abcEN"), ("aab", ["ab"], "a"), ("xyz", ["y", "xy"], ""),
        ("ababac", ["abac"], "ab"), ("abc", ["z"], "abc"),
    ]:  # fmt: skip
        stream, sent = TextStream(decode, stops), ""
        for i in range(len(text)):
            sent += stream.grow([ord(c) for c in text[: i + 1]], last=i + 1 == len(text))
            assert right.startswith(sent), (text, sent)
            if stream.stopped:
                break
        assert sent == right
        assert stream.stopped == any(stop in text for stop in stops)
