"""Speed of every backend against torch: `pytest benchmarks/` (see conftest.py for its options)."""
