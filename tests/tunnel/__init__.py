"""Tests of public mode: a stand-in for the tunnel, and what is seen through it."""
