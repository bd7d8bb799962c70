"""Chat against a small HTTP server: pipe, terminal, commands, failures."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import Result

from cli.chat import Conversation
from cli.chat_http import ChatError, Client, Delta, Reply, Settings
from cli.markdown_stream import MarkdownStream, split_complete

from .fakes import FakeHttp, FakeServer, sse

Hostler = Callable[..., Result]


@pytest.fixture
def http() -> Iterator[FakeHttp]:
    fake = FakeHttp(lambda body: sse("The capital ", "is **Paris**.", reasoning="Hm.", usage=7))
    yield fake
    fake.close()


@pytest.fixture
def conversation(http: FakeHttp) -> Iterator[Conversation]:
    client = Client(http.url, None)
    console = Console(file=io.StringIO(), width=60, force_terminal=False)
    yield Conversation(client, Settings("tiny"), console)
    client.close()


def shown(conversation: Conversation) -> str:
    file = conversation._console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_a_pipe_gets_one_plain_answer(hostler: Hostler, http: FakeHttp) -> None:
    flags = ["--system", "Be brief.", "--temperature", "0", "--max-tokens", "9", "--api-key", "secret-key"]
    result = hostler("chat", "--url", http.url + "/v1", *flags, stdin="What is the capital of France?\n")
    assert (result.exit_code, result.stdout) == (0, "The capital is **Paris**.\n")
    ((authorization, body),) = http.seen
    assert authorization == "Bearer secret-key"
    assert body["model"] == "tiny"
    assert (body["temperature"], body["max_tokens"], body["stream"]) == (0, 9, True)
    assert [m["role"] for m in body["messages"]] == ["system", "user"]


def test_the_local_server_is_found_with_its_key(hostler: Hostler, http: FakeHttp) -> None:
    port = int(http.url.rpartition(":")[2])
    fake = FakeServer(port, {"host": "127.0.0.1", "api_key": "key-of-the-server"})
    try:
        assert hostler("chat", "tiny", stdin="hello").stdout.startswith("The capital")
    finally:
        fake.close()
    assert http.seen[0][0] == "Bearer key-of-the-server"


def test_a_refusal_shows_the_server_s_own_words(hostler: Hostler) -> None:
    body = json.dumps({"error": {"message": "All slots are taken.", "type": "overloaded", "param": None, "code": None}})
    http = FakeHttp(lambda _: [body.encode()], status=429, headers={"retry-after": "3"})
    try:
        result = hostler("chat", "--url", http.url, stdin="hello")
    finally:
        http.close()
    assert (result.exit_code, result.stderr) == (1, "hostler: All slots are taken. (try again in 3 s)\n")


def test_an_error_in_the_stream_ends_the_reply_with_its_message(hostler: Hostler) -> None:
    failure = b'data: {"error": {"message": "The worker was lost."}}\n\n'
    http = FakeHttp(lambda _: [*sse("Once", done=False), failure])
    try:
        result = hostler("chat", "--url", http.url, stdin="hello")
    finally:
        http.close()
    assert (result.exit_code, result.stdout) == (1, "Once\n")
    assert result.stderr == "hostler: The worker was lost.\n"


def test_a_stream_that_just_ends_is_not_taken_for_a_whole_reply(http: FakeHttp) -> None:
    http.answer = lambda _: sse("Once", done=False)
    client = Client(http.url, None)
    with pytest.raises(ChatError, match="middle of the reply"):
        list(client.stream(Settings("tiny"), [], Reply()))
    client.close()


def test_a_server_that_is_not_there_is_one_line(hostler: Hostler) -> None:
    result = hostler("chat", "--url", "127.0.0.1:9", stdin="hello")
    assert result.exit_code == 1
    assert "http://127.0.0.1:9 does not answer" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_conversation_remembers_and_shows_markdown(conversation: Conversation, http: FakeHttp) -> None:
    conversation.ask("What is the capital of France?")
    conversation.ask("Sure?")
    assert [m["role"] for m in http.seen[1][1]["messages"]] == ["user", "assistant", "user"]
    text = shown(conversation)
    assert "The capital is Paris." in text
    assert "**" not in text
    assert "Hm." in text
    assert "7 tokens" in text
    assert "first after" in text


def test_a_wait_for_the_model_is_told_while_it_lasts_and_leaves_nothing_behind(http: FakeHttp) -> None:
    http.answer = lambda body: [b": loading: reading weights 40% of 4.0 GiB, about 3 s left\n\n", *sse("Paris.")]
    client = Client(http.url, None)
    deltas = list(client.stream(Settings("tiny"), [], Reply()))
    assert deltas == [Delta(waiting="reading weights 40% of 4.0 GiB, about 3 s left"), Delta("Paris.")]
    console = Console(file=io.StringIO(), width=60, force_terminal=True)
    with MarkdownStream(console) as screen:
        screen.waiting("reading weights")
        screen._live.refresh()
        assert isinstance(console.file, io.StringIO)
        assert "reading weights" in console.file.getvalue()
        screen.text("Paris.")
        console.file.truncate(0)
    assert "Paris." in console.file.getvalue()
    assert "reading weights" not in console.file.getvalue()
    client.close()


def test_ctrl_c_closes_the_stream_and_keeps_what_came(conversation: Conversation, monkeypatch: Any) -> None:
    closed = []

    def stream(settings: Settings, messages: Any, reply: Reply) -> Iterator[Delta]:
        try:
            reply.add(Delta("Once upon"))
            yield Delta("Once upon")
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    monkeypatch.setattr(conversation._client, "stream", stream)
    conversation.ask("Tell me a story.")
    assert closed == [True]
    assert conversation.messages[-1] == {"role": "assistant", "content": "Once upon"}
    assert "stopped" in shown(conversation)


def test_an_unanswered_question_is_not_sent_twice(conversation: Conversation, http: FakeHttp) -> None:
    http.status = 503
    conversation.ask("hello")
    assert conversation.messages == []
    assert "503" in shown(conversation)


def test_slash_commands(conversation: Conversation, http: FakeHttp, place: Path) -> None:
    assert conversation.command("/system Be brief.")
    conversation.ask("hello")
    assert http.seen[0][1]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert conversation.command("/save talk.json")
    assert json.loads((place / "talk.json").read_text())["messages"][2]["role"] == "assistant"
    assert conversation.command("/save talk.md")
    assert "**user**" in (place / "talk.md").read_text()
    assert conversation.command("/model other")
    assert conversation._settings.model == "other"
    assert conversation.command("/model missing")
    assert conversation._settings.model == "other"
    assert conversation.command("/clear")
    assert conversation.messages == []
    assert conversation.command("/nonsense")
    assert "/nonsense is not a command" in shown(conversation)
    assert not conversation.command("/exit")


def test_only_what_cannot_change_any_more_is_printed_for_good() -> None:
    assert split_complete("one\n\ntwo") == ("one\n\n", "two")
    assert split_complete("one") == ("", "one")
    assert split_complete("```py\na\n\nb\n") == ("", "```py\na\n\nb\n")
    assert split_complete("```py\na\n\nb\n```\n\nc") == ("```py\na\n\nb\n```\n\n", "c")
