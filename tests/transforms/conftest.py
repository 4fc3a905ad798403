"""Models in pairs."""

from .cases import pair as pair
