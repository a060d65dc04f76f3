"""What the network sees. Beyond loopback and the Unix socket nobody is answered without a token or a certificate (P7): ``auth``
says who somebody is, ``guarded`` lets through what that one may do. Whatever touches hardware is a job, so nothing here calls
``target``; every feature is a function of ``jobs`` or of the image store, and is only carried to the wire here.
"""
