"""Weights: their names and shapes in every format, in files of every kind, from one into another."""
