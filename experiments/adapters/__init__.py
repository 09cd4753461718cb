"""`adapters`: thousands of tiny adapters around a frozen model that somebody else trained (`seed/`).

May import `experiments/live`, `experiments/arms` and `experiments/harness`.
"""
