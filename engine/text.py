"""Text to token ids and back around one tokenizer: trusted template, untrusted text, one id per image.

What a user or a model wrote never becomes a special token or an image placeholder. Stop strings and the
expansion of image tokens are not done here.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from tokenizers import Tokenizer

from .chat import Chat, Message
from .detokenizer import ByteStream, Detokenizer, WindowStream
from .errors import CheckpointMismatch, ImagesNotSupported, InvalidMessage
from .images import LoadedImage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Trusted:
    """Text of a template: special tokens written in it are meant."""

    text: str


@dataclass(frozen=True)
class Untrusted:
    """Text of a user or a model: whatever it spells is plain text."""

    text: str


@dataclass(frozen=True)
class ImageSegment:
    """The place of one image."""

    image: LoadedImage


Segment: TypeAlias = "Trusted | Untrusted | ImageSegment"


def segments_text(segments: Iterable[Segment], image: str = "<image>") -> str:
    """The segments as one string, `image` standing for every image."""
    return "".join(image if isinstance(part, ImageSegment) else part.text for part in segments)


class Codec:
    """Encodes and decodes for one model.

    `image_token` is the placeholder of one image in the model's templates, None for a text model; `image_around` is
    text that stands before and behind it in prompts. `chat_template` replaces the tokenizer's own.
    `template_adds_specials`: rendered chats are encoded with the tokenizer's special tokens, as processors do, unless
    they begin with BOS already. `extra_stop_ids` end an answer besides the tokenizer's EOS. Raises
    `CheckpointMismatch` for a tokenizer that cannot be used.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        image_token: str | None = None,
        image_around: str = "",
        chat_template: str | None = None,
        template_adds_specials: bool = False,
        extra_stop_ids: Iterable[int] = (),
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise CheckpointMismatch(
                f"{type(tokenizer).__name__} is not a fast tokenizer; the checkpoint needs a tokenizer.json"
            )
        self.tokenizer: Any = tokenizer
        self.image_token = image_token
        self._image_text = f"{image_around}{image_token}{image_around}"
        self.chat_template = chat_template
        self.template_adds_specials = template_adds_specials
        added = self.tokenizer.added_tokens_decoder
        if image_token is not None and image_token not in {token.content for token in added.values()}:
            raise CheckpointMismatch(f"the tokenizer has no added token {image_token!r} to stand for an image")
        self.image_id = None if image_token is None else int(self.tokenizer.convert_tokens_to_ids(image_token))
        self.vocab_size = len(tokenizer)
        eos = self.tokenizer.eos_token_id
        self.eos_ids = frozenset(extra_stop_ids) | (frozenset() if eos is None else {eos})
        # Runs of blanks that some vocabularies add as tokens are ordinary text; every other added token is not.
        blank = {id for id, token in added.items() if not token.content.strip()}
        self.special_ids = frozenset(added) - blank | frozenset(self.tokenizer.all_special_ids)
        self._skipped = frozenset(id for id, token in added.items() if token.special)

    # Chats and text to ids.

    def segments(self, chat: Chat) -> tuple[Segment, ...]:
        """The chat in the model's template, ready for an answer unless it ends with one; all its message text is
        `Untrusted`.

        Raises `ImagesNotSupported`, and `InvalidMessage` if there is no template, if it refuses the chat, or if
        it changes or leaves out a text or an image.
        """
        if chat.images and self.image_token is None:
            raise ImagesNotSupported("this model reads text only; send the chat without images")
        plain = self._render(chat)
        known = plain + "".join(message.text for message in chat.messages)
        free = (mark for mark in map(chr, range(0xFDD0, 0xFDF0)) if mark not in known)  # Unicode noncharacters
        opening, closing = next(free, ""), next(free, "")
        if not closing:
            raise InvalidMessage("the chat uses every noncharacter from U+FDD0 to U+FDEF; leave one pair free")
        marked = self._render(chat, opening, closing)
        if marked.replace(opening, "").replace(closing, "") != plain:
            raise InvalidMessage("the model's chat template changes with a message's text; it cannot be marked")
        cores = {core for message in self._texts(chat) for text in message if (core := text.strip())}
        images = iter(chat.images)
        segments: list[Segment] = []
        head, *rest = marked.split(opening)
        segments += self._place_images(head, images)
        for piece in rest:
            core, _, tail = piece.partition(closing)
            if core not in cores or piece.count(closing) != 1:
                raise InvalidMessage("the model's chat template alters the text of a message")
            segments.append(Untrusted(core))
            segments += self._place_images(tail, images)
        if closing in head or cores - {part.text for part in segments if isinstance(part, Untrusted)}:
            raise InvalidMessage("the model's chat template leaves out the text of a message")
        if next(images, None) is not None:
            raise InvalidMessage("the model's chat template leaves out an image")
        return tuple(segments)

    def encode_chat(self, chat: Chat) -> list[int]:
        """The ids of `segments(chat)`, with special tokens around them as the model's own processor adds them."""
        segments = self.segments(chat)
        bos = self.tokenizer.bos_token
        # Only the template may bring the BOS itself: a user's text that begins with it does not count.
        first = next((part for part in segments if not isinstance(part, ImageSegment)), None)
        has_bos = bool(bos and isinstance(first, Trusted) and first.text.startswith(bos))
        return self.encode(segments, add_special_tokens=self.template_adds_specials and not has_bos)

    def encode_next_turn(self, message: str) -> list[int]:
        """The ids that follow an answer's text when the user sends another message and the model is to answer again.

        Raises `InvalidMessage` where the template cannot tell.
        """
        turns = (Message("user", ("a",)), Message("assistant", ("b",)), Message("user", (message,)))
        segments = self.segments(Chat(turns))
        texts = [index for index, part in enumerate(segments) if isinstance(part, Untrusted)]
        if len(texts) < 3:
            raise InvalidMessage("a further message needs a text")
        return self.encode(segments[texts[-2] + 1 :], add_special_tokens=False)

    def encode(self, segments: Sequence[Segment], *, add_special_tokens: bool) -> list[int]:
        """The ids of the joined segments; each image is one image token.

        Equals the tokenizer's own ids of the joined text wherever untrusted text spells no special token.
        Raises `ImagesNotSupported`, and `InvalidMessage` if untrusted text cannot be kept apart or trusted text
        holds a placeholder without an image.
        """
        text, untrusted = self.join(segments)
        ids, found = self._tokenize(text, add_special_tokens)
        if any(_touches(text, untrusted, special) for special in found):
            ids = self._encode_apart(text, untrusted, add_special_tokens)
        images = sum(isinstance(part, ImageSegment) for part in segments)
        if self.image_id is not None and ids.count(self.image_id) != images:
            raise InvalidMessage(f"{self.image_token} stands in trusted text; give every image as an ImageSegment")
        return ids

    def join(self, segments: Iterable[Segment]) -> tuple[str, bytearray]:
        """What `encode` encodes: the joined text, and a 1 for every character of it that is untrusted.

        Raises `ImagesNotSupported`.
        """
        text, untrusted = "", bytearray()
        for part in segments:
            if isinstance(part, ImageSegment) and self.image_token is None:
                raise ImagesNotSupported("this model reads text only; send the prompt without images")
            piece = self._image_text if isinstance(part, ImageSegment) else encodable(part.text)
            text += piece
            untrusted += (b"\1" if isinstance(part, Untrusted) else b"\0") * len(piece)
        return text, untrusted

    def tokens(self, text: str, untrusted: bytearray, begins: bool, apart: bool) -> tuple[list[Token], bool]:
        """The tokens of one stretch of a joined text, none added around them, and whether untrusted text in it
        spells special tokens. Such a prompt is encoded apart, all of it: so are its other stretches (`apart`).

        `begins`: the stretch begins the prompt. Elsewhere the first tokens may differ from the whole text's.
        Raises `InvalidMessage` if untrusted text cannot be kept apart.
        """
        if not apart:
            out = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
            tokens = [Token(id, start, end) for id, (start, end) in zip(out.ids, out.offsets, strict=True)]
            special = (token for token in tokens if token.id in self.special_ids)
            if not any(_touches(text, untrusted, token) for token in special):
                return tokens, False
        return self._tokens_apart(text, untrusted, begins), True

    def encode_text(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The tokenizer's own ids of a raw prompt, which is trusted as it is."""
        return self._tokenize(encodable(text), add_special_tokens)[0]

    # Ids to text.

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def detokenizer(self) -> Detokenizer:
        """A decoder for one stream of ids, whose cost per id does not grow with the stream."""
        backend = self.tokenizer.backend_tokenizer
        if type(backend.decoder).__name__ == "ByteLevel":
            return ByteStream(backend, self._skipped)
        return WindowStream(backend, self._skipped, self._byte_ids)

    def variants(self, word: str) -> tuple[int, ...]:
        """Every single token that spells `word`, whatever its case and the blanks or word-start marks around it."""
        return self._words.get(_bare_word(word), ())

    @cached_property
    def special_tokens(self) -> frozenset[str]:
        """The tokens that no untrusted text becomes, as they are spelled."""
        return frozenset(self.tokenizer.convert_ids_to_tokens(sorted(self.special_ids)))

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token: no text has more of them than this times its tokens."""
        return max(map(len, self.tokenizer.get_vocab()))

    @cached_property
    def _words(self) -> dict[str, tuple[int, ...]]:
        ids = [id for id in range(self.vocab_size) if id not in self.special_ids]
        words: dict[str, list[int]] = {}
        for id, text in zip(ids, self.tokenizer.backend_tokenizer.decode_batch([[id] for id in ids]), strict=True):
            words.setdefault(_bare_word(text), []).append(id)
        return {word: tuple(ids) for word, ids in words.items()}

    @cached_property
    def _byte_ids(self) -> frozenset[int]:
        backend = self.tokenizer.backend_tokenizer
        ids = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        return frozenset(id for id in ids if id is not None)

    # The chat template.

    def _texts(self, chat: Chat) -> Iterator[list[str]]:
        """The texts of each message as the template gets them: whole messages for a text model, else parts."""
        for message in chat.messages:
            if self.image_token is None:
                yield [message.text]
            else:
                yield [part for part in message.parts if isinstance(part, str)]

    def _render(self, chat: Chat, opening: str = "", closing: str = "") -> str:
        """The rendered template, every text marked; blanks around a text stay outside, as templates trim them."""

        def mark(text: str) -> str:
            core = text.strip()
            return text.replace(core, f"{opening}{core}{closing}", 1) if core else text

        messages: list[dict[str, Any]] = []
        for message in chat.messages:
            content: str | list[dict[str, str]] = mark(message.text)
            if self.image_token is not None:
                content = [
                    {"type": "text", "text": mark(part)} if isinstance(part, str) else {"type": "image"}
                    for part in message.parts
                ]
            messages.append({"role": message.role, "content": content})
        if self.chat_template is None and self.tokenizer.chat_template is None:
            raise InvalidMessage(
                f"the tokenizer of {self.tokenizer.name_or_path or 'this model'} has no chat template;"
                " send a raw prompt, or give the model a template"
            )
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=chat.messages[-1].role != "assistant",
            )
        except Exception as error:  # a template is a program of the checkpoint's and may fail in any way
            raise InvalidMessage(f"the model's chat template refuses the chat: {error}") from None

    def _place_images(self, text: str, images: Iterator[LoadedImage]) -> Iterator[Segment]:
        """A trusted text with its placeholders replaced by the next images."""
        pieces = [text] if self.image_token is None else text.split(self.image_token)
        for index, piece in enumerate(pieces):
            if index:
                image = next(images, None)
                if image is None:
                    raise InvalidMessage("the model's chat template has more image placeholders than images")
                yield ImageSegment(image)
            if piece:
                yield Trusted(piece)

    # Special tokens.

    def _tokenize(self, text: str, add_special_tokens: bool) -> tuple[list[int], list[Token]]:
        """The tokenizer's ids of a text, and the special tokens it found spelled in it."""
        out = self.tokenizer(
            text,
            add_special_tokens=add_special_tokens,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            verbose=False,
        )
        found = []
        for id, (start, end), added in zip(
            out["input_ids"], out["offset_mapping"], out["special_tokens_mask"], strict=True
        ):
            if id in self.special_ids and not added:
                found.append(Token(id, start, end))
        return out["input_ids"], found

    def _encode_apart(self, text: str, untrusted: bytearray, add_special_tokens: bool) -> list[int]:
        """Encode a text whose untrusted part spells special tokens: only those of the trusted parts become ids."""
        before, after = self.frame if add_special_tokens else ([], [])
        return [*before, *(token.id for token in self._tokens_apart(text, untrusted, True)), *after]

    def _tokens_apart(self, text: str, untrusted: bytearray, begins: bool) -> list[Token]:
        """The special tokens of the trusted parts; the text between them goes through a copy of the tokenizer
        that knows no special token at all."""
        tokens: list[Token] = []
        at = 0
        for run in re.finditer(rb"\0+", untrusted):
            for id, start, end in self._tokenize(text[run.start() : run.end()], False)[1]:
                start, end = run.start() + start, run.start() + end
                spelled = text[start:end].strip() == self.tokenizer.convert_ids_to_tokens(id)
                if start == end or (id == self._plain.unknown_id and not spelled):
                    continue  # not a special token but a character the vocabulary lacks
                tokens += [*self._plain_tokens(text, at, start, begins), Token(id, start, end)]
                at = end
        return tokens + self._plain_tokens(text, at, len(text), begins)

    def _plain_tokens(self, text: str, start: int, end: int, begins: bool) -> list[Token]:
        """The tokens of `text[start:end]` as plain text; `begins`: the text begins the prompt."""
        if start == end:
            return []
        plain = self._plain.first if begins and start == 0 else self._plain.later
        out = plain.encode(text[start:end], add_special_tokens=False)
        if self._forbidden.intersection(out.ids):
            raise InvalidMessage("a text cannot be encoded without special tokens of the model; leave them out")
        spans = zip(out.ids, out.offsets, strict=True)
        return [Token(id, start + left, start + right) for id, (left, right) in spans]

    @cached_property
    def _plain(self) -> _PlainTokenizers:
        names = {self.tokenizer.convert_ids_to_tokens(id) for id in self.special_ids}
        return _PlainTokenizers(self.tokenizer.backend_tokenizer, names)

    @cached_property
    def _forbidden(self) -> frozenset[int]:
        """What plain text must never become: an unknown character may be UNK, unless UNK has another role too."""
        roles = self.eos_ids | {self.tokenizer.bos_token_id, self.image_id}
        return self.special_ids - {self._plain.unknown_id} | (self.special_ids & roles)

    @cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """The special tokens the tokenizer adds before and after a text."""
        out = self.tokenizer("a", add_special_tokens=True, return_special_tokens_mask=True)
        ids, added = out["input_ids"], out["special_tokens_mask"]
        before = sum(1 for _ in takewhile(bool, added))
        after = sum(1 for _ in takewhile(bool, reversed(added)))
        return ids[:before], ids[len(ids) - after :]


class Token(NamedTuple):
    """A token of a text, and its characters there."""

    id: int
    start: int
    end: int


def _touches(text: str, untrusted: bytearray, special: Token) -> bool:
    """Whether a special token was spelled with untrusted characters; blanks it swallowed beside it do not count."""
    span = slice(special.start, special.end)
    return not text[span] or any(
        flag and not char.isspace() for char, flag in zip(text[span], untrusted[span], strict=True)
    )


class _PlainTokenizers:
    """Copies of a tokenizer that know no special token and add none: `first` for a prompt's start, `later`."""

    def __init__(self, backend: Tokenizer, names: set[str]) -> None:
        spec = json.loads(backend.to_str())
        spec.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
        self.unknown_id = _hide(spec["model"], names)
        self.first = Tokenizer.from_str(json.dumps(spec))
        # Only the piece at the very start of a prompt gets the word-start mark of the scheme "first".
        _never_prepend(spec["pre_tokenizer"])
        self.later = Tokenizer.from_str(json.dumps(spec))


def _hide(model: dict[str, Any], names: set[str]) -> int | None:
    """Rename vocabulary entries to what no text spells, so that no merge or lookup yields them; the id of UNK."""
    hidden = {name: f"\ufdd0{secrets.token_hex(8)}" for name in names}
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram: [token, score], the position is the id
        model["vocab"] = [[hidden.get(token, token), score] for token, score in vocab]
        return model.get("unk_id")
    model["vocab"] = {hidden.get(token, token): id for token, id in vocab.items()}
    if "merges" in model:
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        model["merges"] = [[a, b] for a, b in pairs if not names & {a, b, a + b}]
    unknown = model.get("unk_token")
    if unknown is not None:
        model["unk_token"] = hidden.get(unknown, unknown)
    return vocab.get(unknown)


def _never_prepend(pre_tokenizer: dict[str, Any] | None) -> None:
    for part in (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}]):
        if part.get("prepend_scheme") == "first":
            part["prepend_scheme"] = "never"


def _bare_word(text: str) -> str:
    return text.strip().strip("\u2581").strip().lower()


def encodable(text: str) -> str:
    """Lone surrogates, which no UTF-8 can hold, become replacement characters."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
