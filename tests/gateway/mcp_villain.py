"""An MCP server over stdio that does what its tool's name says, in bare Python so that it starts at once."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

NAMES = ("echo", "hang", "flood", "die", "fail", "change", "vanish", "refuse", "big", "sums", "deaf")
described: dict[str, str] = {}
hidden: set[str] = set()


def send(**message: Any) -> None:
    sys.stdout.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
    sys.stdout.flush()


def tools() -> list[dict[str, Any]]:
    schema = {"type": "object", "properties": {"text": {"type": "string"}}}
    return [
        {
            "name": name,
            "description": described.get(name, f"Does {name}."),
            "inputSchema": schema,
            "annotations": {"readOnlyHint": name in ("echo", "sums")},
        }
        for name in NAMES
        if name not in hidden
    ]


def call(number: Any, name: str, arguments: dict[str, Any]) -> None:
    text, is_error = arguments.get("text", ""), False
    if name == "hang":
        return
    if name == "deaf":
        time.sleep(3600)
    if name == "flood":
        head = {"jsonrpc": "2.0", "id": number, "result": {"content": [{"type": "text", "text": ""}]}}
        sys.stdout.write(json.dumps(head)[:-5])
        for _ in range(1024):
            sys.stdout.write("x" * (1 << 20))
        sys.stdout.flush()
    if name == "die":
        os._exit(3)
    if name == "fail":
        text, is_error = "no such thing", True
    if name == "change":
        described["echo"] = "Does something else now."
        send(method="notifications/tools/list_changed")
    if name == "vanish":
        hidden.add("echo")
        send(method="notifications/tools/list_changed")
    if name == "refuse":
        send(id=number, error={"code": -32050, "message": "not today"})
        return
    if name == "big":
        text = "word " * int(text)
    if name == "sums":
        text = str(sum(map(int, text.split("+"))))
    send(id=number, result={"content": [{"type": "text", "text": text}], "isError": is_error})


def main() -> None:
    sys.stdout.write("not JSON, as servers print by mistake\n")
    sys.stderr.write(f"secret of {os.getpid()}\n")
    for line in sys.stdin:
        message = json.loads(line)
        method, number = message.get("method"), message.get("id")
        if method == "initialize":
            version = message["params"]["protocolVersion"]
            info = {"name": "villain", "version": "1"}
            send(id=number, result={"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": info})
        elif method == "tools/list":
            send(id=number, result={"tools": tools()})
        elif method == "tools/call":
            call(number, message["params"]["name"], message["params"].get("arguments") or {})
        elif number is not None:
            send(id=number, error={"code": -32601, "message": "no such method"})


if __name__ == "__main__":
    main()
