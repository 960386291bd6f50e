"""The command line. Imported before anything else, so what holds for the whole process stands here."""

import gc

# Imports make objects by the ten thousand and no garbage: looking for some costs a short command a tenth of its time.
gc.set_threshold(100_000)
