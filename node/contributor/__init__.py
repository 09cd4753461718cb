"""Only a contributor: an expert is fetched, trained at home, and offered to a run. Begins in `command.py`.

Trains and calls as a trainer does, so it may import `node/trainer` and every room below that; never `node/host`.
"""
