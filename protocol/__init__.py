"""The wire: messages, tensor codec, identity, signed records, limits, errors, the run's manifest. Knows nobody.

Everything may import it; it imports nothing of Kilohive.
"""
