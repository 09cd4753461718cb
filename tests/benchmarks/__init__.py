"""Measurements that stand in the docs. Each module's first line is the command; nothing here is a test."""
