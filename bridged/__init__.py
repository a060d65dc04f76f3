"""bridged: updates STM32 microcontrollers behind a Linux gateway, and proves what is in their flash.

The package root imports nothing: the session process (``bridged.target.worker``) starts from here and must be up
in a few milliseconds on a small gateway.
"""

__version__ = "1.0.0"
