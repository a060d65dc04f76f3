"""What the network sees: the line protocol and the metrics. Both listen on loopback (and a Unix socket) only, until there is
authentication (P7). Whatever touches hardware is a job, so nothing here calls ``target``; every feature is a function of
``jobs`` or of the image store, and is only carried to the wire here.
"""
