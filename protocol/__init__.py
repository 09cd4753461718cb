"""The wire, and nothing else: messages, tensor codec, identity, signed records, limits, statuses, the run's manifest.

May import `common`. Everything else may import it.
"""
