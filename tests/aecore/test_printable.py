"""What is printed, logged or stored holds no secret of a URL; what is printed holds nothing that a terminal obeys."""

import json
import pickle
from pathlib import Path

import pytest

from aecore.errors import ConfigError, StoreError, from_json, masked, printable, to_json
from aecore.store import absolute_url

SIGNED = (
    "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIAHIDDEN%2F20261130&X-Amz-Signature=hidden123&X-Amz-Security-Token=hidden/45=="
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://user:hidden@host:9/a", "http://***@host:9/a"),
        ("http://user:hid@den@host/a", "http://***@host/a"),
        ("http://hidden@host/a", "http://***@host/a"),
        ("s3://AKIA:hidden/with+slash@bucket/a", "s3://***@bucket/a"),
        ("'http://user:hidden@host/a', \"https://u:hidden@b\"", "'http://***@host/a', \"https://***@b\""),
        ("http://a:8080,https://u:hidden@b/x;s3://p@c", "http://a:8080,https://***@b/x;s3://p@c"),
        ("http://b/k?versionId=3&Signature=hidden&Expires=9", "http://b/k?versionId=3&Signature=***&Expires=9"),
        ("http://b/k?sv=1&sig=hidden%3D", "http://b/k?sv=1&sig=***"),
        ("http://b/k?x-goog-credential=hidden&x-goog-signature=hidden", "http://b/k?x-goog-credential=***&x-goog-signature=***"),
        ("http://b/k?X-Amz-Signature%3Dhidden", "http://b/k?X-Amz-Signature%3D***"),
    ],
)
def test_passwords_and_signatures_of_urls_are_masked(text: str, expected: str) -> None:
    assert masked(text) == masked(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "s3://profile@bucket/a:b@c",
        "http://127.0.0.1:4200/deployments/flow@name",
        "file:///data/a:b@c",
        "mail me@example.org: a@b",
        "/data/a.tar?versionId=3",
        "design=x, signature=(1, 28, 28)",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert masked(text) == text


def test_every_presigned_parameter_that_grants_access_is_masked() -> None:
    assert "hidden" not in masked(f"no such file https://b.s3.amazonaws.com/a.tar?{SIGNED}").lower()


def test_an_error_never_holds_a_secret_wherever_it_goes() -> None:
    error = StoreError(f"cannot read https://user:hidden@host/a?{SIGNED}: 403")
    for form in (
        str(error),
        repr(error),
        json.dumps(to_json(error)),
        str(pickle.loads(pickle.dumps(error))),
        str(from_json(to_json(error))),
    ):
        assert "hidden" not in form.lower()
        assert "https://***@host/a?" in form


@pytest.mark.parametrize(
    "url", [f"s3://bucket/a?{SIGNED}", f"s3a://bucket/a?{SIGNED}", f"s3:/bucket/a?{SIGNED}", "file://user:hidden@host/a"]
)
def test_a_url_with_a_secret_is_refused_and_so_in_no_artefact(url: str) -> None:
    with pytest.raises(ConfigError) as raised:
        absolute_url(url)
    assert "hidden" not in str(raised.value).lower()


def test_a_path_may_look_like_a_query(tmp_path: Path) -> None:
    assert absolute_url(tmp_path / "a.tar?sig=1") == str(tmp_path / "a.tar?sig=1")


def test_control_characters_are_escaped_and_letters_of_all_scripts_stay() -> None:
    assert printable("a\x1b[2J\x1b]0;title\x07b") == r"a\x1b[2J\x1b]0;title\x07b"
    assert printable("over\rwritten, \x9b31m, \u202etxt.exe, \u2028") == r"over\rwritten, \x9b31m, \u202etxt.exe, \u2028"
    assert printable("not UTF-8: \udcff") == r"not UTF-8: \udcff"
    assert printable("naïve 数据 داده 👩\u200d🔬\tx\ny") == "naïve 数据 داده 👩\u200d🔬\tx\ny"
    assert printable("one\ntwo", one_line=True) == r"one\ntwo"
    assert printable(printable("\x1b")) == r"\x1b"
    assert "hidden" not in printable("http://u:hidden@h")
