"""The arms that test the idea, built from node's pure-torch parts.

May import node and protocol. Nothing in the product imports it, and no wheel holds it.
"""
