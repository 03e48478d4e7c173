"""Worlds, networks and exact laws that only studies and tests use."""
