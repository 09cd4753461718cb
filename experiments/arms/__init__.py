"""Experiments that train several arms in one process, and one arm's training, which other experiments build on.

May import `experiments/harness` and `node`. Holds `choosing`, `granularity` and `idiots`.
"""
