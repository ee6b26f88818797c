"""Solvers that choose the surviving neurons, and the survivor that each other neuron joins."""
