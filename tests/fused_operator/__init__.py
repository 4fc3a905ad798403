"""Tests of `conv3d_max_pool` through its public function: calls.py holds what they share."""
