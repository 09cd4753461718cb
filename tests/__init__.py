"""The tests, their helpers and the benchmarks. Nothing outside this folder imports it."""
