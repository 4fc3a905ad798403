"""Tests of `conv3d_activation` through its public function: calls.py holds what they share."""
