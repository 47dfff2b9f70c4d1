"""Tokenizers restore texts, count their bytes, and report missing tokens clearly."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from diffmm.tokenizers import (
    HuggingFaceTokenizer,
    StreamDecoder,
    Tokenizer,
    load_tokenizer,
)

CORPUS = [
    "The cat, the mat and the café.",
    "naïve 日本語 text — 🎉🎉 and more text",
    "a b\nc\td  e",
]
SPECIALS = ["<|endoftext|>", "[MASK]", "<pad>"]


def byte_level(specials: list[str] = SPECIALS) -> tokenizers.Tokenizer:
    """A tokenizer like GPT-2's."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS, trainer)
    return inner


def byte_fallback() -> tokenizers.Tokenizer:
    """A tokenizer like Llama 2's: spaces as ▁, unknown characters as bytes."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for token in ["▁", *"abcdefghijklmnopqrstuvwxyzTé,.", "th", "▁a"]:
        vocab[token] = len(vocab)
    inner = tokenizers.Tokenizer(
        models.BPE(
            vocab, [("t", "h"), ("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True
        )
    )
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return inner


def word_piece() -> tokenizers.Tokenizer:
    """A tokenizer like BERT's."""
    inner = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=["[UNK]", "[SEP]", "[MASK]", "[PAD]"], show_progress=False
    )
    inner.train_from_iterator(CORPUS, trainer)
    return inner


KINDS = {"byte_level": byte_level, "byte_fallback": byte_fallback, "word_piece": word_piece}
BUILT = {name: HuggingFaceTokenizer(name, make()) for name, make in KINDS.items()}
ALL: dict[str, Tokenizer] = {"bytes": load_tokenizer("bytes"), **BUILT}
LOSSLESS = ["bytes", "byte_level", "byte_fallback"]


def test_bytes() -> None:
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode("é!")
    assert ids == [0xC3, 0xA9, ord("!")]
    assert (tokenizer.eos_id, tokenizer.mask_id, tokenizer.pad_id) == (256, 257, 258)
    assert tokenizer.vocab_size == 259
    assert tokenizer.decode([*ids, tokenizer.eos_id, 300]) == "é!"
    assert tokenizer.num_bytes([*ids, tokenizer.eos_id, tokenizer.mask_id]) == 3


@pytest.mark.parametrize("name", LOSSLESS)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
@settings(max_examples=50)
def test_text_survives_and_its_bytes_are_counted(name: str, text: str) -> None:
    tokenizer = ALL[name]
    text = text.replace("▁", "_")  # byte_fallback writes spaces as this character
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    # byte_fallback counts the space that it adds before a text.
    assert tokenizer.num_bytes(ids) == len(text.encode()) + (name == "byte_fallback" and text != "")


def test_word_piece_counts_what_it_decodes_to() -> None:
    tokenizer = ALL["word_piece"]
    ids = tokenizer.encode("The cat, the mat text")
    assert tokenizer.decode(ids) == "the cat, the mat text"
    assert tokenizer.num_bytes(ids) == len(" the cat, the mat text")


@pytest.mark.parametrize("name", ALL)
def test_special_tokens_are_not_text(name: str) -> None:
    tokenizer = ALL[name]
    special = sorted(tokenizer.special_ids)
    assert tokenizer.eos_id in special
    assert tokenizer.num_bytes(special) == 0
    assert tokenizer.decode([*tokenizer.encode("the"), *special]) == "the"
    spelled = tokenizer.encode("<|endoftext|></s>[SEP][MASK]")
    unknown = {0} if name == "word_piece" else set()
    assert set(spelled) & set(special) <= unknown


@pytest.mark.parametrize("name", ALL)
@given(data=st.data())
@settings(max_examples=60)
def test_streaming_gives_the_whole_text_in_whole_characters(name: str, data: st.DataObject) -> None:
    tokenizer = ALL[name]
    text = data.draw(st.text("théé日 🎉,", max_size=20))
    ids = tokenizer.encode(text)
    # Random ids, as from an untrained model. (For byte_fallback, the library decodes a sequence of
    # bytes as a whole, so that a later invalid byte would change a character already returned.)
    if name != "byte_fallback" and data.draw(st.booleans()):
        ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20))
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.feed([id]) for id in ids]
    assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids)


def test_streaming_waits_for_the_end_of_a_character() -> None:
    decoder = StreamDecoder(load_tokenizer("bytes"))
    assert [decoder.feed([id]) for id in "a🎉b".encode()] == ["a", "", "", "", "🎉", "b"]
    assert decoder.feed("日".encode()[:2]) == ""
    assert decoder.flush() == "\N{REPLACEMENT CHARACTER}"
    assert decoder.feed(b"x") == "x"


def test_a_file_or_its_folder(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    from_file = load_tokenizer(str(tmp_path / "tokenizer.json"))
    from_folder = load_tokenizer(str(tmp_path))
    assert from_file.encode("the café") == from_folder.encode("the café")
    assert from_file.fingerprint == from_folder.fingerprint == BUILT["byte_level"].fingerprint
    assert len({tokenizer.fingerprint for tokenizer in ALL.values()}) == len(ALL)


def test_a_files_own_padding_and_truncation_are_ignored() -> None:
    inner = byte_level()
    inner.enable_truncation(2)
    inner.enable_padding(length=50)
    plain = BUILT["byte_level"].encode("the cat and the mat")
    assert HuggingFaceTokenizer("x", inner).encode("the cat and the mat") == plain


def test_batches_equal_single_texts() -> None:
    for tokenizer in ALL.values():
        batch = tokenizer.encode_batch(CORPUS)
        assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in CORPUS]
        assert all(np.issubdtype(ids.dtype, np.integer) for ids in batch)


def test_special_tokens_are_found_by_name_or_missed_clearly() -> None:
    assert BUILT["byte_level"].eos_id == 0
    assert BUILT["byte_fallback"].eos_id == 2
    assert BUILT["word_piece"].eos_id == 1
    assert BUILT["word_piece"].pad_id == 3
    assert BUILT["byte_fallback"].pad_id == 2  # it has none: the end of text
    with pytest.raises(ValueError, match=r"'byte_fallback' has no mask token: none of \[MASK\]"):
        _ = BUILT["byte_fallback"].mask_id
    bare = HuggingFaceTokenizer("bare", byte_level(specials=[]))
    with pytest.raises(ValueError, match=r"'bare' has no end-of-text token.*<\|endoftext\|>"):
        _ = bare.eos_id


def test_what_is_no_tokenizer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"file .*missing\.json does not exist"):
        load_tokenizer(str(tmp_path / "missing.json"))
    with pytest.raises(FileNotFoundError, match=r"file .*tokenizer\.json does not exist"):
        load_tokenizer(str(tmp_path))
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json is not a tokenizer file"):
        load_tokenizer(str(bad))

    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"'byte' is neither.*did you mean 'bytes'"):
        load_tokenizer("byte")
