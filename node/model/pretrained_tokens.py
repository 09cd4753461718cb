"""What the files of a run's pretrained model say of its tokens: which play a part, and how a chat is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, cast

from transformers import AutoTokenizer

from node.model.pretrained_files import GGUF_SUFFIX, model_folder, naming_load_errors, quiet_transformers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from protocol.manifest import Manifest

DEFAULT_TEMPLATE: Final = "default"


@dataclass(frozen=True, kw_only=True)
class PretrainedTokens:
    """What a pretrained model's own files say of its tokens.

    `special` are those that play a part, by their part, and `extra_special` others that are no text. `chat_template`
    makes a text of a chat, None if there is none. `end` is the id of the token that ends a text, if there is one.
    """

    special: Mapping[str, str] = field(default_factory=dict)
    extra_special: tuple[str, ...] = ()
    chat_template: str | None = None
    end: int | None = None


def read_tokens(manifest: Manifest) -> PretrainedTokens:
    """Read them, and no weights. Raises DataError where a file is not on this machine, or is no tokenizer's."""
    config, n_tokens = manifest.pretrained, manifest.model.vocab_size
    folder = model_folder(config)
    gguf = next((file.name for file in config.files if file.name.endswith(GGUF_SUFFIX)), None)
    with quiet_transformers(), naming_load_errors(folder):
        read = AutoTokenizer.from_pretrained(folder, gguf_file=gguf, local_files_only=True, trust_remote_code=False)

    def is_known(token: str) -> bool:  # the library's classes add tokens that no model of theirs was made for
        return cast("int", read.convert_tokens_to_ids(token)) < n_tokens

    template = read.chat_template
    special = {name: str(token) for name, token in read.special_tokens_map.items() if is_known(str(token))}
    return PretrainedTokens(
        special=special,
        extra_special=tuple(filter(is_known, map(str, read.extra_special_tokens))),
        chat_template=template.get(DEFAULT_TEMPLATE) if isinstance(template, dict) else template,
        end=read.eos_token_id if "eos_token" in special else None,
    )
