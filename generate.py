"""``python generate.py --base_model MODEL --lora_weights DIR``: the command ``alpaca-lora generate``."""

import sys

from alpaca_lora.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
