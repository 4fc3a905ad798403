"""What must hold: `pytest` (see conftest.py for what every test shares)."""
