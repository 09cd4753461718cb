"""A run's model behind an HTTP server that OpenAI's clients can call. Begins in `serve_command.py`.

Calls hosts as `sample` does, so it may import `node/trainer` and every room below that; never `node/host`.
"""
