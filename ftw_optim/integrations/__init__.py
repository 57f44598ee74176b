"""Trainers and loops of other libraries, one module each, which imports what it is for."""
