"""An invite survives a round trip and a mail; everything else is told plainly."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import base58
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError
from protocol import invite_pb2
from protocol.identity import peer_id_of, public_key_of
from protocol.invite import MAX_CHARS, Invite, read_join
from protocol.swarm_file import MAX_FILE_BYTES, SwarmFile

if TYPE_CHECKING:
    from pathlib import Path

OWNER = peer_id_of(bytes(range(32)))  # always the same: it is in the names of tests
PEERS = tuple(f"/ip4/192.0.2.{n}/tcp/4001/p2p/{OWNER}" for n in (1, 2))
INVITE = Invite(run_id="demo-0123456789ab", initial_peers=PEERS, owner=OWNER, expires_s=2_000_000_000)
NOW_S = 1_800_000_000.0
BEFORE = (
    "kh13KhJ9wV71S625HauBAdbFufSyiACUGm5fuL1gVSqKdYHdLQSQrHdbBs8XJXCP6xSTdpvKponYomFFvgyr4hSYv4YNMFWs73We"
    "PsiVdDvdva9WbKmdUR2jKxPESk6y83o8F4JkDvnARZmWebrkV7z1H4mKqqqQGC8yD2ZwtemigndfccYpp933xkc4DToZYKMwfZpr"
    "8ZbVsgbn1sBHtdA9VDeCVXSgFDZrnaPJm57TStaNrDB3SE7oir2tT3315E66RJ3G9SFqsL7N1mmQuqDmihxLZA9ARNpFeYYSr3gh"
    "PR5NeGPVDdqc9"
)
"""`INVITE` as it was encoded before invites could carry a token."""


def with_payload(message: bytes) -> str:
    return "kh1" + base58.b58encode_check(message).decode()


def message(**changes: object) -> str:
    fields = {"run_id": "demo", "initial_peers": PEERS, "owner": public_key_of(OWNER), **changes}
    return with_payload(invite_pb2.Invite(**fields).SerializeToString())  # type: ignore[arg-type]  # wrong on purpose


def test_what_is_encoded_is_decoded_and_fits_a_url() -> None:
    text = INVITE.encode()
    assert text.isascii()
    assert text.isalnum()
    assert Invite.decode(text, NOW_S) == INVITE


def test_line_breaks_and_blanks_are_forgiven() -> None:
    text = INVITE.encode()
    assert Invite.decode(f"  {text[:60]}\r\n{text[60:120]} {text[120:]}\n", NOW_S) == INVITE


def test_a_file_with_an_invite_is_as_good(tmp_path: Path) -> None:
    path = tmp_path / "invite.txt"
    path.write_text(INVITE.encode() + "\n", encoding="utf-8")
    assert read_join(str(path), NOW_S) == read_join(INVITE.encode(), NOW_S) == INVITE


@given(st.data())
def test_one_wrong_character_is_noticed(data: st.DataObject) -> None:
    text = INVITE.encode()
    place = data.draw(st.integers(3, len(text) - 1))
    other = data.draw(st.sampled_from([char for char in base58.BITCOIN_ALPHABET.decode() if char != text[place]]))
    with pytest.raises(ConfigError, match="damaged or cut short"):
        Invite.decode(text[:place] + other + text[place + 1 :], NOW_S)


@given(st.integers(3, len(INVITE.encode()) - 1))
def test_an_invite_cut_short_is_noticed(length: int) -> None:
    with pytest.raises(ConfigError, match=r"damaged or cut short|must be letters and digits"):
        Invite.decode(INVITE.encode()[:length], NOW_S)


@given(st.binary(max_size=300))
def test_no_payload_raises_anything_but_a_config_error(payload: bytes) -> None:
    try:
        Invite.decode(with_payload(payload), NOW_S)
    except ConfigError as error:
        assert str(error).startswith("invite: ")  # noqa: PT017 - a payload that happens to be right is no error


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("kh2" + INVITE.encode()[3:], "is of format 2, kilohive .* reads format 1; install the version"),
        ("http://example.org", "must be letters and digits that begin with kh1"),
        ("", "must be letters and digits that begin with kh1"),
        ("kh1" + "z" * MAX_CHARS, f"more than {MAX_CHARS} characters"),
        (message(run_id="a b"), "run_id: must be 1 to 128 letters"),
        (message(initial_peers=()), "initial_peers: must be 1 to 64"),
        (message(initial_peers=("x",)), "initial_peers: must be a multiaddress"),
        (message(owner=b"short"), "public_key: must be 32 bytes"),
        (message(admission=b"short"), "admission: must be 32 bytes, is 5"),
        (message(expires_s=int(NOW_S)), "expired at 2027-01-15 08:00 UTC; ask the run's owner"),
        (with_payload(b"\xff"), "its content is not an invite"),
    ],
)
def test_a_bad_invite_is_told_plainly(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Invite.decode(text, NOW_S)


def test_what_is_neither_an_invite_nor_a_file_is_told_plainly(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither an invite, which is kh1 .* \(No such file or directory\)"):
        read_join(str(tmp_path / "none.txt"), NOW_S)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"\(not text\)"):
        read_join(str(tmp_path / "binary"), NOW_S)


def test_a_swarm_file_is_told_from_an_invite_by_its_content(tmp_path: Path) -> None:
    path, file = tmp_path / "any name", SwarmFile(run_id="demo", initial_peers=PEERS, owner=OWNER)
    file.write(path)
    assert read_join(str(path), NOW_S) == file
    path.write_text(" \n" + INVITE.encode(), encoding="utf-8")
    assert read_join(str(path), NOW_S) == INVITE


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "holds neither an invite, which begins with kh1, nor what a swarm.toml has"),
        (b"hello = 1", "holds neither an invite"),
        (b"run_id = ", "not a swarm file"),
        (b"run_id = 'demo'\nowned = 1", "owned: unknown field"),
        (b"kh1oops", "invite: is damaged or cut short"),
        (b"run_id = 'x'\n" + b"#" * MAX_FILE_BYTES, f"is longer than {MAX_FILE_BYTES} bytes, so it is neither"),
    ],
)
def test_a_file_that_is_neither_is_told_plainly(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "told"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=sentence):
        read_join(str(path), NOW_S)


def test_a_closed_runs_invite_carries_its_token_and_does_not_show_it() -> None:
    invite = replace(INVITE, admission=bytes(range(32)))
    assert Invite.decode(invite.encode(), NOW_S) == invite
    assert "admission" not in repr(invite)


def test_an_open_runs_invite_is_what_it_was_before_there_were_tokens() -> None:
    assert INVITE.encode() == BEFORE
