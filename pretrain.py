"""Pretrain an encoder on unlabeled images, from a clone and on any number of processes.

    python pretrain.py --config pretrain_atto --data.path photos --out runs/first
    accelerate launch pretrain.py --config pretrain_atto --data.path photos --out runs/first

The same as `fcmae pretrain`; `--help` lists the settings.
"""

import sys

from fcmae.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
