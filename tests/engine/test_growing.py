import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from stockade.engine.errors import ImagesNotSupported, InvalidMessage
from stockade.engine.growing import GrowingPrompt
from stockade.engine.images import load_image
from stockade.engine.text import Codec, ImageSegment, Segment, Token, Trusted, Untrusted

PICTURE = ImageSegment(load_image(Image.new("RGB", (4, 4))))
PROSE = (
    "The quick brown fox isn't lazy, is it?  In 2024, 3.5% of dogs were.\n\n1. First item: do this.\n"
    "    return [x_start, 'end']\n\nGrüße aus 東京 and 😀😀, https://example.org/a?b=c. "
)


def byte_level(normalizer: normalizers.Normalizer | None = None) -> PreTrainedTokenizerFast:
    """Like GPT-2's; one added token is a run of blanks, and another takes the blanks beside it."""
    backend = Tokenizer(models.BPE())
    if normalizer:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|im_end|>", "<image>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([PROSE, "=" * 40, "\n" * 9], trainer)
    backend.add_tokens([AddedToken("    ", normalized=False), AddedToken("<end>", lstrip=True, rstrip=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


def llama_like(metaspace: bool) -> PreTrainedTokenizerFast:
    """BPE over the whole text, a word-start mark before it, bytes for unknown characters, BOS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator([PROSE], trainers.BpeTrainer(vocab_size=130, show_progress=False))
    trained = json.loads(backend.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", "<image>", *(f"<0x{byte:02X}>" for byte in range(256)), *trained["vocab"]]
    merges = [(left, right) for left, right in trained["merges"]]
    vocab = {token: id for id, token in enumerate(names)}
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in names[:4]])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def crossing() -> PreTrainedTokenizerFast:
    """Merges reach over blanks, as no pre-tokenizer keeps them apart; the end gets EOS."""
    chars = [*"abcdefghijklmnopqrstuvwxyz <>|_/\n", "▁"]
    merges = [
        ("a", " "),
        ("a ", "b"),
        ("b", " "),
        ("b ", "a "),
        (" ", " "),
        (" ", "d"),
        ("c", " d"),
        (" ", "g"),
        ("f", " g"),
        ("f g", " "),
    ]
    vocab = ["?", "<end>", *chars, *("".join(pair) for pair in merges)]
    backend = Tokenizer(
        models.BPE({token: id for id, token in enumerate(vocab)}, merges, unk_token="?", fuse_unk=True)
    )
    backend.add_special_tokens(["<end>"])
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="?")


def unigram() -> PreTrainedTokenizerFast:
    """Like T5's: the normalizer strips the ends, folds case and blanks, and composes characters."""
    pieces = [
        ("<unk>", 0.0),
        ("</s>", 0.0),
        *((char, -3.0) for char in "▁abcdeghinorstu.,"),
        ("▁the", -2.0),
        ("in", -4),
    ]
    backend = Tokenizer(models.Unigram(pieces, 0))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Strip(), normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " ")]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<unk>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def grouping() -> PreTrainedTokenizerFast:
    """Groups digits by three from the right, so that every further digit moves them all; trims its offsets."""
    backend = Tokenizer(models.BPE())
    digits = Regex(r"\d{1,3}(?=(?:\d{3})*(?!\d))")
    alphabet = {char: id for id, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    triples = [f"{a}{b}" for a in "0123456789" for b in "0123456789"]
    triples += [f"{a}{b}" for a in triples[:] for b in "0123456789"]
    vocab = alphabet | {triple: len(alphabet) + id for id, triple in enumerate(triples)}
    backend.model = models.BPE(vocab, [(triple[:-1], triple[-1]) for triple in triples])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(digits, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.add_tokens([AddedToken("stop", single_word=True), AddedToken("<end>", lstrip=True, rstrip=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def word_pieces() -> PreTrainedTokenizerFast:
    """Like BERT's: tokens inside a word are not those at its start, blanks are lost, a frame goes around."""
    words = ["[UNK]", "[CLS]", "[SEP]", "the", "qui", "##ck", "##s", "s", "##t", "t", "##a", "a", "<", ">", "|", "/"]
    backend = Tokenizer(
        models.WordPiece({word: id for id, word in enumerate(words)}, unk_token="[UNK]", max_input_chars_per_word=20)
    )
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", eos_token="[SEP]"
    )


CODECS = {
    "byte-level": Codec(byte_level(), image_token="<image>"),
    "folding": Codec(byte_level(normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]))),
    "llama": Codec(llama_like(metaspace=False), image_token="<image>"),
    "llama-metaspace": Codec(llama_like(metaspace=True), image_token="<image>"),
    "unigram": Codec(unigram()),
    "crossing": Codec(crossing()),
    "grouping": Codec(grouping()),
    "word-pieces": Codec(word_pieces()),
}
every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())

FRAGMENTS = (
    *("<", "|", "/", "s", ">", "im_", "end", "|>", "<|", "</", "age>", "<im", "<|im_end|>", "<image>", "</s>", "<s>"),
    *(" ", "    ", "\n", "yes", "Grüße", "東", "😀", "\ufffd", "\ud800", "▁", "<0x41>", "\0"),
)
RUNS = (
    *("=" * 40, " " * 30, "\n" * 5, "a b " * 6, "12345", "67890123", "stop", "stopper", "the", "quicksta" * 4),
    *(
        "e\u0301",
        "\u0301",
        "東京" * 12,
        "👩\u200d👧",
        "<end>",
        "[SEP]",
        ".\n",
        " \n\n",
        "don't ",
        "internationalization ",
    ),
)
texts = st.text(max_size=12) | st.lists(st.sampled_from(FRAGMENTS), max_size=10).map("".join)
sources = st.lists(texts | st.sampled_from((*RUNS, PROSE, PROSE[40:120])), max_size=8).map("".join)


@st.composite
def splits(draw) -> list[str]:
    """A text in pieces, of which some are empty."""
    text = draw(sources)
    size = draw(st.integers(1, 40))
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=6)) + list(range(0, len(text), size)))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@st.composite
def befores(draw, codec: Codec) -> tuple[Segment, ...]:
    """Fixed segments that may end anywhere: in a blank, in a word, in untrusted text, with an image, or be none."""
    start: list[Segment] = [Trusted(f"{codec.tokenizer.eos_token}Judge this: ")]
    start += [PICTURE, Trusted("\n")] if codec.image_token and draw(st.booleans()) else []
    start += [
        Untrusted(draw(texts)),
        Trusted(draw(st.sampled_from(("", " ", "\nANSWER:", "\n\nThe ans", "1")))),
        Untrusted(""),
    ]
    return tuple(start[: draw(st.integers(0, len(start)))])


