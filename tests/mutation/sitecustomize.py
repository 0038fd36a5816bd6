"""Plants a mutant in every process of a test: Python imports this wherever this folder is on PYTHONPATH."""

import os

from mutants import VARIABLE, plant

if os.environ.get(VARIABLE):
    plant(os.environ[VARIABLE])
