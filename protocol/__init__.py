"""The wire, and nothing else: messages, tensor codec, identity, signed records, limits, statuses, the run's manifest.

And how one node calls another: `channels.py` over `security.py`, which every role and a coordinator share.

May import `common`. Everything else may import it.
"""
