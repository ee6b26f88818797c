"""Solvers that choose which neurons survive, and whom each other one joins."""
