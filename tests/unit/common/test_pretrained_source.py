"""A pretrained model is found in a folder, a file, a package or a repository, and described without its weights."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest
from tokenizers import Tokenizer

from common.errors import ConfigError
from common.pretrained_source import PretrainedSource, find_pretrained, shape_of
from common.tokenizer import FileTokenizer
from tests.support.tiny_gguf import save_gguf
from tests.support.tiny_pretrained import N_TOKENS, save_pretrained

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WANTED = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pretrained(tmp_path_factory.mktemp("model"))


def test_a_folder_is_read_but_for_what_is_no_part_of_a_model(folder: Path) -> None:
    (folder / "README.md").write_text("A model.", encoding="utf-8")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    source = find_pretrained(str(folder))
    assert source.folder == folder
    assert set(source.names) == WANTED
    assert not source.gguf


def test_widths_and_tokenizer_are_told_without_the_weights(folder: Path) -> None:
    names = tuple(WANTED - {"model.safetensors"})
    shape = shape_of(PretrainedSource(folder=folder, names=names))
    assert (shape.d_model, shape.n_layers, shape.max_context, shape.vocab_size) == (16, 4, 64, N_TOKENS)
    tokenizer = FileTokenizer(shape.tokenizer, "read")
    assert tokenizer.decode(tokenizer.encode([b"the swarm trains"])[0].tolist()) == b"the swarm trains"


def test_a_gguf_file_is_one_file(tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    path.write_bytes(b"GGUF")
    assert find_pretrained(str(path)) == PretrainedSource(folder=tmp_path, names=("small.gguf",), gguf="small.gguf")
    with pytest.raises(ConfigError, match=r"small\.gguf: is no model that transformers reads"):
        shape_of(find_pretrained(str(path)))


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("gpt-2", ["I", "'m", "Ġ", "Ġ1234", "ĊĊ"]),
        ("default", ["I", "'m", "Ġ", "Ġ1234", "ĊĊ"]),
        ("smollm", ["I", "'m", "ĠĠ", "1", "2", "3", "4", "ĊĊ"]),
        ("starcoder", ["I", "'m", "ĠĠ", "1", "2", "3", "4", "ĊĊ"]),
        ("llama-bpe", ["I", "'m", "Ġ", "Ġ", "123", "4", "ĊĊ"]),
        ("qwen2", ["I", "'m", "Ġ", "Ġ", "1", "2", "3", "4", "ĊĊ"]),
    ],
)
def test_a_gguf_files_tokenizer_splits_text_as_the_file_says(
    tmp_path: Path, name: str, pieces: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    shape = shape_of(find_pretrained(str(save_gguf(tmp_path / "tiny.gguf", name))))
    splits = Tokenizer.from_buffer(shape.tokenizer).pre_tokenizer
    assert splits is not None
    assert [piece for piece, _ in splits.pre_tokenize_str("I'm  1234\n\n")] == pieces
    assert not caplog.messages


def test_a_name_for_splits_that_nobody_knows_is_told_and_refuses_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known, unknown = (
        shape_of(find_pretrained(str(save_gguf(tmp_path / f"{name}.gguf", name)))) for name in ("gpt-2", "hive\x1b[2J")
    )
    assert unknown == known
    (told,) = caplog.messages
    assert "its tokenizer splits text as hive·[2J does, which is not known here" in told


def test_what_is_no_model_is_refused_with_what_would_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json with \*\.safetensors"):
        find_pretrained(str(tmp_path))
    (tmp_path / "model.bin").write_bytes(b"a pickle")
    with pytest.raises(ConfigError, match=r"model\.bin: is no GGUF file; give a folder"):
        find_pretrained(str(tmp_path / "model.bin"))
    with pytest.raises(ConfigError, match=r"nowhere: is not there; give a folder, a file \.gguf, smollm2, or OWNER"):
        find_pretrained("nowhere")
    monkeypatch.setattr("common.pretrained_source.SMOLLM2_PACKAGE", ("no-such-package", "1", "x"))
    with pytest.raises(ConfigError, match="smollm2: the package no-such-package is not installed: run `make"):
        find_pretrained("smollm2")


def test_a_config_that_is_damaged_is_refused(tmp_path: Path) -> None:
    folder = save_pretrained(tmp_path / "model")
    for damaged in ("{", "[]", '{"model_type": "no such model"}'):
        (folder / "config.json").write_text(damaged, encoding="utf-8")
        with pytest.raises(ConfigError, match="is no model that transformers reads"):
            shape_of(find_pretrained(str(folder)))


# A repository of Hugging Face, from a server on this machine that answers as theirs does


class Hub(BaseHTTPRequestHandler):
    folder: Path

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        files = sorted(path for path in self.folder.iterdir() if path.is_file())
        if self.path.startswith("/api/models/hive/tiny/tree/"):
            tree = [{"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0"} for path in files]
            self._send(json.dumps(tree).encode(), {})
        elif self.path.startswith("/api/models/hive/tiny"):
            siblings = [{"rfilename": path.name} for path in files]
            self._send(json.dumps({"id": "hive/tiny", "sha": COMMIT, "siblings": siblings}).encode(), {})
        else:
            self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = self.folder / self.path.rpartition("/")[2]
        if not self.path.startswith("/hive/tiny/resolve/") or not path.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = path.read_bytes()
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        self._send(data, {"X-Repo-Commit": COMMIT, "ETag": etag}, with_body=with_body)

    def _send(self, data: bytes, headers: dict[str, str], *, with_body: bool = True) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's name
        """Say nothing."""


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    handler = type("HubOfFolder", (Hub,), {"folder": folder})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)  # the bar's thread would stay
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    yield url
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.usefixtures("hub")
def test_a_repository_is_downloaded_but_for_what_is_no_part_of_a_model(folder: Path) -> None:
    source = find_pretrained(f"hive/tiny@{COMMIT}")
    assert set(source.names) == WANTED
    assert all((source.folder / name).read_bytes() == (folder / name).read_bytes() for name in WANTED)
    assert not (source.folder / "pytorch_model.bin").exists()


def test_a_repository_that_is_not_there_is_one_sentence(hub: str) -> None:
    with pytest.raises(ConfigError, match=rf"--model hive/none: cannot be downloaded from {hub}: .*; check the name"):
        find_pretrained("hive/none")
