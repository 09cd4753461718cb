"""From a request to texts for the batch: defaults, limits, and text as tokens.

Path of a request: app -> requests -> **asked** -> batch -> answers.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from common.errors import InvalidInputError, LimitExceededError
from node.api.chat import Turn
from node.api.written_text import WrittenText
from node.model.generation import Prompt
from node.model.next_token import SEEDS, GenerationConfig
from node.trainer.sampling import document_start

if TYPE_CHECKING:
    from collections.abc import Sequence

    from node.api.requests import ChatRequest, CompletionRequest, GenerationRequest
    from node.api.served_model import ServedModel

COMPLETION_TOKENS = 16
"""What OpenAI's API writes if a completion does not say how much."""
SEED_BITS = 63


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a request comes to: `n` texts for each prompt, the first of a prompt drawn with `config.seed`.

    field: what the request calls its prompts.
    is_told: whether log-probabilities are.
    max_new_tokens: 0 goes on to the end of the context.
    """

    prompts: Sequence[str | Sequence[int]]
    field: str
    n: int
    config: GenerationConfig
    stop: tuple[str, ...]
    is_told: bool


@dataclass(frozen=True, kw_only=True)
class WantedTexts:
    """What the batch is to write, choice by choice, and how many tokens the prompts have together."""

    texts: list[WrittenText]
    prompt_tokens: int


def asked_completion(request: CompletionRequest, max_tokens: int) -> Asked:
    """Raises LimitExceededError for more tokens than a text may have."""
    config = _config(request, request.max_tokens or COMPLETION_TOKENS, request.logprobs or 0, max_tokens)
    return Asked(
        prompts=request.prompt,
        field="prompt",
        n=request.n or 1,
        config=config,
        stop=request.stop,
        is_told=request.logprobs is not None,
    )


def asked_chat(request: ChatRequest, served: ServedModel, max_tokens: int) -> Asked:
    """Raises what `asked_completion` does, and InvalidInputError for messages that the model's template refuses."""
    wanted = request.max_completion_tokens or request.max_tokens or 0
    turns = [Turn(role=message.role, content=message.content) for message in request.messages]
    return Asked(
        prompts=[served.chat.text(turns)],
        field="messages",
        n=request.n or 1,
        config=_config(request, wanted, request.top_logprobs or 0, max_tokens),
        stop=request.stop + served.chat.stop,
        is_told=bool(request.logprobs),
    )


def _config(request: GenerationRequest, wanted: int, n_likeliest: int, max_tokens: int) -> GenerationConfig:
    if wanted > max_tokens:
        raise LimitExceededError("max_tokens", wanted, max_tokens, "no text of this server is longer")
    # A top_p of 0 leaves the likeliest token alone.
    is_greedy = request.top_p == 0
    temperature = 1.0 if request.temperature is None else request.temperature
    return GenerationConfig(
        max_new_tokens=wanted,
        temperature=0.0 if is_greedy else temperature,
        top_k=max(0, request.top_k or 0),
        top_p=1.0 if is_greedy or request.top_p is None else request.top_p,
        seed=secrets.randbits(SEED_BITS) if request.seed is None else request.seed,
        n_likeliest=n_likeliest,
    )


def texts_of(asked: Asked, served: ServedModel, max_tokens: int) -> WantedTexts:
    """Cut the prompts into tokens, which takes a while for long ones; choices are numbered prompt by prompt.

    All prompts are texts, or all are ids.

    Raises:
        InvalidInputError: a prompt has ids that are no tokens.
        LimitExceededError: a prompt is longer than the model's context.
    """
    cut = _cut(asked, served)
    start = document_start(served.tokenizer)
    texts: list[WrittenText] = []
    for tokens in cut:
        prompt = _prompt(tokens or start, asked, served.model.context, max_tokens)
        for choice in range(asked.n):
            config = replace(prompt.config, seed=_seed(asked.config.seed, choice))
            text = WrittenText(
                len(texts), replace(prompt, config=config), served.tokenizer.stream(), tokens, asked.stop
            )
            texts.append(text)
    return WantedTexts(texts=texts, prompt_tokens=sum(len(tokens or start) for tokens in cut))


def _cut(asked: Asked, served: ServedModel) -> list[list[int]]:
    texts = [prompt.encode("utf-8") for prompt in asked.prompts if isinstance(prompt, str)]
    cut = [list(prompt) for prompt in asked.prompts if not isinstance(prompt, str)]
    cut += [tokens.tolist() for tokens in served.tokenizer.encode(texts)] if texts else []
    context, n_tokens = served.model.context, served.tokenizer.vocab_size
    for tokens in cut:
        if len(tokens) > context:
            raise LimitExceededError(asked.field, len(tokens), context, "tokens that the model sees at once")
        wrong = next((token for token in tokens if not 0 <= token < n_tokens), None)
        if wrong is not None:
            raise InvalidInputError(asked.field, f"holds the id {wrong}; tokens are 0 to {n_tokens - 1}")
    return cut


def _prompt(ids: Sequence[int], asked: Asked, context: int, max_tokens: int) -> Prompt:
    to_the_end = min(max_tokens, max(1, context - len(ids)))
    return Prompt(ids=ids, config=replace(asked.config, max_new_tokens=asked.config.max_new_tokens or to_the_end))


def _seed(first: int, choice: int) -> int:
    """Seeds begin again at the smallest after the largest."""
    return SEEDS.start + (first + choice - SEEDS.start) % (SEEDS.stop - SEEDS.start)
