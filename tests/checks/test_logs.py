"""What reaches a log: fields and tracebacks, but no key or token, in whichever way it got into the line."""

from __future__ import annotations

import json
import logging
import sys

import pytest
from hostler.logs import HIDDEN, JsonFormatter, LineFormatter, redacted, secrets_of

KEY = "correct-horse-battery"
SECRETS = [
    "hk_0123456789abcdefABCDEF",
    "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH",
    "sk-proj-0123456789abcdef",
    "sk-ant-api03-0123456789abcdef",
]


@pytest.mark.parametrize("secret", SECRETS)
def test_what_looks_like_a_key_is_hidden_wherever_it_stands(secret: str) -> None:
    for line in (
        secret,
        f"key={secret!r}",
        f'{{"Authorization": "Bearer {secret}"}}',
        f"https://x.example/?k={secret}",
    ):
        assert secret not in redacted(line)
        assert HIDDEN in redacted(line)


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("authorization: Bearer abc.def-ghi123", f"authorization: Bearer {HIDDEN}"),
        ("x-api-key: short", f"x-api-key: {HIDDEN}"),
        ("https://ann:horse@hub.example/model", f"https://{HIDDEN}@hub.example/model"),
        ("proxy http://ann:a%40b@10.0.0.1:3128 refused", f"proxy http://{HIDDEN}@10.0.0.1:3128 refused"),
    ],
)
def test_headers_and_passwords_in_urls_are_hidden_and_the_rest_is_kept(line: str, shown: str) -> None:
    assert redacted(line) == shown


@pytest.mark.parametrize(
    "line",
    [
        "request request_id='req_0123456789abcdef0123456789abcdef' method='POST' path='/chat/completions' status=200",
        "HuggingFaceTB/SmolLM2-135M-Instruct hf_hub_download num_tokens=12 max_tokens=4 task-0123456789abcdef0123",
        "listens on http://127.0.0.1:8000/v1 and http://[::1]:8000/v1 for a@b.example",
        "the disk-usage-of-everything-here risk-0123456789abcdef0",
    ],
)
def test_what_is_no_secret_is_left_alone(line: str) -> None:
    assert redacted(line) == line


def test_the_environments_secrets_are_known_by_value_but_not_short_words() -> None:
    found = secrets_of(
        {"HOSTLER_API_KEY": KEY, "NGROK_AUTHTOKEN": f"{KEY}-longer", "HF_TOKEN": "x", "HOME": "/home/ann"}
    )
    assert found == (f"{KEY}-longer", KEY)
    assert redacted(f"{KEY} {KEY}-longer", found) == f"{HIDDEN} {HIDDEN}"


@pytest.mark.parametrize("formatter", [LineFormatter((KEY,)), JsonFormatter((KEY,))])
def test_messages_fields_and_tracebacks_are_written_without_secrets(formatter: logging.Formatter) -> None:
    try:
        raise RuntimeError(f"upstream refused {KEY} and {SECRETS[0]}")
    except RuntimeError:
        information = sys.exc_info()
    record = logging.LogRecord("test", logging.ERROR, __file__, 1, "failed with %s", (SECRETS[1],), information)
    record.headers = {"x-api-key": KEY, "authorization": f"Bearer {SECRETS[2]}"}
    line = formatter.format(record)
    assert "upstream refused" in line
    assert "headers" in line
    assert [secret for secret in (KEY, *SECRETS) if secret in line] == []
    if isinstance(formatter, JsonFormatter):
        assert json.loads(line)["message"] == f"failed with {HIDDEN}"


def test_a_line_of_json_stays_json() -> None:
    fields = {"url": "http://a:8000", "x": "b@c", "head": 'x-api-key: "short"', "body": 'x-api-key: abc"d'}
    record = logging.makeLogRecord({"msg": "m", **fields})
    told = json.loads(JsonFormatter().format(record))
    assert (told["url"], told["x"]) == ("http://a:8000", "b@c")
    assert "abc" not in told["body"]
