"""Which calls went our way."""

from ..norm_fixtures import at_any_size, calls

__all__ = ["at_any_size", "calls"]
