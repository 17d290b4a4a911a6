"""What each command does, one file each; `schemas.py` holds what each can be told."""
