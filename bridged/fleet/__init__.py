"""Past one gateway: this gateway as a member of a fleet on NATS JetStream, roll-outs over many, and hawkBit's DDI.

Nothing of it is loaded where it is not configured. The gateway stays the authority on its targets (docs/fleet.md): a fleet
only submits jobs, through the function and with the policy and signatures that hold for everybody, and is told how they end.
``wire`` says what is said, ``rollout`` and ``select`` decide, without I/O; ``ledger`` remembers which message became which
job; ``connector`` is the gateway's side, ``operator`` the command line of whoever runs the fleet, over the same ``link``.
"""
