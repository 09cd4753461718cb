"""A host's part of credit: what it has counted for each trainer, and what it signs of that. Part of `node/host`."""
