"""One folder per kernel; its plain-PyTorch `reference.py` is the truth that faster ones are checked by."""
