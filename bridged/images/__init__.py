"""Formats to one ``Image``, the ``Plan`` (image and chip), and the store of staged images on disk.

``model`` and ``plan`` are pure and small: the session process imports them. ``formats`` runs only in the parser process.
"""
