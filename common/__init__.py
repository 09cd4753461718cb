"""The ground floor: what any room may need. Errors, events, files, sizes, tasks, the command line.

Everything may import it; it imports nothing of Kilohive.
"""
