"""What a person sees of a training run: the live panel, and the report at its end. Fed by events alone.

Part of `node/trainer`, which shows it; imports nothing of the rest of it.
"""
