"""One physical target: its UART, its NRST and BOOT0 lines, who holds it, and the session that flashes it.

``session`` is a flow without I/O; ``worker`` runs it in a process of its own (stdlib only); ``supervisor`` starts and watches
that process from the daemon; ``uart``, ``lines`` and ``gpio`` are the hardware. Imports go uart, lines <- session, worker.
"""
