"""Synthetic chests, piece by piece, and the files they are stored in."""
