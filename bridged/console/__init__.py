"""The target's serial port for people and programs: TCP, Unix socket, RFC 2217, several readers, one writer, history.

Rooms that use it take ``console.room.Console``; listeners are in ``console.server``.
"""