def in_pieces(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


def shared(one: list[int], other: list[int]) -> int:
    """How many ids both begin with."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def follow(prompt: GrowingPrompt, known: list[int], change: tuple[int, list[int]]) -> list[int]:
    """The ids after a change, which must keep as much as it can and be what the prompt says."""
    keep, new = change
    assert 0 <= keep <= len(known)
    assert not (known[keep:] and new and known[keep] == new[0])
    known = known[:keep] + new
    assert known == prompt.ids
    return known


# What comes out.


@every_codec
@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_the_final_ids_are_the_codecs_own_for_every_split(codec, data):
    before, pieces = data.draw(befores(codec)), data.draw(splits())
    prompt = GrowingPrompt(codec, before)
    context = codec.encode(before, add_special_tokens=True)
    special = codec.special_ids - {codec.tokenizer.unk_token_id}
    meant = [id for id in context if id in special]
    known: list[int] = []
    for piece in ["", *pieces]:
        known = follow(prompt, known, prompt.append(piece))
        assert 0 <= prompt.covers <= len(prompt.text)
        found = [id for id in known if id in special]
        assert found == meant[: len(found)]
    known = follow(prompt, known, prompt.close())
    text = "".join(pieces)
    assert prompt.text == text.replace("\ud800", "\ufffd")
    assert known == codec.encode((*before, Untrusted(text)), add_special_tokens=True)
    assert [id for id in known if id in special] == meant
    assert prompt.covers == len(text)
    assert prompt.pool_from == min(shared(context, known) if before else 0, len(known) - 1)


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_what_is_handed_out_begins_the_text_and_covers_says_how_much(data):
    codec = CODECS["byte-level"]  # which loses nothing of a text
    before, pieces = data.draw(befores(codec)), data.draw(splits())
    prompt = GrowingPrompt(codec, before)
    for piece in ["", *pieces]:
        _, new = prompt.append(piece)
        spelled = codec.tokenizer.decode(prompt.ids, skip_special_tokens=False)
        fixed = codec.join(before)[0]
        assert (fixed + prompt.text).startswith(spelled)
        assert prompt.covers == max(len(spelled) - len(fixed), 0)
        if new:
            whole = codec.encode((*before, Untrusted(prompt.text)), add_special_tokens=True)
            assert prompt.ids == whole[: len(prompt.ids)]


def test_fixed_segments_are_handed_out_before_any_text():
    prompt = GrowingPrompt(CODECS["llama"], (Trusted("Judge this. ANSWER: "),))
    fixed = CODECS["llama"].tokenizer("Judge this. ANSWER:").input_ids
    assert prompt.append("") == (0, fixed)
    assert (prompt.covers, prompt.pool_from) == (0, len(fixed))
    assert prompt.append("is") == (len(fixed), [])
    keep, new = prompt.append(" that so")
    assert keep == len(fixed) and new
    assert prompt.pool_from == len(fixed)
    assert prompt.covers == len("is that")


@pytest.mark.parametrize("name", ["byte-level", "folding", "llama", "llama-metaspace", "grouping"])
def test_prose_is_never_rolled_back_and_little_of_it_held_back(name):
    prompt = GrowingPrompt(CODECS[name], (Trusted("Question: "), Untrusted("what?"), Trusted("\nAnswer: ")))
    for piece in in_pieces(PROSE * 3, 3):
        count = len(prompt.ids)
        assert prompt.append(piece)[0] == count
        assert len(prompt.text) - prompt.covers <= 32
    count = len(prompt.ids)
    assert prompt.close()[0] == count


def test_a_merge_over_a_boundary_rolls_back():
    codec = CODECS["crossing"]
    x, c, merged, end = codec.tokenizer.convert_tokens_to_ids(["x", "c", "c d", "<end>"])
    prompt = GrowingPrompt(codec, ())
    assert prompt.append("xc ") == (0, [x, c])
    assert prompt.covers == 2
    assert prompt.append("d ") == (1, [merged])
    assert prompt.ids == [x, merged] and prompt.covers == 4
    blank = codec.tokenizer.convert_tokens_to_ids(" ")
    assert prompt.close() == (2, [blank, end])


def test_a_roll_back_may_leave_nothing():
    codec = CODECS["crossing"]
    prompt = GrowingPrompt(codec, ())
    assert prompt.append("f ") == (0, [codec.tokenizer.convert_tokens_to_ids("f")])
    assert prompt.covers == 1
    assert prompt.append("g ") == (0, [])  # one token now, and its last character is a blank that may grow
    assert prompt.ids == [] and prompt.covers == 0


def test_close_takes_back_what_later_text_changed():
    codec = CODECS["grouping"]
    prompt = GrowingPrompt(codec, (Trusted("n = "),))
    digits = "1234567890" * 3 + "1234"
    known: list[int] = []
    for digit in digits:
        known = follow(prompt, known, prompt.append(digit))
    keep, new = prompt.close()
    assert keep < len(known)
    assert known[:keep] + new == codec.tokenizer(f"n = {digits}").input_ids


def test_a_special_token_spelled_late_is_plain_text():
    codec = CODECS["byte-level"]
    prompt = GrowingPrompt(codec, (PICTURE, Trusted("What? ")))
    for piece in ["It is", "  <ima", "ge", "> and    ", "<|im_", "end|>", " " * 9, "more words and words "]:
        prompt.append(piece)
        assert [id for id in prompt.ids if id in codec.special_ids] == [codec.image_id]
    assert prompt.covers == len(prompt.text) - 1


class CountingCodec(Codec):
    """Counts the characters it encodes."""

    count = 0

    def tokens(self, text: str, untrusted: bytearray, begins: bool, apart: bool) -> tuple[list[Token], bool]:
        self.count += len(text)
        return super().tokens(text, untrusted, begins, apart)


@every_codec
@pytest.mark.parametrize(
    "text", [PROSE * 6, "=" * 1000, "1234567890" * 100, "東京" * 500, " " * 1000, "<image>a " * 99]
)
def test_the_cost_is_linear_in_the_text(codec, text):
    counting = CountingCodec(codec.tokenizer)
    prompt = GrowingPrompt(counting, (Trusted("Question: what is the matter with you\nAnswer: "),))
    for piece in in_pieces(text, 3):
        prompt.append(piece)
    assert 0 < counting.count < 25 * len(text)


def test_refusals_are_those_of_the_codec():
    with pytest.raises(ImagesNotSupported):
        GrowingPrompt(CODECS["unigram"], (PICTURE,))
    backend = Tokenizer(models.BPE({"<end>": 0, "a": 1, " ": 2}, [], unk_token="<end>"))
    backend.add_special_tokens(["<end>"])
    prompt = GrowingPrompt(
        Codec(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="<end>")), ()
    )
    assert prompt.append("a a ") == (0, [1, 2, 1])
    with pytest.raises(InvalidMessage, match="special tokens"):
        prompt.append("b and so on ")
