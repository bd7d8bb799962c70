"""Images from the contract to the engine's seam."""

from __future__ import annotations

import pytest
from hostler.errors import UnsupportedParameter
from hostler.inference.v1 import inference_pb2 as pb

from workers.engine import ChatPrompt, ImageInput, ModelFacts
from workers.translate import generation_request

BLIND = ModelFacts("m", "text", "A", "float32", 100)
SEEING = ModelFacts("m", "text", "A", "float32", 100, supports_images=True)


def request(*messages: pb.Message) -> pb.GenerateRequest:
    return pb.GenerateRequest(chat=pb.Chat(messages=messages))


def picture(data: bytes, detail: str = "") -> pb.Part:
    return pb.Part(image=pb.Media(data=data, detail=detail))


def test_images_keep_their_place_among_texts_and_their_order_over_messages() -> None:
    wanted = generation_request(
        request(
            pb.Message(role=pb.ROLE_SYSTEM, parts=[pb.Part(text="a"), pb.Part(text="b")]),
            pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text="x"), picture(b"1", "low"), pb.Part(text="y")]),
            pb.Message(role=pb.ROLE_USER, parts=[picture(b"2"), picture(b"3")]),
        ),
        SEEING,
        "r",
    )
    assert isinstance(wanted.prompt, ChatPrompt)
    assert [message["content"] for message in wanted.prompt.messages] == [
        "ab",
        [{"type": "text", "text": "x"}, {"type": "image"}, {"type": "text", "text": "y"}],
        [{"type": "image"}, {"type": "image"}],
    ]
    assert list(wanted.prompt.images) == [ImageInput(b"1", "low"), ImageInput(b"2"), ImageInput(b"3")]


def test_a_model_without_eyes_refuses_images_and_no_model_takes_audio_here() -> None:
    with pytest.raises(UnsupportedParameter, match="Image input is not supported"):
        generation_request(request(pb.Message(role=pb.ROLE_USER, parts=[picture(b"1")])), BLIND, "r")
    audio = pb.Part(audio=pb.Media(data=b"1"))
    with pytest.raises(UnsupportedParameter, match="Audio input is not supported"):
        generation_request(request(pb.Message(role=pb.ROLE_USER, parts=[audio, picture(b"1")])), SEEING, "r")


def test_picture_bytes_stay_out_of_logs() -> None:
    assert "secret" not in repr(ImageInput(b"secret"))
