"""``python finetune.py --config configs/finetune.yml``: the command ``alpaca-lora finetune``."""

import sys

from alpaca_lora.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
