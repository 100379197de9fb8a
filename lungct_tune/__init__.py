"""Search for the best truncated ResNet50 for lung CT images, on one machine or a Ray cluster."""

import signal
import sys
from pathlib import Path

__version__ = "0.2.0.dev0"

# Ctrl-C before a command has begun, or after it has said that it is stopped, ends it without a traceback. While Python
# looks for the module of `python -m`, its name for the program is "-m"
if Path(sys.argv[0]).name in ("-m", "lungct-tune") and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
