"""Tests of `accelerate`'s fusing: models.py holds what they share."""
