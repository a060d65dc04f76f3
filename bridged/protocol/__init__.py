"""Bytes to meaning and back, for every wire. No I/O, no clock, no logging, no ``async`` in this room."""
