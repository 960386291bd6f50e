"""The command line. Imported before anything else, so what holds for the whole process stands here."""

import atexit
import gc

# Imports make objects by the ten thousand and no garbage: looking for some costs a short command a tenth of its time,
# and looking once more as the process ends costs another tenth.
gc.set_threshold(100_000)
atexit.register(gc.freeze)
