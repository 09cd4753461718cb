"""What the tests share: leak checks, the check of generated code, fakes. Only `tests/` imports it."""
