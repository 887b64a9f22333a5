"""One request from its body to the end of its answer: prepare, admit, attempt, retry (``coordinator.py``)."""
