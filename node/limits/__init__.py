"""What a node may take of the machine that it runs on: rates, memory, hours; and what it does take, measured.

No torch. Imports no other room of `node`.
"""
