"""A host's side of a step: a request is checked, merged with others, computed, answered. Part of `node/host`.

In order: `service.py`, `jobs.py`, `runtime.py`, `batch_runner.py`, then `node/model/experts/layer.py`. Knows no DHT.
"""
