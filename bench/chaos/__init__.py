"""What breaks while comments stream, and the account afterwards: `make chaos`, `python -m bench.chaos`."""
