import base64
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import pytest
from PIL import Image

from stockade.engine.chat import Chat, Message
from stockade.engine.errors import (
    EmptyChat,
    ImageTooLarge,
    InvalidMessage,
    TooManyImages,
    UnknownRole,
    UnreadableImage,
    UnsupportedImage,
)
from stockade.engine.images import ImageLimits, load_image


def png(shade: int = 0) -> bytes:
    file = BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


RED = load_image(png(200))
BASE64 = base64.b64encode(png(200)).decode()
URL = "data:image/png;base64," + BASE64


def user(*parts: Any) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


def text(value: str = "What is this?") -> dict:
    return {"type": "text", "text": value}


def test_a_string_is_one_user_turn():
    chat = Chat.parse("hello")
    assert chat == Chat.single("hello") == Chat((Message("user", ("hello",)),))
    assert Chat.parse(chat) is chat


def test_a_conversation_keeps_its_roles_and_texts():
    chat = Chat.parse(
        [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": "one", "name": "ann"},
            {"role": "assistant", "content": "two", "tool_calls": None},
            {"role": "user", "content": [text("th"), text("ree")]},
        ]
    )
    assert [message.role for message in chat.messages] == ["system", "user", "assistant", "user"]
    assert [message.text for message in chat.messages] == ["be brief", "one", "two", "three"]
    assert chat.query == "three"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": URL, "detail": "low"}},
        {"type": "image_url", "image_url": URL},
        {"type": "image", "image": png(200)},
        {"type": "image", "image": Image.open(BytesIO(png(200)))},
        {"type": "image", "image": RED},
        {"type": "image", "url": URL},
        {"type": "image", "base64": BASE64},
        {"type": "image", "base64": URL, "path": None},
    ],
)
def test_images_of_both_formats_are_the_same_chat(part):
    chat = Chat.parse(user(part, text("?")))
    assert chat == Chat.single("?", images=(RED,))
    assert hash(chat) == hash(Chat.single("?", images=(RED,)))
    assert chat.images == (RED,)


def test_an_image_by_path(tmp_path):
    (tmp_path / "a.png").write_bytes(png(200))
    chat = Chat.parse(user({"type": "image", "path": tmp_path / "a.png"}))
    assert chat.images == (RED,)  # and an empty question with an image is a question


def test_images_keep_their_order_and_can_be_left_out():
    blue = {"type": "image", "image": png(1)}
    red = {"type": "image", "image": png(200)}
    chat = Chat.parse([*user(blue, text("a"), red), {"role": "assistant", "content": "b"}, *user(red, text("c"))])
    assert [image.key for image in chat.images] == [load_image(png(1)).key, RED.key, RED.key]
    assert chat.without_images() == Chat.parse(
        [*user(text("a")), {"role": "assistant", "content": "b"}, *user(text("c"))]
    )


def test_chats_work_inside_frozen_dataclasses():
    @dataclass(frozen=True)
    class Step:
        chat: Chat

    assert len({Step(Chat.single("a", (RED,))), Step(Chat.single("a", (load_image(png(200)),)))}) == 1


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "",
        " \n",
        Chat(()),
        user(),
        user(text("  ")),
        [{"role": "system", "content": "x"}],
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
    ],
)
def test_chats_with_nothing_to_answer(messages):
    with pytest.raises(EmptyChat):
        Chat.parse(messages)


@pytest.mark.parametrize("role", ["tool", "User", "", None, 3, ["user"], "x" * 1000])
def test_unknown_roles(role):
    with pytest.raises(UnknownRole, match="allowed") as error:
        Chat.parse([{"role": role, "content": "x"}])
    assert len(str(error.value)) < 200


def test_unknown_role_in_a_chat_built_by_hand():
    with pytest.raises(UnknownRole):
        Chat.parse(Chat((Message("tool", ("x",)),)))


@pytest.mark.parametrize(
    "messages",
    [
        None,
        3,
        {"role": "user", "content": "x"},
        ["x"],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": {"type": "text", "text": "x"}}],
        [{"role": "user", "content": "x", "tool_calls": [{}]}],
        [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}, {"role": "user", "content": "z"}],
        [{"role": "assistant", "content": [{"type": "image", "image": png()}]}, {"role": "user", "content": "x"}],
        user("x"),
        user([text()]),
        user({"text": "x"}),
        user({"type": "text"}),
        user({"type": "text", "text": None}),
        user({"type": "text", "text": "x", "image": png()}),
        user({"type": "video", "video": "x"}),
        user({"type": ["text"], "text": "x"}),
        user({"type": "image"}),
        user({"type": "image", "image": png(), "url": URL}),
        user({"type": "image", "base64": b"x"}),
        user({"type": "image_url"}),
        user({"type": "image_url", "image_url": {"url": None}}),
        user({"type": "image_url", "image_url": {"url": URL, "path": "/x"}}),
    ],
)
def test_shapes_no_chat_format_knows(messages):
    with pytest.raises(InvalidMessage):
        Chat.parse(messages)


def test_image_errors_come_through():
    with pytest.raises(UnsupportedImage, match="fetched"):
        Chat.parse(user({"type": "image", "url": "https://a/b.png"}))
    for url in ("https://a/b.png", "/etc/hosts"):
        with pytest.raises(UnsupportedImage, match="data: URLs only"):
            Chat.parse(user({"type": "image_url", "image_url": {"url": url}}))
    with pytest.raises(UnreadableImage):
        Chat.parse(user({"type": "image", "base64": "AAAA"}))
    with pytest.raises(ImageTooLarge):
        Chat.parse(user({"type": "image", "base64": BASE64}), ImageLimits(max_bytes=20))
    with pytest.raises(UnsupportedImage, match="int is not an image"):
        Chat.parse(user({"type": "image", "image": 3}))


def test_the_number_of_images_is_bounded_while_parsing():
    part = {"type": "image", "image": RED}
    assert len(Chat.parse(user(part, part), ImageLimits(max_images=2)).images) == 2
    with pytest.raises(TooManyImages, match="2"):
        Chat.parse(user(part, part, part), ImageLimits(max_images=2))
