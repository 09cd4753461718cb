"""A server for browsers and other HTTP clients: its socket, who may ask, how it refuses. Knows nothing of Kilohive."""
