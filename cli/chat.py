"""`hostler chat`: a conversation in the terminal, or one question through a pipe.

Above stands `cli.main`; below, `cli.chat_http` (the request) and `cli.markdown_stream` (the drawing).
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from cli import servers
from cli.chat_http import ChatError, Client, Reply, Settings
from cli.exits import CliError

if TYPE_CHECKING:
    from rich.console import Console

HELP = """\
/help             this text
/clear            forget the conversation
/system TEXT      set the system message (without TEXT: show it)
/model NAME       change the model (without NAME: list them)
/save FILE        write the conversation (.json, else markdown)
/exit             leave; Ctrl-D, too
End a line with \\ to go on writing on the next. Ctrl-C stops a reply."""


def connect(url: str | None, api_key: str | None, port: int | None) -> Client:
    """Return a client for --url, or for the server that runs here, with its key."""
    key = api_key or os.environ.get("HOSTLER_API_KEY")
    if url:
        return Client(url if "://" in url else f"http://{url}", key)
    server = servers.find(port)
    config = servers.read_config(server.run_dir)
    return Client(servers.base_url(str(config.get("host", "127.0.0.1")), server.port), key or config.get("api_key"))


def choose_model(client: Client, wanted: str | None) -> str:
    """Return the model to talk to: the wanted one, else the first that the server lists."""
    if wanted:
        return wanted
    names = client.models()
    if not names:
        raise CliError(f"{client.url} serves no model")
    return names[0]


def ask_once(client: Client, settings: Settings, question: str) -> None:
    """Print the answer to one question as plain text, as it comes.

    Raises:
        ChatError: refused or broken off; what came before has been printed.
    """
    reply = Reply()
    try:
        with closing(client.stream(settings, [{"role": "user", "content": question}], reply)) as pieces:
            for delta in pieces:
                sys.stdout.write(delta.text)
                sys.stdout.flush()
    finally:
        if reply.text and not reply.text.endswith("\n"):
            sys.stdout.write("\n")
            sys.stdout.flush()


def run(client: Client, settings: Settings) -> None:
    """Talk: on a terminal a conversation, else one question from standard input."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        from rich.console import Console

        Conversation(client, settings, Console()).run()
        return
    question = sys.stdin.read().strip()
    if not question:
        raise CliError("nothing on standard input to ask")
    ask_once(client, settings, question)


class Conversation:
    """The loop: read a line, obey a command or stream a reply. Main thread."""

    def __init__(self, client: Client, settings: Settings, console: Console) -> None:
        self._client = client
        self._settings = settings
        self._console = console
        self.messages: list[dict[str, str]] = []

    def run(self) -> None:
        """Talk until the user leaves."""
        self._note(f"{self._settings.model} at {self._client.url}. /help for commands, /exit or Ctrl-D to leave.")
        with _input_history():
            while (line := self._read()) is not None:
                if line.startswith("/"):
                    if not self.command(line):
                        return
                elif line:
                    self.ask(line)

    def _note(self, text: str, style: str = "dim") -> None:
        self._console.print(text, style=style, markup=False, highlight=False)

    def _read(self) -> str | None:
        """Return what the user typed, None at the end. Ctrl-C drops the line."""
        lines: list[str] = []
        while True:
            try:
                # \001 and \002 tell readline that the colour takes no room.
                line = input("\001\033[1;36m\002… \001\033[0m\002" if lines else "\001\033[1;36m\002› \001\033[0m\002")
            except EOFError:
                self._console.print()
                return None
            except KeyboardInterrupt:
                self._note("\n(Ctrl-D or /exit leaves)")
                lines = []
                continue
            if line.endswith("\\"):
                lines.append(line[:-1])
                continue
            return "\n".join([*lines, line]).strip()

    def ask(self, question: str) -> None:
        """Stream one reply. Ctrl-C closes the stream and keeps what came."""
        from cli.markdown_stream import MarkdownStream

        self.messages.append({"role": "user", "content": question})
        reply = Reply()
        note, style = "", "dim"
        try:
            with (
                MarkdownStream(self._console) as screen,
                closing(self._client.stream(self._settings, self.messages, reply)) as pieces,
            ):
                for delta in pieces:
                    if delta.waiting:
                        screen.waiting(delta.waiting)
                    if delta.reasoning:
                        screen.reasoning(delta.reasoning)
                    if delta.text:
                        screen.text(delta.text)
        except KeyboardInterrupt:
            note = "stopped; "
        except ChatError as error:
            self._note(str(error), "red")
        if reply.text:
            self.messages.append({"role": "assistant", "content": reply.text})
        else:
            self.messages.pop()  # unanswered: asking again must not send it twice
        if reply.first_s is not None or note:
            self._note(note + reply.summary(), style)
        self._console.print()

    def command(self, line: str) -> bool:
        """Obey a /command. Returns False when the user leaves."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name in ("/exit", "/quit", "/bye"):
            return False
        try:
            if name == "/help":
                self._note(HELP)
            elif name == "/clear":
                self.messages.clear()
                self._note("forgotten")
            elif name == "/system":
                self._settings.system = rest or self._settings.system
                self._note(f"system: {self._settings.system or '(none)'}")
            elif name == "/model":
                self._change_model(rest)
            elif name == "/save":
                self._save(rest)
            else:
                self._note(f"{name} is not a command; /help lists them", "red")
        except (CliError, OSError) as error:
            self._note(str(error), "red")
        return True

    def _change_model(self, name: str) -> None:
        names = self._client.models()
        if not name:
            self._note("\n".join(f"{'*' if n == self._settings.model else ' '} {n}" for n in names))
        elif names and name not in names:
            raise CliError(f"{name} is not served; there is {', '.join(names)}")
        else:
            self._settings.model = name
            self._note(f"model: {name}")

    def _save(self, target: str) -> None:
        if not target:
            raise CliError("say where: /save FILE")
        path = Path(target).expanduser()
        system = self._settings.system
        messages = ([{"role": "system", "content": system}] if system else []) + self.messages
        if path.suffix == ".json":
            text = json.dumps({"model": self._settings.model, "messages": messages}, ensure_ascii=False, indent=2)
        else:
            text = "\n\n".join(f"**{m['role']}**\n\n{m['content']}" for m in messages)
        path.write_text(text + "\n", encoding="utf-8")
        self._note(f"saved {len(self.messages)} messages to {path}")


class _input_history:  # noqa: N801 - used like a function
    """Line editing, with what was typed in earlier chats; a chat without readline or a home works, too."""

    def __enter__(self) -> None:
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
        self._path = state / "hostler" / "chat_history"
        with suppress(ImportError, OSError):
            import readline

            readline.set_history_length(1000)
            readline.read_history_file(self._path)

    def __exit__(self, *exception: object) -> None:
        with suppress(ImportError, OSError):
            import readline

            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            readline.write_history_file(self._path)
            self._path.chmod(0o600)
