"""Compare ways to train a model: arms × seeds on the project's own trainer. `python -m bench.sweep --help` says how."""
