"""Tools of type `mcp` in a responses request → what is wanted of which server. Above: `tools`; below: `fields`.

`server_url` gives a server's address. Without it `server_label` is the name of a server of the configuration.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from hostler.errors import InvalidRequest, UnsupportedParameter

from gateway.fields import Fields, show, wrong_type
from gateway.mcp.remote import RemoteTool

MAX_SERVERS = 32
_MAX_LABEL_CHARS = 64
_MAX_URL_CHARS = 4096
_MAX_NAMES = 512
_MAX_HEADERS = 64
_MAX_HEADER_CHARS = 16 * 1024
_LABEL = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,256}")
# The transport's own, or how messages are framed.
_OWN_HEADERS = {
    "host",
    "content-length",
    "transfer-encoding",
    "connection",
    "accept-encoding",
    "content-type",
    "accept",
}
_REFUSED: dict[str, tuple[Any, ...]] = {
    "connector_id": (),
    "tunnel_id": (),
    "defer_loading": (False,),
    "allowed_callers": (["direct"],),
}


@dataclass(frozen=True, slots=True)
class ToolFilter:
    """Some of a server's tools: those that pass every condition that is set."""

    names: frozenset[str] | None = None
    read_only: bool | None = None

    def takes(self, tool: RemoteTool) -> bool:
        """Return whether a tool is among them."""
        if self.names is not None and tool.name not in self.names:
            return False
        return self.read_only is None or tool.is_read_only == self.read_only


EVERY = ToolFilter()


@dataclass(frozen=True, slots=True)
class Approval:
    """Which calls need somebody's word first. Whatever is in neither needs it, unless only `always` is given."""

    always: ToolFilter | None = None
    never: ToolFilter | None = None

    def is_needed(self, tool: RemoteTool) -> bool:
        """Return whether a call of a tool must be approved."""
        if self.always is not None and self.always.takes(tool):
            return True
        if self.never is not None:
            return not self.never.takes(tool)
        return self.always is None


@dataclass(frozen=True, slots=True)
class McpSpec:
    """One entry of `tools`.

    Attributes:
        where: its name for errors, "tools[2]".
        url: empty for a server of the configuration.
        headers: the caller's, for that server alone; secret.
    """

    where: str
    label: str
    url: str
    headers: dict[str, str]
    allowed: ToolFilter
    approval: Approval
    description: str


def read_mcp(item: Fields) -> McpSpec:
    """Return what one entry asks for.

    Raises:
        InvalidRequest: malformed.
        UnsupportedParameter: it asks for one of OpenAI's own connectors.
    """
    item.refuse(_REFUSED)
    label = item.string("server_label", _MAX_LABEL_CHARS)
    if not label:
        raise item.missing("server_label")
    if not _LABEL.fullmatch(label):
        raise InvalidRequest(
            f"Invalid '{item.name_of('server_label')}': letters, digits, '_', '-' and '.' only.",
            param=item.name_of("server_label"),
        )
    url = item.string("server_url", _MAX_URL_CHARS) or ""
    headers = _headers(item)
    if headers and not url:
        field = "authorization" if item.raw("authorization") is not None else "headers"
        raise UnsupportedParameter(
            f"'{item.name_of(field)}' goes with 'server_url' only: servers of the configuration have their own.",
            param=item.name_of(field),
        )
    return McpSpec(
        where=item.name_of("server_label").rpartition(".")[0],
        label=label,
        url=url,
        headers=headers,
        allowed=_filter(item, "allowed_tools"),
        approval=_approval(item),
        description=item.string("server_description", 64 * 1024) or "",
    )


def _headers(item: Fields) -> dict[str, str]:
    values = item.object("headers") or {}
    name = item.name_of("headers")
    if len(values) > _MAX_HEADERS:
        raise InvalidRequest(f"Invalid '{name}': more than {_MAX_HEADERS} headers.", param=name)
    headers: dict[str, str] = {}
    for key, value in values.items():
        if not isinstance(value, str):
            raise wrong_type(name, "an object of strings", value)
        if not _HEADER_NAME.fullmatch(key) or key.lower() in _OWN_HEADERS or key.lower().startswith("mcp-"):
            raise InvalidRequest(f"Invalid '{name}': the header {show(key)} may not be set.", param=name)
        headers[key] = _header_value(value, name)
    authorization = item.string("authorization", _MAX_HEADER_CHARS)
    if authorization:
        headers = {key: value for key, value in headers.items() if key.lower() != "authorization"}
        headers["Authorization"] = _header_value(f"Bearer {authorization}", item.name_of("authorization"))
    return headers


def _header_value(value: str, name: str) -> str:
    if len(value) > _MAX_HEADER_CHARS or not value.isprintable() or not value.isascii():
        raise InvalidRequest(f"Invalid '{name}': a value that no HTTP header can have.", param=name)
    return value


def _filter(item: Fields, field: str) -> ToolFilter:
    value = item.raw(field)
    if value is None:
        return EVERY
    if isinstance(value, list):
        return ToolFilter(names=_names(item, field))
    inner = item.child(field)
    assert inner is not None
    names = None if inner.raw("tool_names") is None else _names(inner, "tool_names")
    return ToolFilter(names, inner.boolean("read_only"))


def _names(item: Fields, field: str) -> frozenset[str]:
    names = item.array(field, _MAX_NAMES) or []
    for name in names:
        if not isinstance(name, str):
            raise wrong_type(item.name_of(field), "an array of strings", name)
    return frozenset(names)


def _approval(item: Fields) -> Approval:
    value = item.raw("require_approval")
    if value is None:
        return Approval(always=EVERY)
    if isinstance(value, str):
        word = item.choice("require_approval", ("always", "never"))
        return Approval(always=EVERY) if word == "always" else Approval(never=EVERY)
    inner = item.child("require_approval")
    assert inner is not None
    always, never = (None if inner.raw(field) is None else _filter(inner, field) for field in ("always", "never"))
    return Approval(always, never)


def echo_mcp(item: Fields) -> dict[str, Any]:
    """Return an entry as the response repeats it: without headers and keys, for responses are stored."""
    kept = ("server_label", "server_url", "server_description", "allowed_tools", "require_approval")
    known: dict[str, Any] = {"type": "mcp", **{key: item.raw(key) for key in kept if item.raw(key) is not None}}
    for field in ("allowed_tools", "require_approval"):
        if isinstance(known.get(field), dict):
            known[field] = _only_known(known[field], field)
    return {**known, "require_approval": known.get("require_approval", "always")}


def _only_known(value: dict[str, Any], field: str) -> dict[str, Any]:
    if field == "allowed_tools":
        return {key: value[key] for key in ("tool_names", "read_only") if value.get(key) is not None}
    return {
        key: _only_known(value[key], "allowed_tools") if isinstance(value[key], dict) else {"tool_names": value[key]}
        for key in ("always", "never")
        if value.get(key) is not None
    }
