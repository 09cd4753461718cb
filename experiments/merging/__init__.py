"""`merging` and `merging-adapters`: merges of what was trained apart, and choices between it.

May import `experiments/apart` and `experiments/adapters`, whose branches it merges, and what those may import.
"""
