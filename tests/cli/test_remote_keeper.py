"""What keeps `hostler remote`'s forward up: its states and waits, by a manual clock and lives of ssh from a script."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from cli.exits import CliError
from cli.remote import ssh
from cli.remote.forward import Answer, Keeper, Link

from .fakes import News

BOX = ssh.Route("ada@box")


@dataclass
class Life:
    """One run of ssh: what is answered at each look, then how it ends. `each_s`: time that a look takes."""

    answers: list[Answer] = field(default_factory=list)
    status: int = 255
    errors: str = "client_loop: send disconnect: Broken pipe"
    each_s: float = 1.0


class Script:
    """The keeper's effects, from a script of lives; Ctrl-C when there are no more."""

    def __init__(self, *lives: Life, taken: int = 0) -> None:
        self.lives = list(lives)
        self.taken = taken
        self.clock_s = 0.0
        self.waits_s: list[float] = []
        self.commands: list[list[str]] = []
        self.num_stopped = 0

    def dial(self, command: list[str]) -> Link:
        if not self.lives:
            raise KeyboardInterrupt
        self.commands.append(command)
        self.life = self.lives.pop(0)
        return self

    def wait(self, timeout_s: float) -> int | None:
        self.clock_s += self.life.each_s
        return None if self.life.answers else self.life.status

    def errors(self) -> str:
        return self.life.errors

    def stop(self) -> None:
        self.num_stopped += 1

    def ask(self, port: int) -> Answer:
        return self.life.answers.pop(0)

    def is_free(self, port: int) -> bool:
        if self.taken:
            self.taken -= 1
            return False
        return True

    def sleep(self, time_s: float) -> None:
        self.waits_s.append(time_s)
        self.clock_s += time_s

    def now_s(self) -> float:
        return self.clock_s


def keep(script: Script, *, may_ask: bool = False) -> News:
    """Let a keeper run until the script is over."""
    news = News()
    keeper = Keeper(
        BOX,
        8000,
        ("/run/gateway.sock", "127.0.0.1:8000"),
        news,
        on_first_up=lambda: news.say("first", "up"),
        may_ask=may_ask,
        effects=script,
    )
    with pytest.raises(KeyboardInterrupt):
        keeper.run()
    return news


UP = [Answer.CLOSED, Answer.SERVER]


def test_a_connection_that_ends_is_made_again_and_told_each_time() -> None:
    script = Script(Life([*UP]), Life([*UP]))
    news = keep(script)
    assert news.events == ["first", "lost", "up", "lost"]
    assert "Broken pipe; trying again in 1 s" in news.texts[1]
    assert script.num_stopped == 2


def test_waits_double_to_half_a_minute_and_a_minute_of_life_forgives() -> None:
    short, long = Life(errors="ssh: connect to host box port 22: No route to host"), Life([*UP], each_s=30.0)
    script = Script(*[short] * 7, long, short)
    keep(script)
    assert script.waits_s == [1, 2, 4, 8, 16, 30, 30, 1, 2]


def test_only_the_first_connection_may_ask_the_user() -> None:
    script = Script(Life([*UP]), Life([*UP]))
    keep(script)
    assert ["BatchMode=yes" in command for command in script.commands] == [False, True]


def test_a_password_that_is_wanted_again_is_asked_for_if_somebody_is_there() -> None:
    denied = Life(errors="ada@box: Permission denied (password).")
    script = Script(Life([*UP]), denied, Life([*UP]))
    assert keep(script, may_ask=True).events == ["first", "lost", "asking", "up", "lost"]
    assert ["BatchMode=yes" in command for command in script.commands] == [False, True, False]
    with pytest.raises(CliError, match="does not let you in"):
        Keeper(
            BOX, 1, ("/s",), News(), on_first_up=lambda: None, may_ask=False, effects=Script(Life([*UP]), denied)
        ).run()


def test_a_server_that_goes_away_and_comes_back_is_told_and_the_connection_stays() -> None:
    script = Script(Life([Answer.SERVER, Answer.SILENCE, Answer.SILENCE, Answer.SERVER]))
    assert keep(script).events == ["first", "server_gone", "up", "lost"]
    assert len(script.commands) == 1


def test_a_local_port_that_another_took_meanwhile_is_waited_for() -> None:
    script = Script(Life([*UP]))
    news = keep(script)
    script = Script(Life([*UP]), taken=1)
    with pytest.raises(CliError, match="port 8000 of this machine is taken"):
        Keeper(BOX, 8000, ("/s",), news, on_first_up=lambda: None, may_ask=False, effects=script).run()
    assert script.commands == []


def test_where_the_far_sshd_forbids_the_socket_the_port_is_taken_and_else_it_is_told() -> None:
    forbids = "channel 2: open failed: administratively prohibited: open failed"
    script = Script(Life([Answer.SILENCE]), Life([*UP]))
    assert keep(script).events == ["first", "lost"]
    assert [command[-3] for command in script.commands] == [
        "127.0.0.1:8000:/run/gateway.sock",
        "127.0.0.1:8000:127.0.0.1:8000",
    ]
    script = Script(Life([Answer.SILENCE], errors=forbids))
    with pytest.raises(CliError, match="forbids forwarding"):
        Keeper(BOX, 1, ("a:1",), News(), on_first_up=lambda: None, may_ask=False, effects=script).run()
