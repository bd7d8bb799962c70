"""Content blocks that clients send → parts of the contract's messages. Above: `conversation`; below: chat's media."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hostler.errors import InvalidRequest, UnsupportedParameter
from hostler.inference.v1 import inference_pb2 as pb

from gateway.dialects.openai_chat.media import decode_base64, image_of_url
from gateway.fields import Fields, show, wrong_type
from gateway.links import Link

MAX_BLOCKS = 4096
_MAX_MIME_CHARS = 128
_MAX_TITLE_CHARS = 4096
NO_CAP = 1 << 62  # the body's own cap bounds it

# What only Anthropic's own servers make, kept by clients in their history: skipped.
_FOREIGN = ("server_tool_use", "mcp_tool_use", "mcp_tool_listing", "fallback")
_FOREIGN_ENDING = "_tool_result"


@dataclass(slots=True)
class Pictures:
    """What is known of a request's images.

    Attributes:
        links: those given by address, in the order in which they were read.
        first: the name of the block that holds the first one read; empty for none.
    """

    links: list[Link] = field(default_factory=list)
    first: str = ""


def is_foreign(kind: object) -> bool:
    """Return whether a block tells of tools that Anthropic's servers ran."""
    return isinstance(kind, str) and (kind in _FOREIGN or kind.endswith(_FOREIGN_ENDING))


def read_blocks(owner: Fields, field: str = "content") -> list[Fields]:
    """Return content as blocks: a text alone is one block, nothing is none.

    Raises:
        InvalidRequest: neither a text nor an array of blocks.
    """
    content, name = owner.raw(field), owner.name_of(field)
    if content is None or content == "":
        return []
    if isinstance(content, str):
        return [Fields({"type": "text", "text": content}, name)]
    if not isinstance(content, list):
        raise wrong_type(name, "a string or an array of content blocks", content)
    return owner.children(field, MAX_BLOCKS)


def text_of(block: Fields) -> str:
    """Return the text of a text block."""
    text = block.string("text", NO_CAP)
    if text is None:
        raise block.missing("text")
    return text


def read_parts(blocks: Sequence[Fields], pictures: Pictures) -> list[pb.Part]:
    """Return what a user, or a tool, says; images given by address have no data in their parts.

    A text after a text begins on a line of its own: they are joined as they are.

    Raises:
        InvalidRequest: a block that no shape explains.
        UnsupportedParameter: one that we do not read, by its name.
    """
    parts: list[pb.Part] = []
    for block in blocks:
        for part in _parts(block, pictures):
            if part.HasField("text") and parts and parts[-1].HasField("text"):
                part.text = f"\n{part.text}"
            parts.append(part)
    return parts


def _parts(block: Fields, pictures: Pictures) -> list[pb.Part]:
    kind = block.raw("type")
    if kind == "text":
        return [pb.Part(text=text_of(block))]
    if kind == "image":
        return [_image(block, pictures)]
    if kind == "document":
        return _document(block, pictures)
    if kind == "search_result":
        head = "\n".join(block.string(field, _MAX_TITLE_CHARS) or "" for field in ("title", "source"))
        return [pb.Part(text=head.strip()), *read_parts(read_blocks(block), pictures)]
    if kind == "tool_reference":
        return [pb.Part(text=block.string("tool_name", _MAX_TITLE_CHARS) or "")]
    if kind == "compaction":
        summary = block.string("content", NO_CAP)
        return [pb.Part(text=summary)] if summary else []
    if is_foreign(kind):
        return []
    if kind == "container_upload":
        raise _refused(block, "type", "files are not kept here. Send the text itself")
    raise unknown_block(block, ("text", "image", "document", "search_result", "tool_result"))


def unknown_block(block: Fields, known: Sequence[str]) -> InvalidRequest:
    """Return the error for a block of a type that does not belong where it stands."""
    kind, name = block.raw("type"), block.name_of("type")
    if kind is None:
        return block.missing("type")
    words = ", ".join(f"'{word}'" for word in known)
    return InvalidRequest(f"Invalid value: {show(kind)}. Supported values are: {words}.", param=name)


def _image(block: Fields, pictures: Pictures) -> pb.Part:
    pictures.first = pictures.first or block.name
    source = block.required_child("source")
    kind = source.choice("type", ("base64", "url", "file"))
    if kind == "base64":
        mime_type = source.string("media_type", _MAX_MIME_CHARS) or ""
        data = decode_base64(source.string("data", NO_CAP) or "", source.name_of("data"))
        return pb.Part(image=pb.Media(data=data, mime_type=mime_type))
    if kind == "url":
        url = source.string("url", NO_CAP)
        if url is None:
            raise source.missing("url")
        return pb.Part(image=image_of_url(url, source.name_of("url"), pictures.links))
    if kind is None:
        raise source.missing("type")
    raise _refused(source, "type", "files are not kept here. Send the image itself as 'base64'")


def _document(block: Fields, pictures: Pictures) -> list[pb.Part]:
    """Return a document's text under its title; one that is no text is refused."""
    source = block.required_child("source")
    kind = source.choice("type", ("text", "content", "base64", "url", "file"))
    if kind is None:
        raise source.missing("type")
    if kind == "text":
        text = source.string("data", NO_CAP)
        if text is None:
            raise source.missing("data")
        inner = [pb.Part(text=text)]
    elif kind == "content":
        inner = read_parts(read_blocks(source), pictures)
    else:
        raise _refused(source, "type", "only documents of text can be read. Send a 'text' or 'content' source")
    about = [block.string("title", _MAX_TITLE_CHARS), block.string("context", NO_CAP)]
    return [*(pb.Part(text=line) for line in about if line), *inner]


def _refused(fields: Fields, field: str, reason: str) -> UnsupportedParameter:
    name = fields.name_of(field)
    return UnsupportedParameter(f"'{name}' {show(fields.raw(field))} is not supported: {reason}.", param=name)
