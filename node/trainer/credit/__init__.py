"""A trainer's part of credit: what it claims for hosts, and how it gets their signatures. Part of `node/trainer`."""
