"""`apart`: branches that are trained apart and then put together, against training together.

May import `experiments/arms` and `experiments/harness`.
"""
