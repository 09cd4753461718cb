"""The arms that test the idea, a folder each, built from the product's own parts. `README.md` says how to add one.

May import `node`, `coordinator`, `protocol` and `common`. Nothing in the product imports it, and no wheel holds it.
"""
